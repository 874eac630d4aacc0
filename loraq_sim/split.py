"""Precision splits: which formats the main branch and the low-rank branch of a layer use.

``W4A4``                no branch
``W4A4+W8A8r64``        branch of rank 64 with 8-bit factors and 8-bit activations
``W4A4+W8A8@fp16r32``   branch W8A8 of the largest rank that fits the bytes of a 16-bit rank-32 one
``W4A4~W8A8r62f31``     31 of the 62 components deflate the input (`loraq_sim.solvers.residual`)
``W4A4~W8A8@fp16r32``   the same, with the share of the rank that does best on the layer's inputs

The text of a split says what runs. A format that was replaced in Python is written out where it is
not the one its width stands for: ``W4A4u`` for zero points in the split's own groups, else the
format in brackets, as in ``W4A4[uint4/row/fp16]``. What a branch takes in bytes, and the rank that
fits a budget of them, follow from its format.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, parse_format

__all__ = [
    "FAMILIES",
    "PrecisionSplit",
    "branch_bytes",
    "feedback_format",
    "parse_split",
    "rank_for_budget",
]

# Element of each width by family; one line a family. 16 bits are fp16 in every family.
_ELEMENTS = {
    "int": {bits: f"int{bits}" for bits in range(2, 9)},
    "mxint": {4: "mxint4", 6: "mxint6", 8: "mxint8"},
    "mxfp": {4: "mxfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"},
    "nvfp": {4: "nvfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"},
}
FAMILIES = tuple(_ELEMENTS)

_PART = r"w(\d{1,3})a(\d{1,3})"
_BUDGET = re.compile(r"([a-z0-9_/]+)@([1-9]\d{0,6})")
_SPLIT = re.compile(
    rf"{_PART}(?:([+~]){_PART}(?:r(\d{{1,6}})|@(fp16|bf16)r(\d{{1,6}}))(?:f(\d{{1,6}}))?)?"
)

AUTO = "auto"
"""The residual input takes the share of the rank that does best on the layer's inputs."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSplit:
    """Formats of one split.

    ``rank`` is set for ``rN``; ``budget`` (such as ``"fp16@32"``) for ``@fp16rN``; both are None
    without a branch. ``feedback`` is None for ``+``; for ``~`` the number of components after
    ``f``, or ``"auto"``. ``main`` and ``branch`` are short names such as ``"W4A8"``. They and
    ``text`` follow from the formats, also where `dataclasses.replace` changed one.
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

    def _label(self, name: str) -> str:
        weight, activation = getattr(self, f"{name}_weight"), getattr(self, f"{name}_activation")
        return f"W{self._written(weight)}A{self._written(activation)}"

    def _written(self, fmt: Format) -> str:
        """Bits of a format that the family gives that width; else the format as well."""
        bits = fmt.element.bits
        try:
            usual = _format(str(bits), self.family, self.group, "")
        except InputError:
            usual = None
        if fmt == usual:
            return str(bits)
        if fmt == _with_zero_points(bits, self.group):
            return f"{bits}u"
        return f"{bits}[{fmt}]"

    @property
    def has_branch(self) -> bool:
        """Whether the split has a low-rank branch."""
        return self.branch is not None

    def sized(self, *, rank: int | None = None, budget: str | None = None) -> "PrecisionSplit":
        """The same formats with a branch of `rank`, or of a `budget` such as ``"fp16@32"``.

        Raises
        ------
        InputError
            If the size breaks a rule of a split's text.
        """
        size = f"r{rank}" if budget is None else "@" + budget.replace("@", "r")
        joint = "+" if self.feedback is None else "~"
        spent = f"f{self.feedback}" if isinstance(self.feedback, int) else ""
        asked = parse_split(f"W4A4{joint}W4A4{size}{spent}")
        return replace(self, rank=asked.rank, budget=asked.budget)

    def ranks(self, n: int, k: int) -> tuple[int, int]:
        """Components of the branch of a weight (N, K), and how many the residual input takes.

        Where the layer's inputs decide (``"auto"``), half is assumed; a solved layer knows.
        """
        if self.branch_weight is None:
            return 0, 0
        feedback = self.feedback

        def spent(rank: int) -> int:
            return min(feedback or 0, rank) if not isinstance(feedback, str) else rank // 2

        rank = self.rank
        if self.budget is not None:
            rank = rank_for_budget(n, k, self.branch_weight, self.budget, spent)
        return rank or 0, spent(rank or 0)

    def __str__(self) -> str:
        return self.text


def parse_split(
    text: "str | PrecisionSplit", *, family: str = "int", group: int = 64
) -> PrecisionSplit:
    """Parse a split such as ``"W4A4+W8A8r64"``; a `PrecisionSplit` is returned as it is.

    Parameters
    ----------
    text : str
        The split. Widths are 2 to 8 bits (``int``) or 4, 6 and 8 (other families), or 16 for fp16.
    family : str
        Element family of everything narrower than 16 bits.
    group : int
        Elements per scale along K (weights and activations alike), and along the rank for L, of
        the family ``int``. The others bring their own.

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
            "W4A4~W8A8@fp16r32 (with a residual input)"
        )
    main_w, main_a, joint, branch_w, branch_a, rank, budget_format, budget_rank, spent = (
        match.groups()
    )
    plain_split = PrecisionSplit(
        family=family,
        group=group,
        main_weight=_format(main_w, family, group, text),
        main_activation=_format(main_a, family, group, text),
    )
    if branch_w is None:
        return plain_split
    size = int(rank if rank is not None else budget_rank)
    if size == 0:
        plain = f"W{int(main_w)}A{int(main_a)}"
        raise InputError(
            f"split {str(text)!r:.100}: rank must be at least 1; write {plain} instead"
        )
    return replace(
        plain_split,
        branch_weight=_format(branch_w, family, group, text),
        branch_activation=_format(branch_a, family, group, text),
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


def _with_zero_points(bits: int, group: int) -> Format | None:
    return parse_format(f"uint{bits}/g{group}") if 2 <= bits <= 8 else None


def _format(bits: str, family: str, group: int, text: str) -> Format:
    width = int(bits)
    if width == 16:
        return parse_format("fp16")
    element = _ELEMENTS[family].get(width)
    if element is None:
        widths = ", ".join(map(str, _ELEMENTS[family]))
        raise InputError(
            f"split {str(text)!r:.100}: widths of family {family!r} must be {widths} or 16 bits, "
            f"got {width}"
        )
    return parse_format(f"{element}/g{group}" if family == "int" else element)


_FEEDBACK_BLOCK = 64


def feedback_format(branch: Format) -> Format:
    """How directions V are stored beside a branch in `branch`: scales per block of 64 x 64.

    One stored V then serves X V^T and P V alike. Groups that block elements bring along become
    blocks of that size; 16-bit floats stay as they are.
    """
    if branch.scale is None:
        return branch
    size = _FEEDBACK_BLOCK if branch.element.block is None else branch.group_size
    return replace(branch, granularity="block", group_size=size)


def branch_bytes(n: int, k: int, rank: int, fmt: Format, feedback_rank: int = 0) -> int:
    """Stored bytes of a branch of `rank` in `fmt`, of which the residual input has `feedback_rank`.

    L (n, r) and R (r, k) of the other components; V (feedback_rank, k) in `feedback_format` and
    L_f (n, feedback_rank). 0 for rank 0.
    """
    total, others = 0, rank - feedback_rank
    if others:
        total += fmt.storage_bytes((n, others)) + fmt.storage_bytes((others, k))
    if feedback_rank:
        total += fmt.storage_bytes((n, feedback_rank))
        total += feedback_format(fmt).storage_bytes((feedback_rank, k))
    return total


def rank_for_budget(
    n: int,
    k: int,
    fmt: Format,
    budget: str,
    feedback_of: Callable[[int], int] = lambda rank: 0,
) -> int:
    """Largest rank whose branch in `fmt` takes no more bytes than `budget`.

    Parameters
    ----------
    n, k : int
        Shape of the weight.
    fmt : Format
        Format of both factors.
    budget : str
        ``"fp16@32"``: the bytes of a rank-32 branch stored as fp16. The rank is at most min(n, k).
    feedback_of : callable
        How many components of a rank the residual input has.

    Raises
    ------
    InputError
        If `budget` is malformed or too small for one rank.
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
