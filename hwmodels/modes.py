"""Which native MAC mode a precision runs in: its own, or the cheapest wider one.

Rules: a mode must take the element family and be wide enough for both operands, of which an
unsigned one needs a bit more where the mode takes signed codes only. A 16-bit float makes the
product a float one, and 16-bit integers need integer modes; other integers stay in integer modes
and use a float mode only where no integer mode is wide enough; float elements never run in integer
modes. Among those left the fastest wins, at its sustained rate and with the scaling of group sums
that the mode does not do itself; then the faster MAC, then the one with the least energy. Operands
narrower than their mode are widened on chip: free where the mode mixes widths or the load port
widens, else a pass of the vector unit.

`mode_of` alone decides: costs, `hw show` and the list of unreachable modes all ask it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hwmodels.description import Accelerator, Mode
from hwmodels.errors import AcceleratorError
from hwmodels.operands import FAMILIES, Operand, grouping_of
from hwmodels.workload import GemmWorkload

__all__ = [
    "check_transforms",
    "PARTS", "ModeChoice", "Part", "choose_mode", "describe_modes", "lacking_modes", "mode_of",
    "unreachable_modes",
]  # fmt: skip

# What a layer asks of a machine, by the name in its file: how it is called, and the way out.
_WAYS_OUT = {
    "hadamard": ("Hadamard rotation", "leave out rotate=, and condition='auto', which may rotate"),
    "smooth": ("smoothing", "leave out smooth= and condition=, which may smooth"),
    "residual": ("residual input", "write + for ~ in the split"),
}


def check_transforms(
    hw: Accelerator, transforms: tuple[str, ...], *, feedback_rank: int = 0
) -> None:
    """Refuse what a layer does to its inputs and the kernels of a machine do not.

    Parameters
    ----------
    hw : Accelerator
    transforms : tuple of str
        As in `GemmWorkload`; a ``shift`` is part of rounding, which every machine does.
    feedback_rank : int
        Components of a residual input.

    Raises
    ------
    AcceleratorError
        If the machine's file does not list one; the message says what to do.
    """
    asked = {name.rstrip("0123456789") for name in transforms}
    asked |= {"residual"} if feedback_rank else set()
    for name, (what, way_out) in _WAYS_OUT.items():
        if name in asked and name not in hw.transforms:
            has = ", ".join(hw.transforms) or "none"
            raise AcceleratorError(
                f"{hw.name} has no {what} (transforms in its file: {has}): {way_out}, or add "
                f"{name!r} to transforms if its kernels do it"
            )


Part = Literal["main", "branch_down", "branch_up", "feedback_down", "feedback_back"]
PARTS: dict[Part, str] = {
    "main": "main",
    "branch_down": "branch down (X R^T)",
    "branch_up": "branch up (P L^T)",
    "feedback_down": "residual input down (X V^T)",
    "feedback_back": "residual input back (P_f V)",
}
_INT_GROUP = 64  # Of the choice alone: what integers in groups usually have.


@dataclass(frozen=True, kw_only=True)
class ModeChoice:
    """The mode one GEMM runs in and what its operands pay to get there."""

    w_bits: int
    a_bits: int
    mode: Mode
    unpack_activations: bool
    unpack_weights: bool
    reason: str
    scales_itself: bool

    def combines(self, work: GemmWorkload, depth: int, operands: tuple[Operand, Operand]) -> int:
        """Vector operations per output element of a product of `depth`: scaling and zero points.

        A scaled addition per group, where the mode does not scale itself; a multiply-add that takes
        zero points off, per group and operand that has them. A mode for 16-bit floats has none of
        the latter: its operands are dequantized on the way in.
        """
        groupings = [work.grouping(bits) for bits in (self.w_bits, self.a_bits) if bits < 16]
        scaled = 0
        if not self.scales_itself and any(scale_bits for _, scale_bits in groupings):
            scaled = _n_groups(depth, [group for group, _ in groupings])
        n_corrected = sum(operand.needs_correction for operand in operands)
        if self.mode.is_wide_float or not n_corrected:
            return scaled
        groups = [work.grouping(operand.bits)[0] for operand in operands if not operand.is_float]
        return scaled + n_corrected * _n_groups(depth, groups)


def _n_groups(depth: int, sizes: list[int | None]) -> int:
    """Groups along `depth` under the smallest of `sizes`; None is one for all of it."""
    known = [size for size in sizes if size is not None]
    return -(-depth // min(known)) if known else 1


def mode_of(hw: Accelerator, work: GemmWorkload, part: Part) -> ModeChoice:
    """Mode in which a part of `work` runs on `hw`; P L^T takes P at its own width.

    Raises
    ------
    AcceleratorError
        If no mode of the accelerator is wide enough; where P is wider than the branch, the message
        says what makes it so.
    """
    if part == "main":
        return _kept(hw, *work.main_operands, work.family)
    w, a = work.branch_operands
    if part in ("branch_down", "feedback_down"):
        return _kept(hw, w, a, work.family)
    if part == "feedback_back":
        return _kept(hw, w, work.feedback_p_operand, work.family)
    try:
        choice = _kept(hw, work.up_weight_operand, work.p_operand, work.family)
        if w == work.up_weight_operand:
            return choice
        # L_w is stored narrower than L_f.
        unpacks = choice.unpack_weights or _pays(hw, w.bits, choice.mode.weight_bits, choice.mode)
        return replace(choice, unpack_weights=unpacks)
    except AcceleratorError as error:
        if work.p_operand == a:
            raise
        raise AcceleratorError(
            f"P L^T multiplies P of {work.p_operand} bits, as datapath.p_format "
            f"says, where the branch has {a}: {error}; p_format branch keeps it at {a}"
        ) from None


def choose_mode(hw: Accelerator, w_bits: int, a_bits: int, family: str = "int") -> ModeChoice:
    """Mode for weights of `w_bits` and activations of `a_bits` of `family` on `hw`.

    Raises
    ------
    AcceleratorError
        If no mode of the accelerator is wide enough.
    """
    return _kept(hw, Operand(w_bits), Operand(a_bits), family)


def _kept(hw: Accelerator, w: Operand, a: Operand, family: str) -> ModeChoice:
    key = ("mode", w, a, family)
    cache = hw._cache  # Private attributes of pydantic are slow to look up.
    if key not in cache:
        chip: Accelerator = cache.get("chip", hw)
        chosen = _choose(chip, w, a, family)
        if chip is not hw:
            # Under a kernel family the chip's mode runs, at the rate the family keeps up.
            mode = next(mode for mode in hw.modes if mode.name == chosen.mode.name)
            chosen = replace(chosen, mode=mode)
        cache[key] = chosen
    choice: ModeChoice = cache[key]
    return choice


def describe_modes(
    hw: Accelerator, main: str, *, branch: str | None = None, family: str = "int"
) -> list[dict[str, Any]]:
    """Rows saying which mode each part of a split uses and why, for `hw show`.

    Each row: part, precision, mode, macs_per_cycle_per_unit, unpacked (operand names), reason.
    P has the width that the file's `datapath.p_format` gives it. A part that no mode takes has
    mode ``refused``, no rate, and the error of `estimate_cost` as its reason.
    """
    rank = 0 if branch is None else 1
    work = GemmWorkload(
        m=1, n=1, k=1, main=main, branch=branch, rank=rank, p_bits=hw.datapath.p_bits, family=family
    )
    parts: list[Part] = ["main"] if branch is None else ["main", "branch_down", "branch_up"]
    return [_described(hw, work, part) for part in parts]


def lacking_modes(
    hw: Accelerator, splits: Mapping[str, tuple[str, str | None]], *, family: str = "int"
) -> list[str]:
    """Names of the splits, given as (main, branch), that `hw` has no MAC modes for.

    None if it has modes for no split at all: the error of `estimate_cost` is heard then.
    """
    lacking = []
    for name, (main, branch) in splits.items():
        rows = describe_modes(hw, main, branch=branch, family=family)
        if any(row["mode"] == "refused" for row in rows):
            lacking.append(name)
    return lacking if len(lacking) < len(splits) else []


def _described(hw: Accelerator, work: GemmWorkload, part: Part) -> dict[str, Any]:
    w, a = work.main_operands if part == "main" else work.branch_operands
    if part == "branch_up":
        a = work.p_operand
    row: dict[str, Any] = {"part": PARTS[part], "precision": f"W{w}A{a}"}
    try:
        choice = mode_of(hw, work, part)
    except AcceleratorError as error:
        row |= {"mode": "refused", "macs_per_cycle_per_unit": None}
        return row | {"unpacked": "", "reason": str(error)}
    pays = {"activations": choice.unpack_activations, "weights": choice.unpack_weights}
    unpacked = ", ".join(name for name, is_unpacked in pays.items() if is_unpacked) or "none"
    row |= {"mode": choice.mode.name, "macs_per_cycle_per_unit": choice.mode.macs_per_cycle}
    return row | {"unpacked": unpacked, "reason": choice.reason}


def unreachable_modes(hw: Accelerator) -> dict[str, str]:
    """Modes of `hw` that no precision of any family runs in, and why."""
    used = set()
    for family in FAMILIES:
        widths = (*range(2, 9), 16) if family == "int" else (4, 6, 8, 16)
        weights = [Operand(bits) for bits in widths]
        integers = [Operand(16, "i")] if family == "int" else []
        for w in weights:
            for a in (*weights, *integers):
                try:
                    used.add(_kept(hw, w, a, family).mode.name)
                except AcceleratorError:
                    continue
    return {mode.name: _why_unreachable(mode) for mode in hw.modes if mode.name not in used}


def _why_unreachable(mode: Mode) -> str:
    if mode.kind == "int" and mode.weight_bits > 8:
        return (
            "weights of 16 bits are fp16 or bf16 in every split, activations of 16 bits may be "
            "integers (A16i): a mode for narrower weights is faster or cheaper for those"
        )
    if mode.families is not None and not mode.families:
        return "families is empty: it multiplies nothing"
    return "another mode that takes the same operands is faster, or as fast for less energy"


def _choose(hw: Accelerator, w: Operand, a: Operand, family: str) -> ModeChoice:
    w_bits, a_bits = w.bits, a.bits
    is_float = w.is_float or a.is_float
    wide_enough = [
        mode
        for mode in hw.modes
        if mode.takes(family)
        and (mode.kind == "float" if is_float else True)
        and mode.holds(_multiplied(a, is_float), "activations")
        and mode.holds(_multiplied(w, is_float), "weights")
    ]
    if not wide_enough:
        raise AcceleratorError(_refusal(hw, w, a, family))
    integers = [mode for mode in wide_enough if mode.kind == "int"]
    # 6 and 8 bits of the family nvfp are MX elements with MX scales.
    scales = "mxfp" if family == "nvfp" and 4 not in (w_bits, a_bits) else family
    groups = [grouping_of(family, bits, _INT_GROUP)[0] for bits in (w_bits, a_bits)]
    block = min(group for group in groups if group is not None)

    def rank(mode: Mode) -> tuple[float, float, float]:
        cycles = _cycles_per_mac(hw, mode, None if scales in mode.scaled_families else block)
        return cycles, -mode.sustained_macs_per_cycle, mode.energy_pj_per_mac

    mode = min((integers if family == "int" else []) or wide_enough, key=rank)
    return ModeChoice(
        w_bits=w_bits,
        a_bits=a_bits,
        mode=mode,
        unpack_activations=_pays(hw, a_bits, mode.activation_bits, mode),
        unpack_weights=_pays(hw, w_bits, mode.weight_bits, mode),
        reason=_reason(hw, w, a, mode),
        scales_itself=mode.is_wide_float or scales in mode.scaled_families,
    )


def _multiplied(operand: Operand, is_float: bool) -> Operand:
    """What a mode multiplies: beside a 16-bit float, integers become floats, but for wide ones."""
    return operand if not is_float or operand.letter == "i" else Operand(operand.bits)


def _refusal(hw: Accelerator, w: Operand, a: Operand, family: str) -> str:
    listed = ", ".join(f"W{m.weight_bits}A{m.activation_bits} {m.kind}" for m in hw.modes)
    text = f"{hw.name} has no MAC mode wide enough for {family} W{w}A{a}; its modes: {listed}"
    if a.letter == "i":
        return f"{text}; 16-bit integers need an int mode of 16 bits: use A8, or A16 for floats"
    for operand, which, other in ((a, "activations", "A8z-3"), (w, "weights", "W8")):
        if operand.is_unsigned:
            text += (
                f"; unsigned {which} of {operand.bits} bits need a mode whose `unsigned` names "
                f"{which}, or one of {operand.bits + 1} bits: signed codes do with {other}"
            )
    return text


def _cycles_per_mac(hw: Accelerator, mode: Mode, block: int | None) -> float:
    """Cycles of the whole machine per MAC, with one scaled addition per `block` MACs or none.

    A 16-bit float mode counts as scaling too: its operands are scaled on the way in.
    """
    mac = 1 / (mode.sustained_macs_per_cycle * hw.units.count)
    if block is None:
        return mac
    combine = 1 / (block * hw.vector_rate("combine") * hw.units.vector_units)
    return max(mac, combine) if hw.vector.combine_overlaps_mac else mac + combine


def _pays(hw: Accelerator, bits: int, mode_bits: int, mode: Mode) -> bool:
    # The load port widens to the next power-of-two integer width, never to float.
    free = bits in hw.vector.load_widens_bits and mode.kind == "int"
    return bits != mode_bits and not free and not mode.mixes_widths


def _reason(hw: Accelerator, w: Operand, a: Operand, mode: Mode) -> str:
    w_bits, a_bits = w.bits, a.bits
    if (w_bits, a_bits) == (mode.weight_bits, mode.activation_bits):
        return "native"
    steps = []
    for what, bits, mode_bits in (
        ("activations", a_bits, mode.activation_bits),
        ("weights", w_bits, mode.weight_bits),
    ):
        if bits != mode_bits:
            pays = _pays(hw, bits, mode_bits, mode)
            how = "unpacked by the vector unit" if pays else "in the load"
            how = "by the mode itself" if mode.mixes_widths else how
            steps.append(f"{what} widened from {bits} to {mode_bits} bits {how}")
    return "no native mode, cheapest wider one: " + "; ".join(steps)
