"""Requantizers as objects: what turns accumulators into output codes, with its numbers in it.

Each kind is a callable on accumulators (..., N), compiled, with scales per column; they differ in
how the scale is held and where rounding happens, which decides last bits:

    Srs            shift, ten rounding modes            the AI Engines' instruction
    FixedPoint     scale = multiplier * 2**-shift       four ways to round, by `rule`
        gemmlowp             twice: ties up, then ties away from zero
        ruy                  twice, both times ties up
        single_rounding      once, ties up
        reduced_multiplier   once, ties up, of a multiplier rounded to 15 bits; 48-bit accumulators
    FloatSteps     float32 multiplications and additions one after the other, then ties to even
    DoubleScale    one float64 product, then ties away from zero
    NvdlaStages    NVDLA: CACC's truncation, SDP's per-channel stage, SDP's output converter
    XmosTransform  XMOS lib_nn: shift, multiply, add and shift on 16-bit lanes

`loraq_sim.emulator.runtimes` makes them of real scales as a named runtime does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.bounds import (
    INT32,
    as_matrix,
    checked_integers,
    int32_values,
    narrowed,
    output_dtype,
    output_finish,
    per_column,
    spread,
)
from loraq_sim.emulator.mac_array import checked_int
from loraq_sim.emulator.requantize import (
    gemmlowp_requantize,
    single_rounding_requantize,
    srs,
)
from loraq_sim.errors import InputError, unknown_name

__all__ = [
    *("DoubleScale", "FixedPoint", "FIXED_POINT_RULES", "FloatSteps", "NvdlaStages"),
    *("Requantizer", "REQUANTIZE_RULES", "Srs", "XmosTransform"),
]

FIXED_POINT_RULES = ("gemmlowp", "ruy", "single_rounding", "reduced_multiplier")
REQUANTIZE_RULES = ("srs", *FIXED_POINT_RULES, "float", "double", "nvdla", "xmos")
STEP_NAMES = ("multiply", "add", "fused_add")
BEYOND_INT32 = ("clamp", "lowest")

_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Requantizer:
    """Accumulators to codes; a subclass says by which arithmetic.

    Parameters
    ----------
    zero_point : int
        Added after the rounding, before the clamp; within the output range.
    out_bits, signed
        Width (2 to 32) and signedness of the output.
    clamp : (int, int), optional
        Narrower output limits, as a fused activation sets them.
    """

    zero_point: int = 0
    out_bits: int = 8
    signed: bool = True
    clamp: tuple[int, int] | None = None

    @property
    def rule(self) -> str:
        """Name of the arithmetic, one of `REQUANTIZE_RULES`."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        output_finish(self.zero_point, self.out_bits, self.signed, self.clamp)

    def __call__(self, acc: ArrayLike) -> NDArray[np.integer]:
        """Return the codes of accumulators (..., N), in their shape, as the smallest dtype.

        Raises
        ------
        InputError
            If a parameter is outside its range, does not fit N columns, or an accumulator does not
            fit the arithmetic.
        """
        raise NotImplementedError

    def _finish(self) -> tuple[int, int, int]:
        return output_finish(self.zero_point, self.out_bits, self.signed, self.clamp)

    def _run(
        self,
        kernel: Callable[..., None],
        acc: ArrayLike,
        values: NDArray[np.integer],
        parameters: tuple[Any, ...],
        limits: tuple[Any, ...],
    ) -> NDArray[np.integer]:
        dtype = output_dtype(self.out_bits, self.signed)
        return narrowed(kernel, acc, values, (*parameters, *limits), dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Srs(Requantizer):
    """Shift, round and saturate by one shift for all columns: `loraq_sim.emulator.requantize.srs`.

    The instruction has neither zero point nor clamp.
    """

    shift: int = 0
    rounding: str = "conv_even"
    saturation: str = "saturate"

    @property
    def rule(self) -> str:
        return "srs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_point or self.clamp is not None:
            raise InputError(
                f"srs has no zero point and no clamp, got zero_point={self.zero_point} and "
                f"clamp={self.clamp}; choose another requantizer, or apply them to its output"
            )

    def __call__(self, acc: ArrayLike) -> NDArray[np.integer]:
        """Return ``srs(acc, shift, ...)``."""
        return srs(
            acc,
            self.shift,
            out_bits=self.out_bits,
            signed=self.signed,
            rounding=self.rounding,
            saturation=self.saturation,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedPoint(Requantizer):
    """An integer multiplier and a right shift for each column, rounded as `rule` says.

    Parameters
    ----------
    by : {"gemmlowp", "ruy", "single_rounding", "reduced_multiplier"}
        Which rounding; `gemmlowp` and `ruy` are defined on int32 accumulators,
        `reduced_multiplier` (int16 activations of TFLite) on int48, `single_rounding` on int64.
    multiplier : int or array of shape (N,)
        0 to 2**31 - 1.
    shift : int or array of shape (N,)
        scale = multiplier * 2**-shift. gemmlowp and ruy: 1 to 62, single_rounding: 1 to 62,
        reduced_multiplier: 24 to 62. TFLite's exponent is 31 - shift.

    References
    ----------
    .. [1] google/gemmlowp, fixedpoint/fixedpoint.h; google/ruy, kernel_avx2_fma.cc and
       kernel_avx512.cc (rounding_right_shift); TensorFlow Lite,
       kernels/internal/common.cc (``MultiplyByQuantizedMultiplier`` of int32 and of int64).
    """

    by: str = "gemmlowp"
    multiplier: ArrayLike = 0
    shift: ArrayLike = 31

    @property
    def rule(self) -> str:
        return self.by

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in FIXED_POINT_RULES:
            raise InputError(unknown_name("fixed-point rule", self.by, FIXED_POINT_RULES))

    def __call__(self, acc: ArrayLike) -> NDArray[np.integer]:
        """Return the codes of `acc`."""
        output = {
            "zero_point": self.zero_point,
            "out_bits": self.out_bits,
            "signed": self.signed,
            "clamp": self.clamp,
        }
        if self.by == "single_rounding":
            return single_rounding_requantize(acc, self.multiplier, self.shift, **output)  # type: ignore[arg-type]
        if self.by == "reduced_multiplier":
            return self._reduced(acc)
        n = as_matrix(checked_integers("acc", acc)).shape[1]
        per_column("multiplier", self.multiplier, n, 0, INT32.max)
        exponent = 31 - per_column("shift", self.shift, n, 1, 62)
        if self.by == "gemmlowp":
            return gemmlowp_requantize(acc, self.multiplier, exponent, **output)  # type: ignore[arg-type]
        return self._twice_up(acc, exponent)

    def _twice_up(self, acc: ArrayLike, exponent: NDArray[np.int64]) -> NDArray[np.integer]:
        from loraq_sim.kernels.shift_round import round_twice_up

        values = int32_values(acc)
        left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)
        if left.any():
            int32_values(values.astype(np.int64) << left)
        multiplier = per_column("multiplier", self.multiplier, values.shape[1], 0, INT32.max)
        limits = tuple(np.int64(v) for v in self._finish())
        return self._run(round_twice_up, acc, values, (multiplier, left, right), limits)

    def _reduced(self, acc: ArrayLike) -> NDArray[np.integer]:
        from loraq_sim.kernels.shift_round import single_rounding

        values = as_matrix(checked_integers("acc", acc))
        if values.size and (values.min() < -(2**47) or values.max() >= 2**47):
            worst = max(int(values.max()), int(values.min()), key=abs)
            raise InputError(
                f"acc must fit 48 bits, got {worst}; the reduced multiplier is defined on those: "
                "use single_rounding"
            )
        n = values.shape[1]
        multiplier = per_column("multiplier", self.multiplier, n, 0, INT32.max)
        shift = per_column("shift", self.shift, n, 24, 62) - 16
        reduced = np.minimum((multiplier + (1 << 15)) >> 16, _INT16.max)
        limits = tuple(np.int64(v) for v in self._finish())
        return self._run(single_rounding, acc, values, (reduced, shift), limits)


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatSteps(Requantizer):
    """Float32 operations one after the other, each rounded; then half to even, then the zero point.

    Parameters
    ----------
    steps : tuple of (str, float or array of shape (N,))
        ``("multiply", scale)`` and ``("add", term)`` in order; operands are rounded to float32 if
        they are not. A zero point that a runtime adds before the rounding is an ``add``.
        ``("fused_add", term)`` adds a float64 term and rounds once: a product that a fused
        multiply-add does not round.
    beyond_int32 : {"clamp", "lowest"}
        What a product outside int32 gives: the nearer end of the output, or always the lowest
        code, as x86 converts without a clamp before (cvtps2dq).

    References
    ----------
    .. [1] google/XNNPACK, src/xnnpack/requantization.h; pytorch/FBGEMM, QuantUtilsAvx2.cc; oneDNN,
       attributes of scales and zero points; onnxruntime, MLAS quantization output.
    """

    steps: tuple[tuple[str, ArrayLike], ...] = ()
    beyond_int32: str = "clamp"

    @property
    def rule(self) -> str:
        return "float"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beyond_int32 not in BEYOND_INT32:
            raise InputError(unknown_name("beyond_int32", self.beyond_int32, BEYOND_INT32))
        for name, operand in self.steps:
            if name not in STEP_NAMES:
                raise InputError(unknown_name("float step", name, STEP_NAMES))
            values = np.asarray(operand, dtype=np.float64)
            if not (np.abs(values) <= np.finfo(np.float32).max).all():
                raise InputError(
                    f"{name} must be finite in float32, got {values.reshape(-1).tolist()[:4]}"
                )

    def __call__(self, acc: ArrayLike) -> NDArray[np.integer]:
        """Return the codes of `acc`."""
        from loraq_sim.kernels.shift_round import ADD, FUSED_ADD, MULTIPLY, float_steps

        values = as_matrix(checked_integers("acc", acc))
        n = values.shape[1]
        codes = {"multiply": MULTIPLY, "add": ADD, "fused_add": FUSED_ADD}
        operations = np.array([codes[name] for name, _ in self.steps], dtype=np.int64)
        operands = np.empty((len(self.steps), n), dtype=np.float64)
        for row, (name, operand) in zip(operands, self.steps, strict=True):
            term = spread(name, np.asarray(operand, dtype=np.float64), n)
            row[:] = term if name == "fused_add" else term.astype(np.float32)
        limits = tuple(np.float64(v) for v in self._finish())
        lowest = self.beyond_int32 == "lowest"
        return self._run(float_steps, acc, values, (operations, operands, lowest), limits)


@dataclass(frozen=True, kw_only=True, eq=False)
class DoubleScale(Requantizer):
    """A float64 scale for each column; the float64 product rounds half away from zero.

    References
    ----------
    .. [1] LiteRT, kernels/internal/reference/integer_ops/fully_connected.h.
    """

    scale: ArrayLike = 1.0

    @property
    def rule(self) -> str:
        return "double"

    def __post_init__(self) -> None:
        super().__post_init__()
        values = np.asarray(self.scale, dtype=np.float64)
        # An int64 accumulator times this stays finite.
        if not (np.abs(values) <= 2.0**900).all():
            raise InputError(
                f"scale must be finite and at most 2**900, got {values.reshape(-1).tolist()[:4]}"
            )

    def __call__(self, acc: ArrayLike) -> NDArray[np.integer]:
        """Return the codes of `acc`."""
        from loraq_sim.kernels.shift_round import double_scale

        values = as_matrix(checked_integers("acc", acc))
        scale = spread("scale", np.asarray(self.scale, dtype=np.float64), values.shape[1])
        limits = tuple(np.float64(v) for v in self._finish())
        return self._run(double_scale, acc, values, (scale,), limits)


@dataclass(frozen=True, kw_only=True, eq=False)
class NvdlaStages(Requantizer):
    """NVDLA from accumulator to output; all roundings half away from zero, all stages saturate.

    ``x = sat32(acc >> truncate)`` in CACC; ``x = sat32((x + bias) * multiplier >> shift)`` for each
    channel in SDP's X stage; ``out = sat17((x - offset) * scale >> out_shift)``, cut to the output,
    in SDP's converter. There is no zero point: `offset` is subtracted before the scale.

    Parameters
    ----------
    truncate : int
        0 to 31. CACC keeps 16 bits below the point, so that with a longer shift a negative value
        just beyond a tie rounds as the tie does.
    bias, multiplier, shift : int or array of shape (N,)
        Within int32, within int16, and 0 to 62.
    offset, scale, out_shift : int
        Within int32, within int16, and 0 to 62.
    accumulator_bits : int
        34 for int8 operands, 48 for int16: what the accumulators must fit.

    References
    ----------
    .. [1] nvdla/hw, vmod/nvdla/cacc/NV_NVDLA_CACC_CALC_int8.v; cmod/hls/sdp/sdp_x.cpp and
       sdp_c.cpp.
    """

    truncate: int = 0
    bias: ArrayLike = 0
    multiplier: ArrayLike = 1
    shift: ArrayLike = 0
    offset: int = 0
    scale: int = 1
    out_shift: int = 0
    accumulator_bits: int = 34

    @property
    def rule(self) -> str:
        return "nvdla"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_point or not self.signed or not 8 <= self.out_bits <= 16:
            raise InputError(
                f"NVDLA gives signed codes of 8 to 16 bits without zero point, got "
                f"out_bits={self.out_bits}, signed={self.signed}, zero_point={self.zero_point}; "
                "use offset, which is subtracted before the scale"
            )
        checked_int("truncate", self.truncate, 0, 31)
        checked_int("offset", self.offset, INT32.min, INT32.max)
        checked_int("scale", self.scale, _INT16.min, _INT16.max)
        checked_int("out_shift", self.out_shift, 0, 62)
        checked_int("accumulator_bits", self.accumulator_bits, 32, 48)

    def __call__(self, acc: ArrayLike) -> NDArray[np.integer]:
        """Return the codes of `acc`."""
        from loraq_sim.kernels.shift_round import nvdla_stages

        values = as_matrix(checked_integers("acc", acc).astype(np.int64))
        limit = 2 ** (self.accumulator_bits - 1)
        if values.size and (values.min() < -limit or values.max() >= limit):
            worst = max(int(values.max()), int(values.min()), key=abs)
            raise InputError(
                f"acc must fit {self.accumulator_bits} bits, got {worst}; NVDLA's accumulator "
                "saturates there: MacArray(acc_bits=34, overflow='saturate')"
            )
        n = values.shape[1]
        parameters = (
            np.int64(self.truncate),
            per_column("bias", self.bias, n, INT32.min, INT32.max),
            per_column("multiplier", self.multiplier, n, _INT16.min, _INT16.max),
            per_column("shift", self.shift, n, 0, 62),
            np.array([self.offset, self.scale, self.out_shift], dtype=np.int64),
        )
        limits = tuple(np.int64(v) for v in self._finish()[1:])
        return self._run(nvdla_stages, acc, values, parameters, limits)


@dataclass(frozen=True, kw_only=True, eq=False)
class XmosTransform(Requantizer):
    """The output transform of XMOS lib_nn (OT_int8, OT_int8_channelwise) on 16-bit lanes.

    ``v = sat16(acc >> initial_shift)``, ``v = sat16(v * multiplier >> 14)``, ``v = sat16(v +
    bias)``, ``v = sat16(v >> final_shift)``, ``out = sat8(v >> 8)``: every shift rounds ties up,
    16-bit saturation is symmetric (-32767), the last is not. Zero points are part of `bias`.

    Parameters
    ----------
    initial_shift : int or array of shape (N,)
        -16 to 31; a negative one shifts left after the saturation.
    multiplier, bias : int or array of shape (N,)
        Within int16.
    final_shift : int
        -16 to 31; from 15 on only the sign is left.

    References
    ----------
    .. [1] xmos/lib_nn, src/cpp/OutputTransformFn.cpp and src/c/vpu_sim.c.
    """

    initial_shift: ArrayLike = 0
    multiplier: ArrayLike = 2**14
    bias: ArrayLike = 0
    final_shift: int = 0

    @property
    def rule(self) -> str:
        return "xmos"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_point or not self.signed or self.out_bits != 8:
            raise InputError(
                f"XMOS gives int8 with the zero point in its bias, got out_bits={self.out_bits}, "
                f"signed={self.signed}, zero_point={self.zero_point}"
            )
        checked_int("final_shift", self.final_shift, -16, 31)

    def __call__(self, acc: ArrayLike) -> NDArray[np.integer]:
        """Return the codes of `acc`."""
        from loraq_sim.kernels.shift_round import xmos_transform

        values = int32_values(acc)
        n = values.shape[1]
        parameters = (
            per_column("initial_shift", self.initial_shift, n, -16, 31),
            per_column("multiplier", self.multiplier, n, _INT16.min, _INT16.max),
            per_column("bias", self.bias, n, _INT16.min, _INT16.max),
            np.int64(self.final_shift),
        )
        limits = tuple(np.int64(v) for v in self._finish()[1:])
        return self._run(xmos_transform, acc, values, parameters, limits)
