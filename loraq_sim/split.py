"""Precision splits: which formats the main branch and the low-rank branch of a layer use.

``W4A4``                no branch
``W4A4+W8A8r64``        branch of rank 64 with 8-bit factors and 8-bit activations
``W4A4+W8A8@fp16r32``   branch W8A8 of the largest rank that fits the bytes of a 16-bit rank-32 one
``W4A4~W8A8r62f31``     31 of the 62 components deflate the input (`loraq_sim.solvers.residual`)
``W4A4~W8A8@fp16r32``   the same, with the share of the rank that does best on the layer's inputs

A letter behind the width of activations, of either part, says how they round (family ``int``):

``A4``     symmetric: the largest magnitude of a group lands on 7
``A4s``    signed scale: the extreme value of a group lands on -8, so that scales carry a sign
``A4u``    asymmetric: unsigned codes, and a zero point for each group that its values choose
``A4u8``   the same with one fixed zero point, here 8: the code that stands for 0; ``A8z-3`` with
           signed codes
``A4a``    A4, A4s or A4u, whichever ``condition="auto"`` finds best for the layer
``A4g``    as A4, and in layers that follow GELU unsigned codes of x + 0.171875: GELU stays above
           -0.17, so that no code is wasted; the bias takes the shift back (nunchaku). ``A4sg`` also
``A16i``   16-bit integers; A16 are 16-bit floats

Weights may be unsigned with zero points, too: ``W4uA8``. A format in brackets replaces the one that
its width stands for: ``W4A4[uint4/row]`` has one zero point per token, ``A8[uint8/tensor]`` one for
all; ``A4[uint4/g64/fp16/z0+0.171875]`` shifts in every layer.

The text of a split says what runs: a format that was replaced in Python is written out in the same
way. What a branch takes in bytes, and the rank that fits a budget of them, follow from its format.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import ELEMENTS, Format, parse_format

if TYPE_CHECKING:
    from loraq_sim.layers import Layer

__all__ = [
    *("AUTO", "FAMILIES", "FITTED_TO_INPUTS", "GELU_SHIFT", "PrecisionSplit", "WITHOUT_BRANCH"),
    *("branch_bytes", "feedback_format", "feedback_left_format", "grid_letter"),
    *("parse_split", "rank_for_budget", "unsigned"),
]

WITHOUT_BRANCH = ("rtn", "gptq")
"""Methods that make no branch, whatever the split."""
FITTED_TO_INPUTS = ("lrc", "quad", "resq")
"""Methods that see how inputs are rounded."""

# Element of each width by family; one line a family. 16 bits are fp16 in every family.
_ELEMENTS = {
    "int": {bits: f"int{bits}" for bits in range(2, 9)},
    "mxint": {4: "mxint4", 6: "mxint6", 8: "mxint8"},
    "mxfp": {4: "mxfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"},
    "nvfp": {4: "nvfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"},
}
FAMILIES = tuple(_ELEMENTS)

GELU_SHIFT = 0.171875
"""What nunchaku adds behind GELU, whose least value is -0.16997, before it rounds unsigned."""

_BRACKET = r"(?:\[[^\]]*\])?"
_PART = rf"w(\d{{1,3}}u?{_BRACKET})a(\d{{1,3}}(?:u\d{{0,3}}|z-?\d{{1,3}}|sg?|[agi])?{_BRACKET})"
_OPERAND = re.compile(r"(\d{1,3})([a-z]*)(-?\d*)(?:\[([^\]]*)\])?")
_SHIFTED = re.compile(r"(.*?)(?:\+(\d{1,4}(?:\.\d{1,12})?))?")
_BUDGET = re.compile(r"([a-z0-9_/]+)@([1-9]\d{0,6})")
_SPLIT = re.compile(
    rf"{_PART}(?:([+~]){_PART}(?:r(\d{{1,6}})|@(fp16|bf16)r(\d{{1,6}}))(?:f(\d{{1,6}}))?)?"
)

AUTO = "auto"
"""What a layer's inputs decide: the share of a residual input, or, as a scale rule, the grid."""

_RULES = {"s": "signed_absmax", "a": AUTO}
_RULE_LETTERS = {rule: letter for letter, rule in _RULES.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class PrecisionSplit:
    """Formats of one split.

    ``rank`` is set for ``rN``; ``budget`` (such as ``"fp16@32"``) for ``@fp16rN``; both are None
    without a branch. ``feedback`` is None for ``+``; for ``~`` the number of components after
    ``f``, or ``"auto"``. ``main`` and ``branch`` are short names such as ``"W4A8"``. They and
    ``text`` follow from the formats, also where `dataclasses.replace` changed one. ``main_rule``
    and ``branch_rule`` are the scale rules of activations, ``absmax`` or ``signed_absmax``.
    ``shift`` is added to what the main branch rounds, and taken back by the bias; with ``gelu`` it
    and ``main_rule`` ``"auto"`` it depends on the layer (`for_layer`).
    """

    text: str = field(init=False)
    family: str
    group: int
    main: str = field(init=False)
    main_weight: Format
    main_activation: Format
    branch: str | None = field(init=False)
    branch_weight: Format | None = None
    branch_activation: Format | None = None
    rank: int | None = None
    budget: str | None = None
    feedback: int | str | None = None
    main_rule: str = "absmax"
    branch_rule: str = "absmax"
    shift: float = 0.0
    gelu: bool = False

    def __post_init__(self) -> None:
        main, branch = self._part("main"), None
        text = self._label("main")
        if self.branch_weight is not None:
            branch = self._part("branch")
            text += f"{'+' if self.feedback is None else '~'}{self._label('branch')}"
            if self.budget is not None:
                text += "@{}r{}".format(*self.budget.split("@"))
            elif self.rank is not None:
                text += f"r{self.rank}"
            if isinstance(self.feedback, int):
                text += f"f{self.feedback}"
        for name, value in (("main", main), ("branch", branch), ("text", text)):
            object.__setattr__(self, name, value)

    def _part(self, name: str) -> str:
        weight, activation = getattr(self, f"{name}_weight"), getattr(self, f"{name}_activation")
        return f"W{weight.element.bits}A{activation.element.bits}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The parts of `text`: main and, with one, the branch without its size."""
        main = self._label("main")
        return (main,) if self.branch_weight is None else (main, self._label("branch"))

    @property
    def costed(self) -> tuple[str, str | None]:
        """Main and branch as the cost model takes them: widths, with the letters that cost."""
        parts = [(self.main_weight, self.main_activation)]
        if self.branch_weight is not None and self.branch_activation is not None:
            parts.append((self.branch_weight, self.branch_activation))
        texts = [f"W{w.element.bits}{w.letter}A{a.element.bits}{a.letter}" for w, a in parts]
        # Of the grids that may be chosen, zero points cost most.
        texts[0] += "u" if self.main_rule == AUTO else ""
        return texts[0], texts[1] if len(texts) > 1 else None

    def _label(self, name: str) -> str:
        weight, activation = getattr(self, f"{name}_weight"), getattr(self, f"{name}_activation")
        is_main = name == "main"
        letters = _RULE_LETTERS.get(getattr(self, f"{name}_rule"), "")
        letters += "g" if self.gelu and is_main else ""
        shift = self.shift if is_main else 0.0
        return f"W{self._written(weight)}A{self._written(activation, letters, shift)}"

    def _written(self, fmt: Format, letters: str = "", shift: float = 0.0) -> str:
        """Bits and letters of a format that they stand for; else the format as well."""
        bits = fmt.element.bits
        if not shift:
            for short in ("", "u", f"u{fmt.zero}", f"z{fmt.zero}", "i"):
                if _usual(bits, short, self.family, self.group) == fmt:
                    return f"{bits}{short}{letters}"
        return f"{bits}{letters}[{fmt}{f'+{shift:g}' if shift else ''}]"

    def for_layer(self, layer: "Layer", stored: Any = None) -> "PrecisionSplit":
        """The split as `layer` runs it: what ``g`` asks for, where its inputs are what GELU left.

        Not where `stored`, the solution, rotates or deflates them. For ``a``, the grid it chose.
        """
        if self.main_rule == AUTO:
            grid = getattr(stored, "grid", None)
            if grid is None:
                raise InputError(f"split {self}: the solution does not say which grid it chose")
            fmt = unsigned(self.main_activation) if grid == "u" else self.main_activation
            return replace(self, main_activation=fmt, main_rule=_RULES.get(grid, "absmax"))
        mixed = [getattr(stored, part, None) for part in ("rotation", "feedback")]
        is_mixed = any(part is not None for part in mixed)
        return self.after_gelu(self.gelu and not is_mixed and layer.follows_gelu)

    def after_gelu(self, follows_gelu: bool) -> "PrecisionSplit":
        """What ``g`` asks for, in a layer that follows GELU, or in another."""
        if not self.gelu or not follows_gelu:
            return replace(self, gelu=False) if self.gelu else self
        fmt = replace(unsigned(self.main_activation), zero=0)
        shift = GELU_SHIFT
        return replace(self, main_activation=fmt, main_rule="absmax", shift=shift, gelu=False)

    @property
    def has_branch(self) -> bool:  # A low-rank one.
        return self.branch is not None

    def sized(self, *, rank: int | None = None, budget: str | None = None) -> "PrecisionSplit":
        """The same formats with a branch of `rank`, or of a `budget` such as ``"fp16@32"``."""
        size = f"r{rank}" if budget is None else "@" + budget.replace("@", "r")
        joint = "+" if self.feedback is None else "~"
        spent = f"f{self.feedback}" if isinstance(self.feedback, int) else ""
        asked = parse_split(f"W4A4{joint}W4A4{size}{spent}")
        return replace(self, rank=asked.rank, budget=asked.budget)

    def ranks(self, n: int, k: int) -> tuple[int, int]:
        """Components of the branch of a weight (N, K), and of its residual input (auto: half)."""
        if self.branch_weight is None:
            return 0, 0
        feedback = self.feedback

        def spent(rank: int) -> int:
            return min(feedback or 0, rank) if not isinstance(feedback, str) else rank // 2

        rank = self.rank
        if self.budget is not None:
            rank = rank_for_budget(n, k, self.branch_weight, self.budget, spent)
        return rank or 0, spent(rank or 0)

    def __repr__(self) -> str:
        return f"PrecisionSplit({self.text!r}, family={self.family!r}, group={self.group})"

    def __str__(self) -> str:
        return self.text


def parse_split(
    text: "str | PrecisionSplit", *, family: str = "int", group: int = 64
) -> PrecisionSplit:
    """Parse a split such as ``"W4A4+W8A8r64"``; a `PrecisionSplit` is returned as it is.

    Parameters
    ----------
    text : str
        Widths are 2 to 8 bits (``int``) or 4, 6 and 8 (other families), or 16 for fp16.
    family : str
        Of every element narrower than 16 bits.
    group : int
        Elements per scale along K, and along the rank for L, of the family ``int`` alone.

    Raises
    ------
    InputError
        If the text, the family or the group breaks a rule.
    """
    if isinstance(text, PrecisionSplit):
        return text
    if family not in FAMILIES:
        raise InputError(unknown_name("element family", family, FAMILIES))
    if isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= 99_999_999:
        raise InputError(f"group must be an integer from 1 to 99999999, got {group!r}")
    match = _SPLIT.fullmatch("".join(str(text).split()).lower())
    if match is None:
        raise InputError(
            f"split {str(text)!r:.100} is not understood; write for example W4A4 (no branch), "
            "W4A4+W8A8r64 (rank 64), W4A4+W8A8@fp16r32 (the bytes of a 16-bit rank-32 branch) or "
            "W4A4~W8A8@fp16r32 (with a residual input); activations may be A4s, A4u, A4a, A4u8, "
            "A4g, A4sg, A16i or A4[format]"
        )
    main_w, main_a, joint, branch_w, branch_a, rank, budget_format, budget_rank, spent = (
        match.groups()
    )
    read = _Reader(str(text), family, group)
    activation = read.activation(main_a)
    plain_split = PrecisionSplit(
        family=family,
        group=group,
        main_weight=read.weight(main_w),
        main_activation=activation.format,
        main_rule=activation.rule,
        shift=activation.shift,
        gelu=activation.gelu,
    )
    if branch_w is None:
        return plain_split
    size = int(rank if rank is not None else budget_rank)
    if size == 0:
        raise InputError(
            f"split {str(text)!r:.100}: rank must be at least 1; write {plain_split} instead"
        )
    in_branch = read.activation(branch_a)
    if in_branch.gelu or in_branch.shift or in_branch.rule == AUTO:
        raise InputError(
            f"split {str(text)!r:.100}: the shift after GELU is for the main branch, and so is an "
            "open grid (a); the branch reads X as it is, so write its activations without"
        )
    return replace(
        plain_split,
        branch_weight=read.weight(branch_w),
        branch_activation=in_branch.format,
        branch_rule=in_branch.rule,
        rank=None if rank is None else size,
        budget=None if rank is not None else f"{budget_format}@{size}",
        feedback=_feedback(joint, spent, None if rank is None else size, text),
    )


def _feedback(joint: str, spent: str | None, rank: int | None, text: str) -> "int | str | None":
    if joint == "+":
        if spent is not None:
            raise InputError(
                f"split {str(text)!r:.100}: f{spent} is a part of a residual input; write ~ in "
                "place of +"
            )
        return None
    if spent is None:
        return AUTO
    if int(spent) == 0:
        raise InputError(f"split {str(text)!r:.100}: f must be at least 1; write + in place of ~")
    if rank is not None and int(spent) > rank:
        raise InputError(
            f"split {str(text)!r:.100}: f{spent} is more than the {rank} components of the branch"
        )
    return int(spent)


class _Operand(NamedTuple):
    """How one operand is stored, its scale rule, and what is added before it is rounded."""

    format: Format
    rule: str = "absmax"
    shift: float = 0.0
    gelu: bool = False


@dataclass(frozen=True)
class _Reader:
    """Operands of one split's text, in its family and group."""

    text: str
    family: str
    group: int

    def weight(self, written: str) -> Format:
        """Weights: bits, ``u`` for zero points, or a format in brackets."""
        found = self.activation(written)
        if found.format.element.name == "int16" or found.rule != "absmax" or found.shift:
            raise self._wrong("weights have 2 to 8 bits, or 16 as floats: W16")
        return found.format

    def activation(self, written: str) -> _Operand:
        """Activations: bits, a letter, or a format in brackets."""
        match = _OPERAND.fullmatch(written)
        if match is None:
            raise self._wrong(f"{written} is not understood")
        bits, letters, number, bracket = match.groups()
        width = int(bits)
        if bracket is not None:
            return self._in_brackets(width, letters, bracket)
        if not letters:
            return _Operand(self._plain(width))
        found = _usual(width, letters + (number or ""), self.family, self.group)
        if found is not None:
            return _Operand(found)
        if self.family != "int":
            raise self._wrong(
                f"{written}: zero points, signed scales and 16-bit integers are for the family "
                f"int, got {self.family!r}; drop the {letters!r}"
            )
        if letters == "i":
            raise self._wrong(f"A{written}: i is for 16-bit integers; write A16i, or A{width}")
        if not 2 <= width <= 8:
            raise self._wrong(
                f"A{written}: A{width} are floats without a scale; zero points and signed scales "
                "are for 2 to 8 bits, 16-bit integers are A16i"
            )
        if letters in ("u", "z"):
            element = ELEMENTS[f"{'u' * (letters == 'u')}int{width}"]
            raise self._wrong(
                f"A{written}: zero point {number} is outside the codes of {element.name} "
                f"({element.lo}..{element.hi})"
            )
        rule = _RULES.get(letters[0], "absmax")
        return _Operand(self._plain(width), rule, gelu="g" in letters)

    def _plain(self, width: int) -> Format:
        fmt = _usual(width, "", self.family, self.group)
        if fmt is None:
            widths = ", ".join(map(str, _ELEMENTS[self.family]))
            raise self._wrong(
                f"widths of family {self.family!r} must be {widths} or 16 bits, got {width}"
            )
        return fmt

    def _in_brackets(self, width: int, letters: str, bracket: str) -> _Operand:
        name, shift = _SHIFTED.fullmatch(bracket).groups()  # type: ignore[union-attr]
        fmt = parse_format(name)
        if fmt.element.bits != width:
            raise self._wrong(
                f"[{name}] has {fmt.element.bits} bits, got {width} before it; the two must agree"
            )
        if letters not in ("", "s", "g", "sg"):
            raise self._wrong(f"drop {letters!r} before [{name}]: the format says it")
        if letters and (not fmt.element.is_integer or fmt.has_zero_point):
            raise self._wrong(f"drop {letters!r} before [{name}]: it is for symmetric integers")
        if shift is not None and fmt.element.is_plain_float:
            raise self._wrong(f"[{bracket}]: {name} needs no shift, it has no grid to fit")
        rule = "signed_absmax" if "s" in letters else "absmax"
        return _Operand(fmt, rule, float(shift or 0), gelu="g" in letters)

    def _wrong(self, reason: str) -> InputError:
        return InputError(f"split {self.text!r:.100}: {reason}")


def _usual(width: int, letters: str, family: str, group: int) -> Format | None:
    """The format that a width and a letter stand for, None where they stand for none."""
    if not letters:
        if width == 16:
            return parse_format("fp16")
        element = _ELEMENTS[family].get(width)
        if element is None:
            return None
        return parse_format(f"{element}/g{group}" if family == "int" else element)
    if family != "int":
        return None
    if letters == "i":
        return parse_format(f"int16/g{group}") if width == 16 else None
    if not 2 <= width <= 8 or letters[0] not in "uz":
        return None
    fmt = parse_format(f"{'u' * (letters[0] == 'u')}int{width}/g{group}")
    if letters == "u":
        return fmt
    try:
        zero = int(letters[1:])
    except ValueError:
        return None
    is_code = fmt.element.lo <= zero <= fmt.element.hi
    return replace(fmt, zero=zero) if is_code else None


_FEEDBACK_BLOCK = 64
_SHORT_ROW = 1 / 8  # Of a group, which a row of L_f must exceed to have scales of its own.


def feedback_format(branch: Format) -> Format:
    """How V is stored beside a branch in `branch`: a scale per block serves X V^T and P V alike."""
    if branch.scale is None:
        return branch
    size = _FEEDBACK_BLOCK if branch.element.block is None else branch.group_size
    return replace(branch, granularity="block", group_size=size)


def feedback_left_format(branch: Format, feedback_rank: int) -> Format:
    """How L_f is stored: as the branch is, integers in 8 bits, few components in blocks like V.

    P_f is loud and the rounding of L_f not fed back. Scales of short rows would cost a component.
    """
    element, size = branch.element, branch.group_size or 0
    if element.block or not element.is_integer or not element.is_signed:
        return branch
    wide = replace(branch, element=ELEMENTS["int8"])
    is_long = branch.granularity != "group" or feedback_rank > _SHORT_ROW * size
    return wide if is_long else feedback_format(wide)


def unsigned(fmt: Format) -> Format:
    """Integers of the same bits with a zero point per group."""
    return replace(fmt, element=ELEMENTS[f"u{fmt.element.name}"])


def grid_letter(fmt: Format, rule: str) -> str:
    """The letter behind the width of activations in `fmt` with this scale rule, such as ``u``."""
    return _RULE_LETTERS.get(rule, fmt.letter)


def branch_bytes(n: int, k: int, rank: int, fmt: Format, feedback_rank: int = 0) -> int:
    """Stored bytes of a branch of `rank` in `fmt`, of which the residual input has `feedback_rank`.

    L (n, r) and R (r, k) of the others; V and L_f in formats of their own. 0 for rank 0.
    """
    total, others = 0, rank - feedback_rank
    if others:
        total += fmt.storage_bytes((n, others)) + fmt.storage_bytes((others, k))
    if feedback_rank:
        total += feedback_left_format(fmt, feedback_rank).storage_bytes((n, feedback_rank))
        total += feedback_format(fmt).storage_bytes((feedback_rank, k))
    return total


def rank_for_budget(
    n: int,
    k: int,
    fmt: Format,
    budget: str,
    feedback_of: Callable[[int], int] = lambda rank: 0,
) -> int:
    """Largest rank, of min(n, k), whose branch in `fmt` takes no more bytes than `budget`.

    ``"fp16@32"``: the bytes of a rank-32 branch in fp16. `feedback_of` says how many components of
    a rank the residual input has. InputError if `budget` is malformed or less than one rank takes.
    """
    match = _BUDGET.fullmatch(str(budget).strip().lower())
    if match is None:
        raise InputError(f"budget must look like 'fp16@32' (format@rank), got {budget!r}")
    allowed = branch_bytes(n, k, int(match.group(2)), parse_format(match.group(1)))
    low, high = 0, min(n, k)
    # Bytes grow with the rank, whatever the residual input has of it.
    while low < high:
        middle = (low + high + 1) // 2
        if branch_bytes(n, k, middle, fmt, feedback_of(middle)) <= allowed:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise InputError(
            f"budget {budget!r} is {allowed} bytes for a weight of shape ({n}, {k}), less than the "
            f"{branch_bytes(n, k, 1, fmt, feedback_of(1))} bytes of a rank-1 branch in {fmt}"
        )
    return low
