"""Ready-made arrays by name: what known hardware and libraries do with integer products.

Each preset says where it comes from and how sure that is:

    vendor    a vendor document or vendor source code
    measured  run on hardware by the named source
    inferred  reasoned from one of those; the text says what is assumed
    estimate  from general knowledge, no document at hand

Where the accumulator wraps, the order of the adds and `products_per_add` change no result; they are
given so that widths and saturating variants can be studied on the same shape.

Runtimes of `loraq_sim.emulator.runtimes` are presets of the same name: the array their kernels use
and the requantizer they are known for.
"""

from dataclasses import dataclass

from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.requantizers import REQUANTIZE_RULES
from loraq_sim.emulator.runtimes import RUNTIMES, Runtime
from loraq_sim.errors import InputError, unknown_name

__all__ = ["CONFIDENCES", "REQUANTIZERS", "ArrayPreset", "list_array_presets", "array_preset"]

CONFIDENCES = ("vendor", "measured", "inferred", "estimate")
REQUANTIZERS = REQUANTIZE_RULES


@dataclass(frozen=True, kw_only=True)
class ArrayPreset:
    """A named array with its usual requantization.

    ``requantize`` names the step after the accumulator, a rule of
    `loraq_sim.emulator.requantizers`; ``rounding`` and ``saturation`` are modes of
    `loraq_sim.formats`, what the hardware does unless told otherwise. ``operands`` are the codes it
    multiplies, activations first; ``zero_point`` says where the correction of their zero points
    enters (`loraq_sim.emulate_gemm`); ``runtime`` names the one of `loraq_sim.emulator.runtimes`
    that makes its requantizer of real scales, if any.
    """

    name: str
    array: MacArray | TwoLevelArray
    requantize: str
    rounding: str
    saturation: str
    source: str
    confidence: str
    operands: str = "int8 x int8"
    zero_point: str = "initial"
    runtime: str | None = None


def array_preset(name: str) -> ArrayPreset:
    """Return the preset called `name`; InputError names the nearest ones otherwise."""
    try:
        return _PRESETS[name]
    except (KeyError, TypeError):
        raise InputError(unknown_name("array preset", name, _PRESETS)) from None


def list_array_presets() -> list[str]:
    """Return the names of all presets, in the order of their families."""
    return list(_PRESETS)


def _record(
    name: str,
    array: MacArray | TwoLevelArray,
    requantize: str,
    modes: tuple[str, str],
    confidence: str,
    source: str,
    operands: str = "int8 x int8",
    runtime: str | None = None,
) -> ArrayPreset:
    return ArrayPreset(
        name=name,
        array=array,
        requantize=requantize,
        rounding=modes[0],
        saturation=modes[1],
        source=source,
        confidence=confidence,
        operands=operands,
        zero_point=RUNTIMES[runtime].zero_correction if runtime else "initial",
        runtime=runtime,
    )


# Reset state of the AI Engine control register; kernels usually choose other modes.
_AIE_RESET = ("floor", "none")
_TO_EVEN = ("conv_even", "saturate")
_TIES_UP = ("positive_inf", "saturate")
_TIES_AWAY = ("symmetric_inf", "saturate")

_RECORDS = (
    _record(
        "aie1",
        MacArray(acc_bits=48, products_per_add=8),
        "srs",
        _AIE_RESET,
        "estimate",
        "First AI Engine (Versal): 48-bit accumulators that wrap in the MAC, saturation in SRS "
        "only (AMD UG1076/UG1079, AM009; AMD Vitis Libraries table 67 for its own rounding "
        "codes). Eight int8 products per lane and operation, from 128 MAC per cycle on 16 lanes",
    ),
    _record(
        "aie2",
        MacArray(acc_bits=32, products_per_add=8),
        "srs",
        _AIE_RESET,
        "measured",
        "AIE-ML (XDNA1): aie_api mmul 4x8x8 sums 8 int8 products into acc32; integer MAC wraps, "
        "the saturation register acts on SRS, UPS and pack (AMD AM020, UG1583); overflow run on "
        "Phoenix silicon by xdna-emu. Reset rounding floor, saturation none (aie-rt, UG1583)",
    ),
    _record(
        "aie2_int4",
        MacArray(acc_bits=32, products_per_add=16),
        "srs",
        _AIE_RESET,
        "vendor",
        "AIE-ML, int8 x int4: aie_api mmul 4x16x8 is one intrinsic of 16 products per acc32 lane. "
        "Wrapping as aie2. (AM020 v1.4 calls the mode emulated; the sums are the same)",
        operands="int8 x int4",
    ),
    _record(
        "aie2_acc64",
        MacArray(acc_bits=64, products_per_add=4),
        "srs",
        _AIE_RESET,
        "vendor",
        "AIE-ML with acc64, as 16-bit operands use it: aie_api mmul 4x4x4, requests of 40 to 64 "
        "bits give 64 (aie_api accumulator types). Wrapping as aie2",
        operands="int16 x int16",
    ),
    _record(
        "aie2p",
        MacArray(acc_bits=32, products_per_add=8),
        "srs",
        _AIE_RESET,
        "inferred",
        "AIE2P (XDNA2): aie_api mmul 8x8x8 sums 8 int8 products into acc32; same accumulator and "
        "rounding codes as AIE-ML (llvm-aie aie2p_defines.h). Wrapping is assumed from AIE-ML",
    ),
    _record(
        "imma",
        MacArray(acc_bits=32, products_per_add=32),
        "float",
        _TO_EVEN,
        "inferred",
        "NVIDIA tensor cores, mma.sync m16n8k32 s8/u8 with s32 accumulators: wraps without "
        ".satfinite (PTX ISA, mma). 32 is K of the instruction; its inner order is not documented "
        "and changes nothing. Output: float scale, cvt.rni.sat",
        operands="int8 or uint8 x int8 or uint8",
    ),
    _record(
        "imma_int4",
        MacArray(acc_bits=32, products_per_add=64),
        "float",
        _TO_EVEN,
        "inferred",
        "NVIDIA tensor cores, mma.sync m16n8k64 s4/u4 with s32 accumulators (Turing to Ada): "
        "wraps without .satfinite (PTX ISA, mma). Output: float scale, cvt.rni.sat",
        operands="int4 x int4",
    ),
    _record(
        "imma_satfinite",
        MacArray(acc_bits=32, overflow="saturate", products_per_add=32),
        "float",
        _TO_EVEN,
        "inferred",
        "mma.sync with .satfinite clamps the accumulation to int32 (PTX ISA, mma). One clamp per "
        "instruction of 32 products is assumed; hardware may clamp more often inside",
        operands="int8 or uint8 x int8 or uint8",
    ),
    _record(
        "mfma",
        MacArray(acc_bits=32, products_per_add=32),
        "float",
        _TO_EVEN,
        "inferred",
        "AMD CDNA matrix cores, v_mfma_i32_16x16x32_i8: int32 accumulators; unsigned wrapping is "
        "the contract of AMD's emulator, supported by an RDNA hardware probe (ROCm/rocm-systems "
        "PR 7272)",
    ),
    _record(
        "wmma",
        MacArray(acc_bits=32, products_per_add=16),
        "float",
        _TO_EVEN,
        "measured",
        "AMD RDNA3/RDNA4 v_wmma_i32_16x16x16_iu8 without clamp: INT_MAX + P comes back modulo "
        "2**32 on gfx1100 and gfx1201 (probe in ROCm/rocm-systems PR 7272)",
        operands="int8 or uint8 x int8 or uint8",
    ),
    _record(
        "wmma_clamp",
        MacArray(acc_bits=32, overflow="saturate", products_per_add=16),
        "float",
        _TO_EVEN,
        "inferred",
        "v_wmma_i32_16x16x16_iu8 with the clamp bit gives INT_MAX on gfx1100 and gfx1201 (probe "
        "in ROCm/rocm-systems PR 7272). One clamp per instruction of 16 products is assumed",
        operands="int8 or uint8 x int8 or uint8",
    ),
    _record(
        "vnni",
        MacArray(acc_bits=32, products_per_add=4),
        "float",
        _TO_EVEN,
        "vendor",
        "x86 vpdpbusd (u8 x s8): four products summed exactly, then one wrapping add into a dword "
        "(Intel SDM). Libraries apply float scales after (oneDNN, onnxruntime)",
        operands="uint8 x int8",
    ),
    _record(
        "vnni_saturate",
        MacArray(acc_bits=32, overflow="saturate", products_per_add=4),
        "float",
        _TO_EVEN,
        "vendor",
        "x86 vpdpbusds: four products summed exactly, then one add that saturates to int32 (Intel "
        "SDM)",
        operands="uint8 x int8",
    ),
    _record(
        "avx2_maddubs",
        MacArray(acc_bits=32, products_per_add=2, tree_bits=16, tree_overflow="saturate"),
        "float",
        _TO_EVEN,
        "vendor",
        "x86 before VNNI: vpmaddubsw saturates each pair of u8 x s8 products to int16, vpmaddwd "
        "by ones and vpaddd then add exactly and wrap (Intel SDM; oneDNN, Nuances of int8 "
        "computations). The reason why 8-bit weights lose accuracy there",
        operands="uint8 x int8",
    ),
    _record(
        "arm_dot",
        MacArray(acc_bits=32, products_per_add=4),
        "gemmlowp",
        _TIES_AWAY,
        "vendor",
        "Arm sdot/udot and smmla: exact products, 32-bit lanes that wrap (Arm ARM). Requantized "
        "as TensorFlow Lite and ruy do; `rounding` is that of RoundingDivideByPOT",
        operands="int8 or uint8 x int8 or uint8",
    ),
    _record(
        "cmsis_nn",
        MacArray(acc_bits=32, products_per_add=2),
        "gemmlowp",
        _TIES_AWAY,
        "estimate",
        "CMSIS-NN int8 kernels on Cortex-M with DSP: smlad adds two products per step into an "
        "int32 that wraps; arm_nn_requantize rounds twice unless CMSIS_NN_USE_SINGLE_ROUNDING is "
        "set",
    ),
    _record(
        "cmsis_wrap",
        MacArray(acc_bits=64, products_per_add=1),
        "srs",
        _AIE_RESET,
        "vendor",
        "CMSIS-DSP arm_fir_q31, scalar build: the 2.62 accumulator wraps on purpose (issue 175) "
        "and the output is cut without saturation (issues 328 and 342 corrected the "
        "documentation); the Helium build saturates",
    ),
    _record(
        "tflite",
        MacArray(acc_bits=32),
        "gemmlowp",
        _TIES_AWAY,
        "vendor",
        "TensorFlow Lite reference kernels: int32 accumulators, one product at a time, "
        "MultiplyByQuantizedMultiplier with double rounding (kernels/internal/common.h)",
        runtime="tflite_reference",
    ),
    _record(
        "tflite_single_rounding",
        MacArray(acc_bits=32),
        "single_rounding",
        _TIES_UP,
        "vendor",
        "The same built with TFLITE_SINGLE_ROUNDING: (x * m + 2**(s-1)) >> s, as in ruy",
        runtime="tflite_single_rounding",
    ),
    _record(
        "gemmini",
        TwoLevelArray(column=MacArray(acc_bits=20), column_k=16, acc_bits=32),
        "float",
        _TO_EVEN,
        "vendor",
        "Gemmini default configuration (ucb-bar/gemmini Configs.scala): 16 x 16 weight-stationary "
        "mesh, int8, spatialArrayOutputType 20 bits, accType 32 bits. PE.scala assigns the sum to "
        "20 bits and AccumulatorMem.scala adds at 32, both without clamping. 16 products need 20 "
        "bits, so columns never overflow. Output: float32 scale, round to nearest even, clamp to "
        "int8",
    ),
    _record(
        "riscv_ime",
        MacArray(acc_bits=32),
        "srs",
        _TIES_UP,
        "inferred",
        "RISC-V Integrated Matrix Extension draft: integer accumulation is modular, so free of "
        "order by specification. Narrowing by vnclip, whose default mode rnu sends ties up and "
        "saturates",
    ),
    _record(
        "nvdla",
        MacArray(acc_bits=34, overflow="saturate", products_per_add=64),
        "nvdla",
        _TIES_AWAY,
        "vendor",
        "NVDLA, int8: CMAC sums 64 products exactly (22 bits), CACC adds them at 34 bits with "
        "saturation (nvdla/hw, NV_NVDLA_CACC_CALC_int8.v: simulated, 8,000 vectors equal); then "
        "its truncation and SDP. No zero points: SDP's converter subtracts an offset",
    ),
    _record(
        "nvdla_int16",
        MacArray(acc_bits=48, overflow="saturate", products_per_add=64),
        "nvdla",
        _TIES_AWAY,
        "vendor",
        "NVDLA, int16: as nvdla with accumulators of 48 bits (nvdla/hw, NV_NVDLA_cacc.cpp)",
        operands="int16 x int16",
    ),
    _record(
        "xmos",
        MacArray(acc_bits=32, overflow="saturate_symmetric", products_per_add=32),
        "xmos",
        _TIES_UP,
        "vendor",
        "XMOS xcore.ai VPU, int8: VLMACCR sums 32 products exactly and saturates at +-(2**31 - 1) "
        "(xmos/lib_nn, vpu_sim.c); output transform of lib_nn (its C reference: 64,000 outputs "
        "equal), zero points in its bias",
    ),
    _record(
        "xmos_int16",
        MacArray(acc_bits=32, overflow="saturate_symmetric", products_per_add=16),
        "xmos",
        _TIES_UP,
        "vendor",
        "XMOS xcore.ai VPU, int16: VLMACCR sums 16 products into accumulators of 32 bits that "
        "saturate (xmos/lib_nn, vpu_sim.c)",
        operands="int16 x int16",
    ),
)

# Codes that runtimes multiply, activations first.
_OPERANDS = {
    "onnxruntime": "int8 or uint8 x int8 or uint8",
    "litert_reference": "int8, uint8 or int16 x int8 or uint8",
    "ruy": "int8 or uint8 x int8 or uint8",
    "xnnpack": "int8 or uint8 x int8 or uint8",
    "xnnpack_neon": "int8 x int8",
    "tflite_reference": "int8 or uint8 x int8 or uint8",
    "tflite_int16": "int16 x int8",
    "fbgemm": "uint8 x int8",
    "qnnpack": "uint8 x int8 or uint8",
    "onednn": "uint8 x int8",
    "openvino": "uint8 x int8",
}
_RULE_MODES = {
    "float": _TO_EVEN,
    "double": _TIES_AWAY,
    "gemmlowp": _TIES_AWAY,
    **dict.fromkeys(("ruy", "single_rounding", "reduced_multiplier"), _TIES_UP),
}


def _of_runtime(runtime: Runtime) -> ArrayPreset:
    """The array of a runtime's kernels: sums that wrap, so that their order changes nothing."""
    wide = runtime.rule == "reduced_multiplier"
    what = f"compared with {runtime.checked}" if runtime.checked else "from its source"
    return _record(
        runtime.name,
        MacArray(acc_bits=64 if wide else 32, products_per_add=1 if wide else 4),
        runtime.rule,
        _RULE_MODES[runtime.rule],
        "measured" if runtime.checked else "vendor",
        f"{runtime.source}; {what}",
        operands=_OPERANDS[runtime.name],
        runtime=runtime.name,
    )


_RUNTIMES = (
    _of_runtime(runtime)
    for runtime in RUNTIMES.values()
    if runtime.name not in {record.name for record in _RECORDS}
)
_PRESETS = {record.name: record for record in (*_RECORDS, *_RUNTIMES)}
