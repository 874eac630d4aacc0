"""What is compared with which runtime: the layers it takes, its call, and our requantizer."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import runtime_calls as calls  # noqa: E402
from layer_cases import LayerCase  # noqa: E402

from loraq_sim.emulator.gemm import emulate_gemm_requantize  # noqa: E402
from loraq_sim.emulator.mac_array import MacArray  # noqa: E402
from loraq_sim.emulator.runtimes import runtime_of, runtime_requantizer  # noqa: E402

__all__ = ["COMPARISONS", "Comparison", "golden_record", "layer_of", "our_codes"]

LITERT = ("ai_edge_litert", "flatbuffers")
ONNX = ("onnx", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One call of one runtime.

    Attributes
    ----------
    needs : tuple of str
        Modules that must import.
    layers : dict
        Arguments of `layer_case`: the layers this call takes.
    call : function of a LayerCase
        The runtime's codes.
    """

    runtime: str
    needs: tuple[str, ...]
    call: Callable[[LayerCase], np.ndarray]
    layers: dict[str, Any] = field(default_factory=dict)
    out: str = "uint8"


def our_codes(comparison, case):
    """Codes of a wrapping array with our requantizer of the runtime."""
    runtime = runtime_of(comparison.runtime)
    real = runtime.bias == "float" and case.bias is not None
    requantizer = runtime_requantizer(
        comparison.runtime,
        a_scale=case.a_scale,
        w_scale=case.w_scale,
        out_scale=case.out_scale,
        bias=case.real_bias if real else None,
        zero_point=case.zero_point,
        out_bits=np.iinfo(comparison.out).bits,
        signed=np.iinfo(comparison.out).min < 0,
        clamp=case.clamp(comparison.out),
    )
    return emulate_gemm_requantize(
        case.a,
        case.w,
        MacArray(acc_bits=64 if case.a.dtype == np.int16 else 32),
        requantizer,
        bias=None if real else case.bias,
        a_zero=case.a_zero,
        w_zero=case.w_zero,
        zero_point=runtime.zero_correction,
    )


_U8S8 = {"a_dtype": np.uint8}
_S8S8 = {"a_dtype": np.int8}
_U8U8 = {"a_dtype": np.uint8, "w_dtype": np.uint8, "w_zeros": True}
_PLAIN = {"biases": False, "relus": False}


def _onnx() -> dict[str, Comparison]:
    found = {}
    for name, layers in {"u8s8": _U8S8, "s8s8": _S8S8, "u8u8": _U8U8}.items():
        out = np.dtype(layers["a_dtype"]).name
        common: dict[str, Any] = {"runtime": "onnxruntime", "needs": ONNX, "out": out}
        layers = layers | {"w_zeros": True}
        found[f"onnxruntime QLinearMatMul {name}"] = Comparison(
            call=lambda case, out=out: calls.onnx_qlinear_matmul(case, out),
            layers=layers | _PLAIN,
            **common,
        )
        found[f"onnxruntime QGemm {name}"] = Comparison(
            call=lambda case, out=out: calls.onnx_qgemm(case, out),
            layers=layers | {"relus": False},
            **common,
        )
    return found


def _litert() -> dict[str, Comparison]:
    found = {}
    kinds = {
        "litert_reference": "BUILTIN_REF",
        "ruy": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
        "xnnpack": "AUTO",
    }
    # Weights of -128 and per-channel uint8 weights are outside TensorFlow Lite's specification.
    int8 = _S8S8 | {"w_low": -127}
    uint8 = _U8U8 | {"per_channel": False}
    for runtime, kernels in kinds.items():
        for name, layers in {"int8": int8, "uint8": uint8}.items():
            found[f"{runtime} {name}"] = Comparison(
                runtime=runtime,
                needs=LITERT,
                call=lambda case, kernels=kernels: calls.litert(case, kernels),
                layers=layers,
                out=name,
            )
    found["litert_reference int16"] = Comparison(
        runtime="litert_reference",
        needs=LITERT,
        call=lambda case: calls.litert(case, "BUILTIN_REF"),
        layers=int8 | {"a_dtype": np.int16, "a_zeros": False, "out_zeros": False},
        out="int16",
    )
    return found


def _tflite() -> dict[str, Comparison]:
    # A release of TensorFlow Lite that needs NumPy 1: recorded, compared where it can be installed.
    int16 = {"a_dtype": np.int16, "a_zeros": False, "out_zeros": False, "w_low": -127}
    int16 |= {"per_channel": False}
    names = {
        "tflite_reference int8": ("BUILTIN_REF", _S8S8 | {"w_low": -127}),
        "tflite_reference uint8": ("BUILTIN_REF", _U8U8 | {"per_channel": False}),
        "ruy of tflite int8": ("BUILTIN_WITHOUT_DEFAULT_DELEGATES", _S8S8 | {"w_low": -127}),
        # Without a bias its accumulators are 32 bits wide and the multiplier is whole.
        "tflite_int16 with bias": ("BUILTIN_REF", int16 | {"biases": "always"}),
        "tflite_reference int16 without bias": ("BUILTIN_REF", int16 | {"biases": False}),
    }
    return {
        name: Comparison(
            runtime=name.split()[0],
            needs=("tflite_runtime", *LITERT),
            call=lambda case, kernels=kernels: calls.tflite(case, kernels),
            layers=layers,
            out=np.dtype(layers["a_dtype"]).name,
        )
        for name, (kernels, layers) in names.items()
    }


def _torch() -> dict[str, Comparison]:
    # Weights of PyTorch's observers leave out -128; fbgemm without VNNI saturates beyond 7 bits.
    return {
        f"torch {engine}": Comparison(
            runtime={"x86": "fbgemm"}.get(engine, engine),
            needs=("torch",),
            call=lambda case, engine=engine: calls.torch_linear(case, engine),
            layers=_U8S8,
        )
        for engine in ("fbgemm", "x86", "qnnpack", "onednn")
    }


COMPARISONS: dict[str, Comparison] = {
    **_onnx(),
    **_litert(),
    **_tflite(),
    **_torch(),
    "openvino": Comparison(
        runtime="openvino",
        needs=("openvino",),
        call=calls.openvino_matmul,
        # Scales whose products and quotients are exact, so that their order does not matter.
        layers=_U8S8 | _PLAIN | {"w_low": -127, "kind": "ties", "a_zeros": False},
    ),
}


# Golden vectors: JSON values of a layer and what a runtime made of it.


def golden_record(case, codes):
    """A layer and its codes as JSON values; float32 exactly, as float64."""
    arrays = {name: getattr(case, name) for name in ("a", "w", "w_zero", "w_scale", "bias")}
    return {
        "kind": case.kind,
        "a_dtype": case.a.dtype.name,
        "w_dtype": case.w.dtype.name,
        **{name: None if v is None else np.asarray(v).tolist() for name, v in arrays.items()},
        "a_zero": case.a_zero,
        "a_scale": float(case.a_scale),
        "out_scale": float(case.out_scale),
        "zero_point": case.zero_point,
        "relu": case.relu,
        "codes": codes.tolist(),
    }


def layer_of(record):
    """The layer of a golden record."""
    w_dtype = record["w_dtype"]
    return LayerCase(
        kind=record["kind"],
        a=np.array(record["a"], record["a_dtype"]),
        w=np.array(record["w"], w_dtype),
        a_zero=record["a_zero"],
        w_zero=np.array(record["w_zero"], w_dtype),
        a_scale=np.float32(record["a_scale"]),
        w_scale=np.array(record["w_scale"], np.float32),
        out_scale=np.float32(record["out_scale"]),
        zero_point=record["zero_point"],
        bias=None if record["bias"] is None else np.array(record["bias"]),
        relu=record["relu"],
    )
