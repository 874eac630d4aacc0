"""The settings of one case: everything its result depends on but the layer and the machine.

`loraq_sim.evaluate_layer`, the plan of a sweep, its workers and its stored names all take one
`CaseSettings`, so that a setting cannot be lost between what was asked for and what was computed:
what is solved, and under which name a solution is kept, are both `CaseSettings.solving`, and the
name of a case is made of all of `CaseSettings.facts`.
"""

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from loraq_sim.errors import InputError
from loraq_sim.split import PrecisionSplit

__all__ = ["CaseSettings", "as_tuple", "checked_count", "datapath_grid"]


@dataclass(frozen=True, kw_only=True)
class CaseSettings:
    """One combination of settings.

    Parameters
    ----------
    split : PrecisionSplit
        With its element family and group.
    method, preset, seed, smooth, rotate
        See `loraq_sim.solve`.
    tokens : int, optional
        Activation rows to use, spread evenly over the layer's; all by default.
    rows : int, optional
        Rows M of one model call; by default what the layer says.
    fused : bool
        Whether the branch runs inside the main kernel (cost model).
    datapath : mapping
        Overrides of the accelerator's data path, of the keys in `DATAPATH_KEYS`.

    Raises
    ------
    InputError
        If `tokens` or `rows` is no whole number from 1.
    """

    split: PrecisionSplit
    method: str = "loraq"
    preset: str = "balanced"
    seed: int = 0
    smooth: float | None = None
    rotate: str | None = None
    tokens: int | None = None
    rows: int | None = None
    fused: bool = True
    datapath: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "rows"):
            object.__setattr__(self, name, checked_count(name, getattr(self, name)))

    def solving(self) -> dict[str, Any]:
        """Arguments of `loraq_sim.solve` but the layer's own: hashable, in a fixed order."""
        return {
            "main": self.split.main_weight,
            "branch": self.split.branch_weight,
            "rank": self.split.rank,
            "budget": self.split.budget,
            "method": self.method,
            "preset": self.preset,
            "seed": self.seed,
            "smooth": self.smooth,
            "rotate": self.rotate,
        }

    def facts(self) -> dict[str, Any]:
        """Every field, those of the split included, as values JSON can hold."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        split = {each.name: _plain(getattr(self.split, each.name)) for each in fields(self.split)}
        return own | {"split": split, "datapath": dict(self.datapath)}


def checked_count(name: str, value: int | None) -> int | None:
    """`value` as an int, or None.

    Raises
    ------
    InputError
        If it is neither None nor a whole number from 1.
    """
    if value is None:
        return None
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count < 2**63:
        raise InputError(f"{name} must be a positive integer, below 2**63, got {value!r}")
    return count


def as_tuple(value: Any) -> tuple:
    """`value` if it is a tuple or list of values, else the tuple of this one value."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def datapath_grid(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of data path settings, where a tuple or list of values asks for each."""
    values = [as_tuple(value) for value in settings.values()]
    return [dict(zip(settings, chosen, strict=True)) for chosen in itertools.product(*values)]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
