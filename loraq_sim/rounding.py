"""Names, meanings and register codes of rounding and saturation modes (shift-round-saturate).

The names are those of ``aie::rounding_mode``. The increments follow the table of AMD UG1583 and
``aie_api`` (AIE-ML, AIE2P). The two AI Engine generations number the same modes differently, so a
raw code means nothing without its generation: use `rounding_code` and `rounding_from_code`.
"""

from enum import StrEnum

from loraq_sim.errors import InputError, unknown_name

__all__ = [
    "Rounding",
    "Saturation",
    "parse_rounding",
    "parse_saturation",
    "rounding_code",
    "rounding_from_code",
]


class Rounding(StrEnum):
    """How the bits dropped by a right shift decide the last bit kept.

    ``FLOOR`` toward minus infinity; ``CEIL`` toward plus infinity; ``SYMMETRIC_FLOOR`` toward
    zero; ``SYMMETRIC_CEIL`` away from zero. The other six round to nearest and differ on ties:
    ``NEGATIVE_INF`` down, ``POSITIVE_INF`` up, ``SYMMETRIC_ZERO`` toward zero, ``SYMMETRIC_INF``
    away from zero, ``CONV_EVEN`` to even, ``CONV_ODD`` to odd.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    SYMMETRIC_FLOOR = "symmetric_floor"
    SYMMETRIC_CEIL = "symmetric_ceil"
    NEGATIVE_INF = "negative_inf"
    POSITIVE_INF = "positive_inf"
    SYMMETRIC_ZERO = "symmetric_zero"
    SYMMETRIC_INF = "symmetric_inf"
    CONV_EVEN = "conv_even"
    CONV_ODD = "conv_odd"


class Saturation(StrEnum):
    """What happens to a rounded value outside the output range.

    ``NONE`` keeps the low output bits (the hardware's reset default); ``SATURATE`` clamps to the
    output range; ``SYMMETRIC`` clamps to the range without its most negative value.
    """

    NONE = "none"
    SATURATE = "saturate"
    SYMMETRIC = "symmetric"


# CORE_CR rounding field: AIE-ML and AIE2P from llvm-aie aie2p_defines.h and UG1583,
# AIE1 from the AMD Vitis Libraries (table 67). AIE1 has no symmetric_floor or symmetric_ceil.
_ROUNDING_CODES: dict[str, dict[Rounding, int]] = {
    "aie-ml": {
        Rounding.FLOOR: 0,
        Rounding.CEIL: 1,
        Rounding.SYMMETRIC_FLOOR: 2,
        Rounding.SYMMETRIC_CEIL: 3,
        Rounding.NEGATIVE_INF: 8,
        Rounding.POSITIVE_INF: 9,
        Rounding.SYMMETRIC_ZERO: 10,
        Rounding.SYMMETRIC_INF: 11,
        Rounding.CONV_EVEN: 12,
        Rounding.CONV_ODD: 13,
    },
    "aie1": {
        Rounding.FLOOR: 0,
        Rounding.CEIL: 1,
        Rounding.POSITIVE_INF: 2,
        Rounding.NEGATIVE_INF: 3,
        Rounding.SYMMETRIC_INF: 4,
        Rounding.SYMMETRIC_ZERO: 5,
        Rounding.CONV_EVEN: 6,
        Rounding.CONV_ODD: 7,
    },
}


def parse_rounding(name: str) -> Rounding:
    """Return the rounding mode called `name`; InputError names the nearest modes otherwise."""
    try:
        return Rounding(name)
    except ValueError:
        raise InputError(
            unknown_name("rounding", name, [mode.value for mode in Rounding])
        ) from None


def parse_saturation(name: str) -> Saturation:
    """Return the saturation mode called `name`; InputError names the nearest modes otherwise."""
    try:
        return Saturation(name)
    except ValueError:
        valid = [mode.value for mode in Saturation]
        raise InputError(unknown_name("saturation", name, valid)) from None


def rounding_code(mode: str, generation: str) -> int:
    """Return the register code of a rounding mode on one AI Engine generation.

    Parameters
    ----------
    mode : str or Rounding
    generation : {"aie-ml", "aie1"}
        ``aie-ml`` also covers AIE2P, which uses the same codes.

    Raises
    ------
    InputError
        If the mode or generation is unknown, or the generation lacks the mode.
    """
    codes = _codes_of(generation)
    rounding = parse_rounding(mode)
    if rounding not in codes:
        raise InputError(
            f"{generation} has no rounding mode {rounding.value!r}; "
            f"it has {', '.join(known.value for known in codes)}"
        )
    return codes[rounding]


def rounding_from_code(code: int, generation: str) -> Rounding:
    """Return the rounding mode that a register code selects on one AI Engine generation."""
    codes = _codes_of(generation)
    for mode, known in codes.items():
        if known == code:
            return mode
    raise InputError(
        f"rounding code {code!r} is reserved on {generation}; "
        f"its codes are {', '.join(str(known) for known in sorted(codes.values()))}"
    )


def _codes_of(generation: str) -> dict[Rounding, int]:
    try:
        return _ROUNDING_CODES[generation]
    except KeyError:
        raise InputError(
            unknown_name("AI Engine generation", generation, _ROUNDING_CODES)
        ) from None
