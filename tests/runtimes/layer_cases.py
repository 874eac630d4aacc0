"""Quantized layers that tell requantizers apart: random ones, exact ties, near ties, extremes."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """Operands and scales of ``out = requantize((a - a_zero) (w - w_zero)^T + bias)``.

    `a` (M, K), `w` (N, K) codes; `w_scale` and `w_zero` one number or (N,); `bias` (N,) integers in
    units of the accumulators, or None; `relu` clamps at the output's zero point.
    """

    kind: str
    a: np.ndarray
    w: np.ndarray
    a_zero: int
    w_zero: np.ndarray
    a_scale: np.float32
    w_scale: np.ndarray
    out_scale: np.float32
    zero_point: int
    bias: np.ndarray | None
    relu: bool

    @property
    def accumulators(self):
        """Exact sums with the bias, (M, N) int64."""
        w = self.w.astype(np.int64) - self.w_zero.astype(np.int64).reshape(-1, 1)
        acc = (self.a.astype(np.int64) - self.a_zero) @ w.T
        return acc if self.bias is None else acc + self.bias

    @property
    def real_bias(self):
        """The bias as a real number, float32."""
        if self.bias is None:
            return None
        return (self.bias * (np.float64(self.a_scale) * self.w_scale.astype(np.float64))).astype(
            np.float32
        )

    def clamp(self, out):
        """Limits of outputs of dtype `out`, or None."""
        return (self.zero_point, int(np.iinfo(out).max)) if self.relu else None


def layer_case(
    rng,
    *,
    a_dtype,
    w_dtype=np.int8,
    out_dtype=None,
    per_channel=None,
    a_zeros=True,
    w_zeros=False,
    out_zeros=True,
    biases=True,
    relus=True,
    w_low=None,
    kind=None,
    sizes=(8, 48, 24),
):
    """Return one case drawn by `rng`: its kind says which last bits it is after.

    ``ties``: scales are powers of two, so products lie exactly halfway. ``near``: the quotient of
    the scales is close to 1 / (2 d), so that products lie next to halfway. ``random`` scales.
    ``extremes``: all operands at the ends of their range, outputs saturate. ``tiny`` accumulators.
    `sizes` are rows, the end of the range of K, and columns; `biases` True, False or "always".
    """
    kind = kind or str(rng.choice(["ties", "near", "near", "random", "extremes", "tiny"]))
    per_channel = bool(rng.integers(2)) if per_channel is None else per_channel
    m, k, n = sizes[0], int(rng.integers(1, sizes[1])), sizes[2]
    a_range, w_range = np.iinfo(a_dtype), np.iinfo(w_dtype)
    low = w_range.min if w_low is None else w_low
    a = rng.integers(a_range.min, a_range.max + 1, (m, k)).astype(a_dtype)
    w = rng.integers(low, w_range.max + 1, (n, k)).astype(w_dtype)
    if kind == "extremes":
        a = rng.choice([a_range.min, a_range.max], (m, k)).astype(a_dtype)
        w = np.broadcast_to(rng.choice([low, w_range.max], (n, 1)), (n, k)).astype(w_dtype)
    if kind == "tiny":
        a = rng.integers(0, 4, (m, k)).astype(a_dtype)
    shape = (n,) if per_channel else ()
    wide = a_range.max > 255
    if kind == "ties":
        a_scale = np.float32(2.0 ** -int(rng.integers(0, 6)))
        w_scale = (2.0 ** -rng.integers(0, 6, shape)).astype(np.float32)
        out_scale = np.float32(a_scale * w_scale.max() * 2.0 ** int(rng.integers(1, 9)))
    else:
        a_scale = np.float32(rng.uniform(0.001, 0.1))
        w_scale = (rng.uniform(0.01, 0.02) * 2.0 ** rng.integers(-3, 1, shape)).astype(np.float32)
        halves = 2.0 * int(rng.integers(1, 200))
        if kind == "random":
            halves = 10.0 ** rng.uniform(-1, 3)
        out_scale = np.float32(np.float64(a_scale) * np.float64(w_scale.max()) * halves)
    if wide:
        out_scale = np.float32(out_scale * 256)
    out = np.iinfo(out_dtype or a_dtype)
    has_bias = biases == "always" or (biases and rng.integers(3) != 0)
    bias = rng.integers(-20000, 20001, n) if has_bias else None
    return LayerCase(
        kind=kind,
        a=a,
        w=w,
        a_zero=int(rng.integers(a_range.min, a_range.max + 1)) if a_zeros else 0,
        w_zero=(
            rng.integers(w_range.min, w_range.max + 1, shape) if w_zeros else np.zeros(shape)
        ).astype(w_dtype),
        a_scale=a_scale,
        w_scale=np.asarray(w_scale),
        out_scale=out_scale,
        zero_point=int(rng.integers(out.min, out.max + 1)) if out_zeros else 0,
        bias=bias,
        relu=bool(relus and rng.integers(4) == 0),
    )
