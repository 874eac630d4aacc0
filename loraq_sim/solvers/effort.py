"""How long a solver may search: one record a preset."""

from dataclasses import dataclass

__all__ = ["EFFORTS", "PRESETS", "Effort"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Steps and passes of the iterative stages.

    ``flatten_steps`` and ``refine_steps`` are gradient steps of the two stages of `loraq` on
    integer main grids, ``refine_float_steps`` those on other grids, and ``settle_steps`` those
    after each part of a coarse branch is frozen. ``alternations`` are the passes of `alternating`
    (flat after about 25: 24 -> 60 gains less than 1 %), `loftq` and `svdquant_tuned`. `loraq` also
    runs with the preset ``below`` and returns the better result: a longer search is not always the
    better one.
    """

    flatten_steps: int
    refine_steps: int
    refine_float_steps: int
    settle_steps: int
    alternations: int
    below: str | None = None


EFFORTS = {
    "fast": Effort(
        flatten_steps=9, refine_steps=9, refine_float_steps=18, settle_steps=5, alternations=4
    ),
    "balanced": Effort(
        flatten_steps=36, refine_steps=40, refine_float_steps=100, settle_steps=20, alternations=12
    ),
    "best": Effort(
        flatten_steps=100,
        refine_steps=320,
        refine_float_steps=440,
        settle_steps=60,
        alternations=24,
        # A fifth more time; `fast` below `balanced` would take a quarter more.
        below="balanced",
    ),
}
PRESETS = {name: effort.alternations for name, effort in EFFORTS.items()}
"""Presets and their passes of block descent, the unit in which work is forecast."""
