"""Named runtimes: how each makes a requantizer of real scales, bit for bit, and where sums enter.

A quantized linear layer of every runtime computes codes of ``(a - z_a) (w - z_w)^T + bias`` times
``a_scale * w_scale / out_scale``. What decides last bits is how that quotient is rounded to a
multiplier, how the product is rounded, and whether the output's zero point is added before or
after. `tests/runtimes` compares with the runtimes themselves where they are installed; the versions
and cases are in the documentation's table.

Bias: ``accumulator`` says that the runtime adds an integer bias to the accumulators (give it to
`loraq_sim.emulator.gemm.emulate_gemm_requantize`); ``float`` that it adds a real one between
roundings (give it here).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.requantize import quantize_multiplier
from loraq_sim.emulator.requantizers import DoubleScale, FixedPoint, FloatSteps, Requantizer
from loraq_sim.errors import InputError, unknown_name

__all__ = [
    *("RUNTIMES", "Runtime", "list_runtimes", "runtime_of", "runtime_requantizer"),
    "dynamic_quantize_linear",
]

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """Scales as a runtime stores them, float32: one of activations and outputs, (N,) or one of w.

    `bias` is real, in units of the output before its scale; None where there is none.
    """

    a: Floats
    w: Floats
    out: Floats
    bias: Floats | None
    zero_point: int

    @property
    def product(self) -> Floats:
        return self.a * self.w

    @property
    def doubles(self) -> NDArray[np.float64]:
        """a w / out in float64, of the float32 scales."""
        return self.a.astype(np.float64) * self.w.astype(np.float64) / self.out.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A runtime by name.

    Attributes
    ----------
    rule : str
        Arithmetic of its requantizer, one of `loraq_sim.emulator.requantizers.REQUANTIZE_RULES`.
    scales : str
        How it makes the multiplier, as a formula; fl rounds to float32.
    bias : {"accumulator", "float"}
        Where a bias is added.
    zero_correction : {"initial", "after"}
        Whether zero points of the operands take part in the accumulation (initial value, or
        subtracted from the operands) or are corrected behind it.
    checked : str
        What it was compared with; empty where no runtime could be run.
    """

    name: str
    rule: str
    scales: str
    bias: str
    zero_correction: str
    checked: str
    source: str
    make: Callable[[_Scales], tuple[type[Requantizer], dict[str, Any]]]


def list_runtimes() -> list[str]:
    """Return the names of all runtimes."""
    return list(RUNTIMES)


def runtime_of(name: str) -> Runtime:
    """Return the runtime called `name`; InputError names the nearest ones otherwise."""
    try:
        return RUNTIMES[name]
    except (KeyError, TypeError):
        raise InputError(unknown_name("runtime", name, RUNTIMES)) from None


def runtime_requantizer(
    name: str,
    *,
    a_scale: float,
    w_scale: ArrayLike,
    out_scale: float,
    bias: ArrayLike | None = None,
    zero_point: int = 0,
    out_bits: int = 8,
    signed: bool = True,
    clamp: tuple[int, int] | None = None,
) -> Requantizer:
    """Return what turns accumulators into codes in a runtime, made of its real scales.

    Parameters
    ----------
    name : str
        One of `list_runtimes`.
    a_scale, out_scale : float
        Scales of activations and outputs, positive; runtimes hold float32, so they are rounded.
    w_scale : float or array of shape (N,)
        Scale of the weights, or one for each output channel.
    bias : array of shape (N,), optional
        Real bias, only of a runtime that adds it between roundings (fbgemm, onednn).
    zero_point, out_bits, signed, clamp
        Of the output, as for `loraq_sim.emulator.requantizers.Requantizer`.

    Raises
    ------
    InputError
        If a scale is not positive and finite, the runtime adds its bias to the accumulators, or
        has no such output.
    """
    runtime = runtime_of(name)
    if bias is not None and runtime.bias == "accumulator":
        raise InputError(
            f"{name} adds integers to its accumulators: give bias= as integers in units of "
            "a_scale * w_scale to emulate_gemm_requantize"
        )
    scales = _Scales(
        a=_positive("a_scale", a_scale),
        w=_positive("w_scale", w_scale),
        out=_positive("out_scale", out_scale),
        bias=None if bias is None else np.asarray(bias, dtype=np.float32),
        zero_point=zero_point,
    )
    for one in ("a", "out"):
        if getattr(scales, one).size != 1:
            raise InputError(
                f"{one}_scale must be one number, got shape {getattr(scales, one).shape}"
            )
    kind, parameters = runtime.make(scales)
    # A zero point that is one of the steps is not added again.
    added = parameters.pop("zero_point", zero_point)
    return kind(zero_point=added, out_bits=out_bits, signed=signed, clamp=clamp, **parameters)


def _positive(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float32)
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        raise InputError(f"{name} must be positive and finite in float32, got {array[bad].flat[0]}")
    return array


def _one_float(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    return FloatSteps, {"steps": (("multiply", scales.product / scales.out),)}


def _xnnpack(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    _xnnpack_scale(scales)
    return _one_float(scales)


def _xnnpack_scale(scales: _Scales) -> Floats:
    scale = scales.product / scales.out
    outside = (scale < 2.0**-32) | (scale >= 256)
    if outside.any():
        raise InputError(
            f"XNNPACK takes a_scale * w_scale / out_scale from 2**-32 to below 256, got "
            f"{np.asarray(scale)[outside].flat[0]}; the runtime itself refuses it"
        )
    return scale


def _xnnpack_neon(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    fraction, exponent = np.frexp(_xnnpack_scale(scales).astype(np.float64))
    # float32 has 24 significant bits, so nothing rounds here.
    multiplier = np.ldexp(fraction, 24).astype(np.int64)
    parameters = {"multiplier": multiplier, "shift": 24 - exponent.astype(np.int64)}
    return FixedPoint, {"by": "single_rounding"} | parameters


def _qnnpack(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    scale = scales.product * (np.float32(1) / scales.out)
    return FloatSteps, {"steps": (("multiply", scale),), "beyond_int32": "lowest"}


def _fbgemm(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    steps: tuple[tuple[str, ArrayLike], ...] = (("multiply", scales.product / scales.out),)
    if scales.bias is not None:
        product = scales.product
        # One scale: times the reciprocal, float32 of a float64 quotient, in a fused multiply-add
        # (the compiler's contraction). A scale per channel: divided, and added.
        inverse = (1.0 / product.astype(np.float64)).astype(np.float32)
        one: tuple[str, ArrayLike] = ("add", scales.bias / product)
        if scales.w.ndim == 0:
            one = ("fused_add", scales.bias.astype(np.float64) * np.float64(inverse))
        steps = (one, *steps)
    return FloatSteps, {"steps": steps, "beyond_int32": "lowest"}


def _onednn(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    # PyTorch hands over reciprocals, float32 of a float64 quotient, and ideep inverts them again.
    given = {
        name: (1.0 / getattr(scales, name).astype(np.float64)).astype(np.float32)
        for name in ("a", "w", "out")
    }
    one = np.float32(1)
    steps: list[tuple[str, ArrayLike]] = [
        ("multiply", one / given["a"]),
        ("multiply", one / given["w"]),
    ]
    if scales.bias is not None:
        steps.append(("add", scales.bias))
    steps += [("multiply", given["out"]), ("add", np.float32(scales.zero_point))]
    return FloatSteps, {"steps": tuple(steps), "zero_point": 0}


def _openvino(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    # The interval of the output, 0 to 255 codes, divided by the scale of the accumulators.
    high = (np.float32(255) * scales.out) / scales.product
    steps = (("multiply", np.float32(255) / high), ("add", np.float32(scales.zero_point)))
    return FloatSteps, {"steps": steps, "zero_point": 0}


def _litert_reference(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
    return DoubleScale, {"scale": scales.doubles}


def _tflite(rule: str) -> Callable[[_Scales], tuple[type[Requantizer], dict[str, Any]]]:
    def make(scales: _Scales) -> tuple[type[Requantizer], dict[str, Any]]:
        real = scales.doubles
        if scales.w.size == 1:
            # One scale for all weights: their product is rounded to float32 first.
            real = scales.product.astype(np.float64) / scales.out.astype(np.float64)
        multiplier, exponent = quantize_multiplier(real)
        shift = 31 - exponent.astype(np.int64)
        return FixedPoint, {"by": rule, "multiplier": multiplier, "shift": shift}

    return make


_LITERT = "LiteRT, kernels/internal"
_RECORDS = (
    Runtime(
        name="onnxruntime",
        rule="float",
        scales="fl(fl(a * w) / out)",
        bias="accumulator",
        zero_correction="initial",
        checked="onnxruntime 1.32.0: QLinearMatMul, QGemm, MatMulInteger",
        source="microsoft/onnxruntime, core/mlas/lib (MlasRequantizeOutput): clamp, ties to even",
        make=_one_float,
    ),
    Runtime(
        name="litert_reference",
        rule="double",
        scales="a * w / out in float64",
        bias="accumulator",
        zero_correction="initial",
        checked="ai-edge-litert 2.3.0, reference kernels: int8, uint8, int16",
        source=f"{_LITERT}/reference/integer_ops/fully_connected.h: std::round of float64",
        make=_litert_reference,
    ),
    Runtime(
        name="ruy",
        rule="ruy",
        scales="31 bits of fl(a * w) / out (one w) or a * w / out (w per channel), in float64",
        bias="accumulator",
        zero_correction="after",
        checked="ai-edge-litert 2.3.0 and tflite-runtime 2.14.0, built-in kernels without delegate",
        source="google/ruy, kernel_avx2_fma.cc and kernel_avx512.cc: two roundings, both ties up",
        make=_tflite("ruy"),
    ),
    Runtime(
        name="xnnpack",
        rule="float",
        scales="fl(fl(a * w) / out)",
        bias="accumulator",
        zero_correction="initial",
        checked="ai-edge-litert 2.3.0, XNNPACK delegate on x86",
        source="google/XNNPACK, src/xnnpack/requantization.h (fp32): clamp, lrintf, ties to even",
        make=_xnnpack,
    ),
    Runtime(
        name="xnnpack_neon",
        rule="single_rounding",
        scales="24 bits of fl(fl(a * w) / out)",
        bias="accumulator",
        zero_correction="initial",
        checked="",
        source="google/XNNPACK, src/xnnpack/requantization.h (rndnu): what Arm kernels use",
        make=_xnnpack_neon,
    ),
    Runtime(
        name="tflite_reference",
        rule="gemmlowp",
        scales="31 bits of fl(a * w) / out (one w) or a * w / out (w per channel), in float64",
        bias="accumulator",
        zero_correction="initial",
        checked="tflite-runtime 2.14.0, reference kernels: int8, uint8",
        source="TensorFlow Lite, kernels/internal/common.cc without TFLITE_SINGLE_ROUNDING",
        make=_tflite("gemmlowp"),
    ),
    Runtime(
        name="tflite_int16",
        rule="reduced_multiplier",
        scales="15 bits of the 31 of tflite_reference",
        bias="accumulator",
        zero_correction="initial",
        checked="tflite-runtime 2.14.0, int16 activations and int8 weights",
        source="TensorFlow Lite, kernels/internal/common.cc, the int64 accumulator's version",
        make=_tflite("reduced_multiplier"),
    ),
    Runtime(
        name="tflite_single_rounding",
        rule="single_rounding",
        scales="31 bits of fl(a * w) / out (one w) or a * w / out (w per channel), in float64",
        bias="accumulator",
        zero_correction="initial",
        checked="",
        source="TensorFlow Lite, kernels/internal/common.cc with TFLITE_SINGLE_ROUNDING",
        make=_tflite("single_rounding"),
    ),
    Runtime(
        name="fbgemm",
        rule="float",
        scales="fl(fl(a * w) / out); before it a bias, over fl(a * w), is added",
        bias="float",
        zero_correction="after",
        checked="torch 2.13.0, engines fbgemm and x86 (AVX-512 VNNI)",
        source="pytorch/FBGEMM, QuantUtilsAvx2.cc (requantizeOutputProcessingAvx2)",
        make=_fbgemm,
    ),
    Runtime(
        name="qnnpack",
        rule="float",
        scales="fl(fl(a * w) * fl(1 / out))",
        bias="accumulator",
        zero_correction="initial",
        checked="torch 2.13.0, engine qnnpack on x86",
        source="pytorch, aten/src/ATen/native/quantized/cpu/qnnpack (q8gemm, fp32 requantization)",
        make=_qnnpack,
    ),
    Runtime(
        name="onednn",
        rule="float",
        scales="each scale by itself, fl(1 / fl(1 / a)) then w, bias, fl(1 / out), zero point",
        bias="float",
        zero_correction="after",
        checked="torch 2.13.0, engine onednn (oneDNN 3.12.0, brgemm on AVX-512 VNNI)",
        source="oneDNN, attributes of scales and zero points: the zero point before the rounding",
        make=_onednn,
    ),
    Runtime(
        name="openvino",
        rule="float",
        scales="fl(255 / fl(fl(255 * out) / fl(a * w))), zero point before the rounding",
        bias="accumulator",
        zero_correction="after",
        checked="openvino 2026.4.1, CPU plugin (brgemm int8, AVX-512): scales that are powers of "
        "two, activations without zero point. It folds others in an order of its own: 2 of 576,000 "
        "outputs, next to ties, differ",
        source="openvinotoolkit/openvino, intel_cpu/src/nodes/fake_quantize.cpp, with the "
        "intervals that low-precision transformations divide by the scales",
        make=_openvino,
    ),
)
RUNTIMES = {record.name: record for record in _RECORDS}


def dynamic_quantize_linear(x: ArrayLike) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """Return (codes, scale, zero point) of a tensor as ONNX ``DynamicQuantizeLinear`` does.

    uint8 codes of one scale and one zero point: ``scale = fl((max - min) / 255)`` with 0 in the
    range, ``zero = rint(fl(-min / scale))``, ``code = clamp(rint(fl(x / scale)) + zero)``, ties to
    even, everything float32.

    Parameters
    ----------
    x : array of any shape
        Finite; rounded to float32 if it is not.

    Returns
    -------
    codes : ndarray of the shape of `x`, uint8
    scale : ndarray of shape (), float32
    zero : ndarray of shape (), uint8

    Raises
    ------
    InputError
        If `x` holds infinities or NaN.

    References
    ----------
    .. [1] ONNX operators, DynamicQuantizeLinear; onnxruntime,
       core/providers/cpu/quantization/dynamicquantizelinear.cc.
    """
    values = np.asarray(x, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InputError("x must be finite: infinities and NaN have no code; remove them first")
    zero = np.float32(0)
    low = min(zero, values.min()) if values.size else zero
    high = max(zero, values.max()) if values.size else zero
    span = np.float32(255)
    scale = np.float32(1) if high == low else np.float32((high - low) / span)
    if not np.isfinite(scale) or scale == 0:
        raise InputError(f"x spans {low} to {high}, whose scale float32 does not hold; scale x")
    point = np.clip(np.rint((zero - low) / scale), zero, span)
    codes = np.clip(np.rint(values / scale) + point, zero, span).astype(np.uint8)
    return codes, np.asarray(scale), np.asarray(point.astype(np.uint8))
