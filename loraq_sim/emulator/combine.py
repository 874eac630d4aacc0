"""How partial sums of scale groups are combined, each step rounded to the accelerator's format.

fp32   y <- fl32(y + fl32(partial))
bf16   y <- bf16(y + bf16(partial))
fp22   y <- trunc14(y + fl32(partial)): 14 significant bits, truncated toward zero, the width
       reported for the FP8 path of Hopper's tensor cores (DeepSeek-V3, arXiv 2412.19437,
       section 3.5.2); the alignment inside one instruction is not modeled
shift  integers aligned by the exponents of power-of-two scales and added exactly
"""

import numpy as np

from loraq_sim.errors import InputError

__all__ = ["COMBINES", "ShiftCombiner", "SumCombiner", "rounded"]

COMBINES = ("fp32", "bf16", "fp22", "shift")

# float32 has 23 fraction bits; 13 of them and the implied one are kept.
_FP22_MASK = np.uint32(0xFFFFFFFF << (23 - 13) & 0xFFFFFFFF)
# Magnitude bits of aligned sums, which are int64.
_ALIGNED_BITS = 62


def rounded(values: np.ndarray, combine: str) -> np.ndarray:
    """Float32 `values` rounded to the format of a combine step."""
    if combine == "bf16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16).astype(np.float32)
    if combine == "fp22":
        return (np.ascontiguousarray(values).view(np.uint32) & _FP22_MASK).view(np.float32)
    return values


class SumCombiner:
    """Floating-point combination in order of K."""

    def __init__(self, shape: tuple[int, int], combine: str) -> None:
        self._sum = np.zeros(shape, dtype=np.float32)
        self._combine = combine

    def add(self, acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray) -> None:
        """Add fl32(acc) * fl32(x_scale w_scale); acc (M, N), scales (M,) and (N,)."""
        if acc.dtype == np.int32 and self._combine in ("fp32", "bf16"):
            from loraq_sim.kernels.scaled_sum import add_scaled

            # The formula below in one pass over memory.
            scales = (np.ascontiguousarray(s, np.float32) for s in (x_scale, w_scale))
            acc = np.ascontiguousarray(acc)
            add_scaled(acc, *scales, self._combine == "bf16", self._sum)
            return
        partial = acc.astype(np.float32) * (x_scale[:, None] * w_scale[None, :])
        if self._combine == "bf16":
            partial = rounded(partial, "bf16")
        self._sum = rounded(self._sum + partial, self._combine)

    def result(self) -> np.ndarray:
        """The sum, (M, N) float32."""
        return self._sum


class ShiftCombiner:
    """Exact integer combination: acc << (exponent - smallest exponent of the row and column)."""

    def __init__(self, x_scales: np.ndarray, w_scales: np.ndarray) -> None:
        self._x_base, self._w_base = _smallest_exponents(x_scales), _smallest_exponents(w_scales)
        self._sum = np.zeros((len(x_scales), len(w_scales)), dtype=np.int64)
        self._bound = 0

    def add(self, acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray) -> None:
        """Add acc (M, N) integers, aligned by the exponents of the scales (M,) and (N,)."""
        # A zero scale marks a group of zeros: its accumulators are zero and need no shift.
        x_shift = np.where(x_scale == 0, 0, _exponents(x_scale) - self._x_base)
        w_shift = np.where(w_scale == 0, 0, _exponents(w_scale) - self._w_base)
        shift = x_shift[:, None] + w_shift[None, :]
        shift[acc == 0] = 0
        _, magnitude = np.frexp(np.abs(acc.astype(np.float64)))
        self._bound += 2 ** int((magnitude + shift).max())
        if self._bound >= 2**_ALIGNED_BITS:
            bits = self._bound.bit_length() + 1
            raise InputError(
                f"combine 'shift' needs an aligned sum of {bits} bits, more than the "
                f"{_ALIGNED_BITS + 1} emulated: the scales of a row lie too far apart; use fp32"
            )
        self._sum += acc.astype(np.int64) << shift.astype(np.int64)

    def result(self) -> np.ndarray:
        """The sum rounded once to float32, (M, N)."""
        exponent = self._x_base[:, None] + self._w_base[None, :]
        return np.ldexp(self._sum.astype(np.float32), exponent).astype(np.float32)


def _exponents(scales: np.ndarray) -> np.ndarray:
    """e of scales 2**e; of no meaning for a zero scale."""
    return np.frexp(scales)[1] - 1


def _smallest_exponents(scales: np.ndarray) -> np.ndarray:
    """Smallest exponent of each row of (rows, groups) power-of-two scales; 0 for zero rows."""
    highest = np.iinfo(np.int32).max
    smallest = np.where(scales == 0, highest, _exponents(scales)).min(axis=1)
    return np.where(smallest == highest, 0, smallest)
