"""How partial sums of scale groups are combined, each step rounded to the accelerator's format.

fp32   y <- fl32(y + fl32(partial))
bf16   y <- bf16(y + bf16(partial))
fp16   y <- fp16(y + fp16(partial))
fp22   y <- trunc14(y + fl32(partial)): 14 significant bits, truncated toward zero, the width
       reported for the FP8 path of Hopper's tensor cores (DeepSeek-V3, arXiv 2412.19437,
       section 3.5.2); the alignment inside one instruction is not modeled
shift  integers aligned by the exponents of power-of-two scales and added exactly

Sums beyond a format become infinite, or are clamped at every step where the data path says so
(`loraq_sim.emulator.float_overflow`).
"""

import numpy as np

from loraq_sim.errors import InputError

__all__ = ["COMBINES", "ShiftCombiner", "SumCombiner", "clamped", "rounded"]

COMBINES = ("fp32", "bf16", "fp16", "fp22", "shift")

# float32 has 23 fraction bits; 13 of them and the implied one are kept.
_FP22_MASK = np.uint32(0xFFFFFFFF << (23 - 13) & 0xFFFFFFFF)
# Magnitude bits of aligned sums, which are int64.
_ALIGNED_BITS = 62


def rounded(values: np.ndarray, combine: str) -> np.ndarray:
    """Float32 `values` rounded to the format of a combine step; infinite beyond it."""
    if combine in ("bf16", "fp16"):
        with np.errstate(over="ignore"):
            return values.astype(_dtype(combine)).astype(np.float32)
    if combine == "fp22":
        # Cut bits would make a NaN with a small payload infinite.
        cut = (np.ascontiguousarray(values).view(np.uint32) & _FP22_MASK).view(np.float32)
        return np.where(np.isnan(values), values, cut)
    return values


def clamped(values: np.ndarray, combine: str) -> tuple[np.ndarray, np.ndarray]:
    """`values` with infinities replaced by the largest value of a combine step's format, and where.

    The largest value of fp22 is float32's with the last bits cut.
    """
    largest = np.float32(np.finfo(np.float32).max)
    if combine in ("bf16", "fp16"):
        import ml_dtypes

        largest = np.float32(ml_dtypes.finfo(_dtype(combine)).max)
    infinite = np.isinf(values)
    return np.where(infinite, np.copysign(rounded(largest, combine), values), values), infinite


class SumCombiner:
    """Floating-point combination in order of K; with `saturate` every step is clamped."""

    def __init__(self, shape: tuple[int, int], combine: str, *, saturate: bool = False) -> None:
        self._sum = np.zeros(shape, dtype=np.float32)
        self._combine = combine
        self.clipped = np.zeros(shape, dtype=np.bool_) if saturate else None

    def add(self, acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray) -> None:
        """Add fl32(acc) * fl32(x_scale w_scale); acc (M, N), scales (M,) and (N,)."""
        is_fast = acc.dtype == np.int32 and self._combine in ("fp32", "bf16")
        if is_fast and self.clipped is None:
            from loraq_sim.kernels.scaled_sum import add_scaled

            # The formula below in one pass over memory.
            scales = (np.ascontiguousarray(s, np.float32) for s in (x_scale, w_scale))
            acc = np.ascontiguousarray(acc)
            add_scaled(acc, *scales, self._combine == "bf16", self._sum)
            return
        # Infinities are results here, and 0 times infinity is NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            partial = acc.astype(np.float32) * (x_scale[:, None] * w_scale[None, :])
            if self._combine in ("bf16", "fp16"):
                partial = self._step(partial)
            self._sum = self._step(self._sum + partial)

    def result(self) -> np.ndarray:
        """The sum, (M, N) float32."""
        return self._sum

    def _step(self, values: np.ndarray) -> np.ndarray:
        values = rounded(values, self._combine)
        if self.clipped is None:
            return values
        values, infinite = clamped(values, self._combine)
        self.clipped |= infinite
        return values


class ShiftCombiner:
    """Exact integer combination: acc << (exponent - smallest exponent of the row and column).

    Rows and columns with a scale that is not finite are NaN.
    """

    clipped = None

    def __init__(self, x_scales: np.ndarray, w_scales: np.ndarray) -> None:
        self._wild = ~np.isfinite(x_scales).all(axis=1)[:, None] | ~np.isfinite(w_scales).all(
            axis=1
        )
        self._x_base, self._w_base = _smallest_exponents(x_scales), _smallest_exponents(w_scales)
        self._sum = np.zeros((len(x_scales), len(w_scales)), dtype=np.int64)
        self._bound = 0

    def add(self, acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray) -> None:
        """Add acc (M, N) integers, aligned by the exponents of the scales (M,) and (N,)."""
        # A zero scale marks a group of zeros: its accumulators are zero and need no shift.
        x_shift = np.where(x_scale == 0, 0, _exponents(x_scale) - self._x_base)
        w_shift = np.where(w_scale == 0, 0, _exponents(w_scale) - self._w_base)
        shift = x_shift[:, None] + w_shift[None, :]
        shift[(acc == 0) | self._wild] = 0
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
        with np.errstate(over="ignore"):
            y = np.ldexp(self._sum.astype(np.float32), exponent).astype(np.float32)
        return np.where(self._wild, np.float32(np.nan), y) if self._wild.any() else y


def _dtype(combine: str) -> np.dtype:
    if combine == "fp16":
        return np.dtype(np.float16)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _exponents(scales: np.ndarray) -> np.ndarray:
    """e of scales 2**e; of no meaning for a zero scale."""
    return np.frexp(scales)[1] - 1


def _smallest_exponents(scales: np.ndarray) -> np.ndarray:
    """Smallest exponent of each row of (rows, groups) power-of-two scales; 0 for zero rows."""
    highest = np.iinfo(np.int32).max
    counts = np.isfinite(scales) & (scales != 0)
    smallest = np.where(counts, _exponents(np.where(counts, scales, 1)), highest).min(axis=1)
    return np.where(smallest == highest, 0, smallest)
