"""Which native MAC mode a precision runs in: its own, or the cheapest wider one.

Rules: a mode must take the element family and be wide enough for both operands. An operand of 16
bits makes the product a float one; integers stay in integer modes and use a float mode only where
no integer mode is wide enough; float elements never run in integer modes. Among those left the
fastest (at its sustained rate) wins, then the one with the least energy. Operands narrower than
their mode are widened on chip: free where the mode mixes widths or the load port widens, else a
pass of the vector unit.
"""

from dataclasses import dataclass

from hwmodels.description import Accelerator, Mode
from hwmodels.errors import AcceleratorError
from hwmodels.workload import parse_precision

__all__ = ["ModeChoice", "choose_mode", "describe_modes"]


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


def choose_mode(hw: Accelerator, w_bits: int, a_bits: int, family: str = "int") -> ModeChoice:
    """Mode for weights of `w_bits` and activations of `a_bits` of `family` on `hw`.

    Raises
    ------
    AcceleratorError
        If no mode of the accelerator is wide enough.
    """
    key = ("mode", w_bits, a_bits, family)
    if key not in hw._cache:
        hw._cache[key] = _choose(hw, w_bits, a_bits, family)
    return hw._cache[key]


def describe_modes(
    hw: Accelerator, main: str, branch: str | None = None, *, family: str = "int"
) -> list[dict]:
    """Rows saying which mode each part of a split uses and why, for `hw show`.

    Each row: part, precision, mode, macs_per_cycle_per_unit, unpacked (operand names), reason.
    The up-projection's activations are P, in the branch's activation format.
    """
    parts = [("main", main)]
    if branch is not None:
        parts += [("branch down (X R^T)", branch), ("branch up (P L^T)", branch)]
    rows = []
    for part, precision in parts:
        choice = choose_mode(hw, *parse_precision(precision), family)
        unpacked = [
            name
            for name, pays in (
                ("activations", choice.unpack_activations),
                ("weights", choice.unpack_weights),
            )
            if pays
        ]
        rows.append(
            {
                "part": part,
                "precision": precision,
                "mode": choice.mode.name,
                "macs_per_cycle_per_unit": choice.mode.macs_per_cycle,
                "unpacked": ", ".join(unpacked) or "none",
                "reason": choice.reason,
            }
        )
    return rows


def _choose(hw: Accelerator, w_bits: int, a_bits: int, family: str) -> ModeChoice:
    widest = max(w_bits, a_bits)
    wide_enough = [
        mode
        for mode in hw.modes
        if mode.activation_bits >= a_bits
        and mode.weight_bits >= w_bits
        and mode.takes(family)
        and (mode.kind == "float" or widest <= 8)
    ]
    if not wide_enough:
        listed = ", ".join(f"W{m.weight_bits}A{m.activation_bits} {m.kind}" for m in hw.modes)
        raise AcceleratorError(
            f"{hw.name} has no MAC mode wide enough for {family} W{w_bits}A{a_bits}; "
            f"its modes: {listed}"
        )
    integers = [mode for mode in wide_enough if mode.kind == "int"]
    mode = min(
        (integers if family == "int" else []) or wide_enough,
        key=lambda m: (-m.sustained_macs_per_cycle, m.energy_pj_per_mac),
    )
    # 6 and 8 bits of the family nvfp are MX elements with MX scales.
    scales = "mxfp" if family == "nvfp" and 4 not in (w_bits, a_bits) else family
    return ModeChoice(
        w_bits=w_bits,
        a_bits=a_bits,
        mode=mode,
        unpack_activations=_pays(hw, a_bits, mode.activation_bits, mode),
        unpack_weights=_pays(hw, w_bits, mode.weight_bits, mode),
        reason=_reason(hw, w_bits, a_bits, mode),
        scales_itself=mode.is_wide_float or scales in mode.scaled_families,
    )


def _pays(hw: Accelerator, bits: int, mode_bits: int, mode: Mode) -> bool:
    # The load port widens to the next power-of-two integer width, never to float.
    free = bits in hw.vector.load_widens_bits and mode.kind == "int"
    return bits != mode_bits and not free and not mode.mixes_widths


def _reason(hw: Accelerator, w_bits: int, a_bits: int, mode: Mode) -> str:
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
