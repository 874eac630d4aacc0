"""``python -m loraq_sim``: the same as the ``loraq-sim`` script."""

from loraq_sim.cli.start import main

# Worker processes import this module too, under another name.
if __name__ == "__main__":
    main()
