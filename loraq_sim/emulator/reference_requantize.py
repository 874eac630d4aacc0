"""The slow reference of upshift and scaled requantization: Python integers and fractions.

One value at a time, no code shared with the kernels. Each rounding is written as its meaning on
exact fractions, not as the shifts and nudges of the C sources, so that an error in one cannot hide
in the other.
"""

from fractions import Fraction
from math import ceil, floor

__all__ = [
    "reference_float",
    "reference_gemmlowp",
    "reference_single_rounding",
    "reference_ups",
]


def reference_ups(x: int, shift: int, *, acc_bits: int, saturate: bool, clamp: str) -> int:
    """Return one upshifted value."""
    low, high = -(2 ** (acc_bits - 1)), 2 ** (acc_bits - 1) - 1
    exact = x * 2**shift
    if low <= exact <= high:
        return exact
    if not saturate:
        return (exact - low) % 2**acc_bits + low
    if clamp == "after":
        return low if exact < low else high
    # The multiple of 2**shift nearest to the limit, inside it.
    step = 2**shift
    return ceil(Fraction(low, step)) * step if exact < low else floor(Fraction(high, step)) * step


def reference_gemmlowp(
    acc: int, multiplier: int, exponent: int, *, zero_point: int, low: int, high: int
) -> int:
    """Return one accumulator requantized with gemmlowp's two roundings."""
    product = Fraction(acc * 2 ** max(exponent, 0) * multiplier, 2**31)
    first = min(floor(product + Fraction(1, 2)), 2**31 - 1)
    second = Fraction(first, 2 ** max(-exponent, 0))
    away = floor(abs(second) + Fraction(1, 2))
    return max(low, min(high, (away if second >= 0 else -away) + zero_point))


def reference_single_rounding(
    acc: int, multiplier: int, shift: int, *, zero_point: int, low: int, high: int
) -> int:
    """Return one accumulator requantized with one rounding, ties toward plus infinity."""
    rounded = floor(Fraction(acc * multiplier, 2**shift) + Fraction(1, 2))
    rounded = max(-(2**31), min(2**31 - 1, rounded))
    return max(low, min(high, rounded + zero_point))


def reference_float(acc: int, scale: Fraction, *, zero_point: int, low: int, high: int) -> int:
    """Return one accumulator requantized by a float32 scale, given exactly."""
    rounded = round(_to_float32(_to_float32(Fraction(acc)) * scale))
    return max(low, min(high, rounded + zero_point))


def _to_float32(x: Fraction) -> Fraction:
    """Round to 24 significant bits, ties to even; a large value stays finite, which is enough."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    # 2**(exponent - 1) < |x| < 2**(exponent + 1): find the binade, then its last bit.
    binade = exponent if abs(x) >= Fraction(2) ** exponent else exponent - 1
    unit = Fraction(2) ** max(binade - 23, -149)
    return round(x / unit) * unit
