"""The settings of a case, and the one rule by which single layers get settings of their own.

`CaseSettings` holds everything a result depends on but the layer and the machine.
`loraq_sim.evaluate_layer`, the plan of a sweep, its workers and its stored names all take one, so
that a setting cannot be lost between what was asked for and what was computed: what is solved, and
under which name a solution is kept, are both `CaseSettings.solving`, and the name of a case is made
of all of `CaseSettings.facts`.

Layers are told apart by one matcher and settled by one rule, whichever door names them (overrides
of sweeps and of ``solve``, recipes, skip lists, rows per call, choosing layers of a dump):

- `matches`: a pattern is a name, a kind, or a shell pattern of them. Brackets match themselves, and
  a choice of characters too: ``blocks[0].q`` is the layer of that name.
- `settings_of`: of several entries that match a layer, the later one wins, key by key; a split,
  rank or budget ends an earlier rank or budget, because each of them says how large the branch is.
"""

import fnmatch
import itertools
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, Unpack

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.split import AUTO, FITTED_TO_INPUTS, PrecisionSplit, parse_split

__all__ = [
    "ARRAY_KEYS",
    "CaseOptions",
    "CaseSettings",
    "DATAPATH_KEYS",
    "NONE",
    "OVERRIDE_KEYS",
    "Override",
    "SIXTEEN_BIT_KINDS",
    "as_tuple",
    "checked_count",
    "checked_override",
    "datapath_grid",
    "grid_values",
    "matches",
    "parse_array_grid",
    "parse_override",
    "parse_rows",
    "rows_of",
    "settings_of",
    "settings_with",
    "skipped",
]


ARRAY_KEYS = (
    *("acc_bits", "overflow", "products_per_add", "accumulators", "tree_bits", "tree_overflow"),
)
"""Settings of a MAC array."""

DATAPATH_KEYS = (
    *(*ARRAY_KEYS, "combine", "p_format", "out_format", "rounding", "float_overflow"),
    *("block_rounding", "zero_point", "array", "feedback_p_format"),
)
"""What of an accelerator's datapath a caller may override.

`array` names a preset; `float_overflow` maps some float formats to ``infinity`` or ``saturate``;
`zero_point` says whether zero points are corrected as ``initial`` values or ``after`` the sums (of
a preset, where its machine does); `block_rounding` is the rounding to block formats, where that is
not `rounding`; `feedback_p_format` is that of a residual input's P, by default `p_format`.
"""


class CaseOptions(TypedDict, total=False):
    """Keywords of every function that takes one case; `CaseSettings` says what they mean."""

    method: str
    preset: str
    seed: int
    smooth: float | None
    rotate: str | None
    condition: str | None
    finish: str | None
    tokens: int | None
    rows: int | None
    fused: bool
    kernel: str | None


@dataclass(frozen=True, kw_only=True)
class CaseSettings:
    """One combination of settings.

    Parameters
    ----------
    split : PrecisionSplit
        With its element family and group.
    method, preset, seed, smooth, rotate, condition, finish
        See `loraq_sim.solve`.
    tokens : int, optional
        Activation rows to use, spread evenly over the layer's; all by default.
    rows : int, optional
        Rows M of one model call; by default what the layer says.
    fused : bool
        Whether the branch runs inside the main kernel (cost model).
    kernel : str, optional
        Kernel family of the accelerator for every kernel (cost model); by default the one it gets.
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
    condition: str | None = None
    finish: str | None = None
    tokens: int | None = None
    rows: int | None = None
    fused: bool = True
    kernel: str | None = None
    datapath: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "rows"):
            object.__setattr__(self, name, checked_count(name, getattr(self, name)))

    @classmethod
    def of(
        cls,
        split: "str | PrecisionSplit",
        *,
        family: str = "int",
        group: int = 64,
        datapath: Mapping[str, Any] | None = None,
        **options: Unpack[CaseOptions],
    ) -> "CaseSettings":
        """The settings that a caller names; `family` and `group` are of a split given as text."""
        parsed = parse_split(split, family=family, group=group)
        return cls(split=parsed, datapath=datapath or {}, **options)

    def solving(self, excluded: tuple[str, ...] = ()) -> dict[str, Any]:
        """Arguments of `loraq_sim.solve` but the layer's own: hashable, in a fixed order.

        `excluded` is what a machine lacks of what a condition may choose.
        """
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
            "condition": self.condition,
            "finish": self.finish,
            **self._deflating(),
            **self._compared_with(),
            **({"excluded": excluded} if excluded and self.condition == "auto" else {}),
        }

    def _deflating(self) -> dict[str, Any]:
        """What a residual input adds."""
        if self.split.feedback is None:
            return {}
        return {"feedback": self.split.feedback}

    def _compared_with(self) -> dict[str, Any]:
        """What inputs are rounded to, for whatever is chosen by the error of outputs."""
        is_chosen = self.split.main_rule == AUTO
        chooses = (self.split.feedback, self.condition, self.finish) != (None, None, None)
        if not chooses and self.method not in FITTED_TO_INPUTS:
            # A grid that is left open is refused without a condition to choose it.
            return {"main_rule": self.split.main_rule} if is_chosen else {}
        return {
            "main_activation": self.split.main_activation,
            "branch_activation": self.split.branch_activation,
            "main_rule": self.split.main_rule,
            "branch_rule": self.split.branch_rule,
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


_RANGE = re.compile(r"(\d{1,4})\.\.(\d{1,4})(?::(\d{1,4}))?")


def grid_values(key: str, value: Any) -> Any:
    """`value` of a data path setting, or all values of a range: ``14..32``, ``16..32:4``.

    Raises
    ------
    InputError
        If a range is empty or of a setting that is no number.
    """
    if not isinstance(value, str) or ".." not in value:
        return value
    found = _RANGE.fullmatch(value.strip())
    if key not in ARRAY_KEYS or "overflow" in key or found is None:
        raise InputError(f"{key}={value!r:.80} is no range of whole numbers such as 14..32")
    low, high, step = int(found[1]), int(found[2]), int(found[3] or 1)
    if low > high or step < 1:
        raise InputError(f"{key}={value}: a range goes up, by a step from 1, such as 14..32:2")
    return tuple(range(low, high + 1, step))


def parse_array_grid(text: str) -> dict[str, tuple]:
    """Arrays of ``acc_bits=14..32,products_per_add=1,4,8,overflow=wrap``, by the keys `ARRAY_KEYS`.

    Raises
    ------
    InputError
        If the text is not of this form; which values an array may have is checked where it is made.
    """
    grid: dict[str, tuple] = {}
    key = ""
    for part in (part.strip() for part in text.split(",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if equals:
            key = name
            if key not in ARRAY_KEYS:
                raise InputError(unknown_name("array setting", key, ARRAY_KEYS))
            if key in grid:
                raise InputError(f"array grid {text!r:.80}: {key} stands there twice")
        else:
            value = name
        if not key or not value:
            raise InputError(
                f"array grid {text!r:.80} must look like acc_bits=14..32,overflow=wrap"
            )
        plain = int(value) if re.fullmatch(r"-?\d{1,9}", value) else value
        grid[key] = (*grid.get(key, ()), *as_tuple(grid_values(key, plain)))
    return {key: tuple(dict.fromkeys(values)) for key, values in grid.items()}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


# What SVDQuant's published recipes leave at 16 bits in PixArt and SANA (and, but for the adaLN
# weights, in FLUX): embeddings, modulation, text keys and values, depthwise convolutions, the ends.
SIXTEEN_BIT_KINDS = (
    *("patch_embed", "time_embed", "text_embed", "adaln_shared", "adaln_block", "cross_k"),
    *("cross_v", "cross_kv", "ffn_dwconv3x3", "norm_out", "proj_out"),
    *("resblock_conv", "resblock_shortcut", "sampler_conv", "transformer_proj"),
)

OVERRIDE_KEYS = {
    **{"rank": int, "budget": str, "split": str, "method": str, "preset": str},
    **{"family": str, "group": int, "smooth": float, "rotate": str},
    **{"condition": str, "finish": str},
}
"""Settings of an override; ``none`` ends an earlier smooth, rotate, condition or finish."""

NONE = "none"
_CAN_END = ("smooth", "rotate", "condition", "finish")
_WHAT = {int: "a whole number", float: "a number", str: "a text"}
# The last colon that an assignment follows: names and values may hold colons, too.
_OVERRIDE = re.compile(r"(?P<pattern>.+):(?P<settings>\s*\w+\s*=.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Override:
    """Settings for the layers whose name or kind matches `pattern`."""

    pattern: str
    settings: dict[str, Any]

    def matches(self, name: str, kind: str) -> bool:
        """Whether the layer is meant."""
        return matches(self.pattern, name, kind)


def matches(pattern: str, name: str, kind: str = "") -> bool:
    """Whether `pattern` is the name or the kind of a layer, or a shell pattern of one of them."""
    literal = pattern.replace("[", "[[]")
    return any(
        fnmatch.fnmatchcase(text, each) for each in (pattern, literal) for text in (name, kind)
    )


def parse_override(text: str) -> Override:
    """Parse ``PATTERN:key=value[,key=value]`` with the keys of `OVERRIDE_KEYS`.

    Raises
    ------
    InputError
        If the text is not of this form, or a key or value breaks a rule.
    """
    found = _OVERRIDE.fullmatch(text)
    pattern, _, assignments = text.rpartition(":")
    if found is not None:
        pattern, assignments = found["pattern"], found["settings"]
    if not pattern or not assignments:
        raise InputError(f"override {text!r} must look like '*.ff.*:rank=96'")
    settings: dict[str, Any] = {}
    for assignment in assignments.split(","):
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if key in OVERRIDE_KEYS and (not equals or not value):
            raise InputError(f"override {text!r}: {key} needs a value")
        settings[key] = value
    return checked_override(pattern, settings, f"override {text!r}")


def checked_override(pattern: str, settings: Mapping[str, Any], where: str) -> Override:
    """The override of `pattern`; values may be texts. Errors begin with `where`.

    Raises
    ------
    InputError
        If a key is unknown, a value is of the wrong type, or rank and budget are both given.
    """
    checked: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in OVERRIDE_KEYS:
            raise InputError(unknown_name("setting", key, OVERRIDE_KEYS) + f" (in {where})")
        kind = OVERRIDE_KEYS[key]
        if key in _CAN_END and value == NONE:
            checked[key] = None
            continue
        try:
            if isinstance(value, bool) or (kind is int and isinstance(value, float)):
                raise ValueError
            checked[key] = kind(value)
        except ValueError:
            raise InputError(f"{where}: {key} must be {_WHAT[kind]}, got {value!r}") from None
    if "rank" in checked and "budget" in checked:
        raise InputError(f"{where}: give either rank or budget")
    return Override(pattern=pattern, settings=checked)


def settings_of(
    name: str, kind: str, overrides: Iterable[Override], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings of one layer: `defaults`, then all overrides that match it, the later ones last."""
    merged = dict(defaults or {})
    for override in overrides:
        if override.matches(name, kind):
            merged = settings_with(merged, override.settings)
    return {k: None if k in _CAN_END and value == NONE else value for k, value in merged.items()}


def settings_with(settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with those of a later entry, whose split, rank or budget ends an earlier size."""
    earlier = dict(settings)
    if {"rank", "budget", "split"} & later.keys():
        earlier.pop("rank", None)
        earlier.pop("budget", None)
    return earlier | dict(later)


def skipped(name: str, kind: str, patterns: Iterable[str]) -> bool:
    """Whether a layer is left at 16 bits."""
    return any(matches(pattern, name, kind) for pattern in patterns)


def parse_rows(texts: Iterable[str]) -> dict[str, int]:
    """Rows per call by pattern, from texts such as ``4096`` (all layers) and ``cross_[kv]=300``.

    Raises
    ------
    InputError
        If a text is not of this form or a count is not a whole number from 1.
    """
    rows: dict[str, int] = {}
    for text in texts:
        pattern, _, count = text.strip().rpartition("=")
        if not re.fullmatch(r"[1-9]\d{0,11}", count.strip()) or (not pattern and "=" in text):
            raise InputError(
                f"rows {text!r} must be a whole number from 1, or PATTERN=NUMBER for the layers of "
                "that name or kind, such as 4096 or 'cross_[kv]=300'"
            )
        # A pattern that comes again counts where it stands last.
        rows.pop(pattern.strip() or "*", None)
        rows[pattern.strip() or "*"] = int(count)
    return rows


def rows_of(name: str, kind: str, rows: Mapping[str, int]) -> int | None:
    """Rows per call of one layer by the last pattern that matches it, None without one."""
    found = [count for pattern, count in rows.items() if matches(pattern, name, kind)]
    return found[-1] if found else None
