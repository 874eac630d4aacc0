"""Which machines a command costs: names, variants, ``--set`` and the grid of ``--vary``."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import listed
from loraq_sim.errors import InputError

if TYPE_CHECKING:
    from hwmodels import Accelerator

__all__ = ["Sets", "Variants", "Varies", "chosen_machines"]

_MOST_MACHINES = 10_000

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the accelerator file, by the key that hw show prints "
        "(memories.l2.capacity_bytes=1048576); repeatable.",
        show_default=False,
    ),
]
Varies = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="KEY=V1,V2",
        help="Cost every one of these values of a key (clock_hz=1e9,1.5e9); repeatable, all "
        "combinations are costed.",
        show_default=False,
    ),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Variant of the accelerator where sources conflict (hw show lists them); repeatable.",
        show_default=False,
    ),
]


def chosen_machines(
    names: Iterable[str],
    variants: Iterable[str] | None,
    sets: Iterable[str] | None,
    varies: Iterable[str] | None,
) -> "list[tuple[dict[str, Any], Accelerator]]":
    """(varied keys and values, machine) of every combination, in the order given."""
    import hwmodels

    fixed = dict(_assignment(text, "--set") for text in sets or ())
    grid = [
        [(key, value) for value in listed([values])]
        for key, values in (_split(text, "--vary") for text in varies or ())
    ]
    n_points = 1
    for axis in grid:
        n_points *= len(axis)
    if n_points > _MOST_MACHINES:
        raise InputError(f"--vary asks for {n_points} machines; {_MOST_MACHINES} are the most")
    machines = []
    for name, variant in itertools.product(names, listed(variants) or (None,)):
        base = hwmodels.load_accelerator(name, variant)
        for point in itertools.product(*grid):
            varied = {key: hwmodels.parse_value(value) for key, value in point}
            changes = fixed | varied
            machine = hwmodels.with_overrides(base, changes) if changes else base
            machines.append((varied, machine))
    return machines


def _assignment(text: str, flag: str) -> tuple[str, Any]:
    import hwmodels

    key, value = _split(text, flag)
    return key, hwmodels.parse_value(value)


def _split(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (equals and key.strip() and value.strip()):
        raise InputError(f"{flag} must be KEY=VALUE such as clock_hz=1.5e9, got {text!r}")
    return key.strip(), value.strip()
