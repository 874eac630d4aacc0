"""Test vectors of a tile of a GEMM: operand codes, accumulators and SRS outputs, bit exact.

`gemm_operands` takes the stored operands of one GEMM of a layer from its data path:

main   X_a Q^T     activations and weight of the main branch
down   X_b R^T     activations of the branch and its right factor
up     P^ L^T      P = X_b R^T as the data path stores it, and the left factor
feedback_down, feedback_back, feedback_up    X_f V^T, P_f V and P_f L_f^T of a residual input

`make_vectors` emulates its first M rows, N columns and K products. Group scales cut K into passes:
the MAC array runs each stretch of constant scales from zero, so there are accumulators and outputs
of every pass. (The data path multiplies each pass by its scales and adds them up; that is not part
of the vectors.)

`write_vectors` writes $readmemh hex, a JSON manifest and a SystemVerilog testbench. Every hex file
holds one word per line, two's complement, zero-padded to whole hex digits, in row-major order. The
manifest says shapes, widths, order and digests. No file takes its place before all are written, and
the manifest is the last.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.accumulation import measured
from loraq_sim.emulator.datapath import Datapath, StoredLayer
from loraq_sim.emulator.gemm import emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray, checked_int
from loraq_sim.emulator.preset_outputs import (
    describe_requantizer,
    filling_requantizer,
    outputs_at_an_end,
)
from loraq_sim.emulator.presets import ArrayPreset
from loraq_sim.emulator.requantize import SHIFT_RANGE, SrsReport, srs_report
from loraq_sim.emulator.requantizers import Requantizer
from loraq_sim.emulator.scaled_gemm import zero_points_at
from loraq_sim.emulator.walk import walk_steps
from loraq_sim.emulator.zero_points import ZeroPoints
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.files import make_folder, refuse_existing, write_together
from loraq_sim.formats import rounding_code
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.split import PrecisionSplit

__all__ = [
    *("MANIFEST", "PARTS", "VECTOR_FILES", "GemmVectors", "SrsSetting"),
    *("gemm_operands", "make_vectors", "write_vectors"),
]

PARTS = ("main", "down", "up", "feedback_down", "feedback_back", "feedback_up")
MANIFEST = "manifest.json"
_RTL_FILES = ("dut.sv", "mac.sv", "srs.sv")
_HEX_FILES = ("a.hex", "w.hex", "a_zero.hex", "w_zero.hex", "init.hex", "acc.hex", "out.hex")
VECTOR_FILES = (*_HEX_FILES, "testbench.sv", *_RTL_FILES, MANIFEST)
_INIT_BITS = 64

_OVERFLOW_CODES = {"wrap": 0, "saturate": 1, "saturate_symmetric": 2}
_SATURATION_CODES = {"none": 0, "saturate": 1, "symmetric": 3}


@dataclass(frozen=True, kw_only=True)
class SrsSetting:
    """Shift-round-saturate of the vectors; ``shift=None`` chooses one (see `make_vectors`)."""

    out_bits: int = 8
    shift: int | None = None
    rounding: str = "conv_even"
    saturation: str = "saturate"


@dataclass(frozen=True, kw_only=True, eq=False)
class GemmVectors:
    """Operands and expected results of one tile.

    Attributes
    ----------
    a, w : ndarray of shape (M, K) and (N, K), int8, uint8 or int16
        Codes in `a_bits` and `w_bits`, two's complement or, of an unsigned dtype, unsigned.
    a_zero, w_zero : ndarray of shape (passes, M) and (passes, N), int64
        Zero points, 0 where an operand has none.
    init : ndarray of shape (passes, M, N), int64
        What they take off each output, exactly (`loraq_sim.emulator.zero_points`).
    zero_point : {"initial", "after"}
        Whether accumulators start there or have it added behind them.
    pass_k : int
        Products of a pass; the last pass may be short.
    acc : ndarray of shape (passes, M, N), int32 or int64
        Accumulators of `mac`, started from `init` in every pass, or from zero and corrected after.
    out : ndarray of shape (passes, M, N), signed
        SRS outputs of `srs`, whose shift is set.
    shift_reason : str
        Why that shift.
    overflow_count, safe_acc_bits : int
        Accumulator overflows, and the narrowest width without any, over all passes.
    out_of_range_count : int
        Outputs that SRS clamped or cut; of another requantizer, those at an end of the output.
    requantizer : Requantizer or None
        What made `out` where an array preset requantizes in another way than SRS; the reference
        device cannot, so that there is no testbench.
    """

    a: NDArray[np.integer]
    w: NDArray[np.integer]
    a_bits: int
    w_bits: int
    a_zero: NDArray[np.int64]
    w_zero: NDArray[np.int64]
    init: NDArray[np.int64]
    zero_point: str
    pass_k: int
    mac: MacArray
    acc: NDArray[np.int32] | NDArray[np.int64]
    srs: SrsSetting
    out: NDArray[np.integer]
    shift_reason: str
    overflow_count: int
    safe_acc_bits: int
    out_of_range_count: int
    requantizer: Requantizer | None = None


def gemm_operands(
    part: str,
    activations: np.ndarray,
    stored: StoredLayer,
    split: PrecisionSplit,
    datapath: Datapath,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Return what one GEMM multiplies: (M, K) activations and (N, K) weights, both stored.

    K is the layer's for ``main`` and ``down``, where N is the rank; the rank for ``up``.

    Parameters
    ----------
    part : str
        One of `PARTS`.
    activations : ndarray of shape (M, K), float32
        Full-precision input rows.
    stored, split, datapath
        As for `loraq_sim.emulator.walk.run_layer`.

    Raises
    ------
    InputError
        If `part` is unknown, or names a branch that the layer does not have.
    """
    if part not in PARTS:
        raise InputError(unknown_name("part", part, PARTS))
    for done in walk_steps(activations, stored, split, datapath):
        if done.step.name == part:
            return done.inputs[0], done.weight
    lacks, such_as = ("low-rank branch", "W4A4+W8A8r8")
    if part.startswith("feedback"):
        lacks, such_as = ("residual input in this layer", "W4A4~W8A8r8f4")
    raise InputError(
        f"split {split} has no {lacks}, so there is no part {part!r}; use part 'main' or a split "
        f"such as {such_as}"
    )


def make_vectors(
    x: QuantizedTensor,
    w: QuantizedTensor,
    tile: tuple[int, int, int],
    mac: MacArray,
    srs: SrsSetting,
    *,
    zero_point: str = "initial",
    preset: ArrayPreset | None = None,
) -> GemmVectors:
    """Emulate a tile of ``x @ w.T`` and keep everything a testbench compares.

    Parameters
    ----------
    x, w : QuantizedTensor of shape (rows, K) and (columns, K)
        Integer elements, with or without zero points; equal groups along K.
    tile : (int, int, int)
        M, N and K, each from 1 to the size of the GEMM.
    mac : MacArray
    srs : SrsSetting
        Without a shift, the smallest from 0 on at which no output of the tile is out of range.
    zero_point : {"initial", "after"}
        Where the correction of zero points enters, as in `loraq_sim.emulate_gemm`.
    preset : ArrayPreset, optional
        Whose requantizer makes the outputs (`loraq_sim.emulator.preset_outputs`).

    Raises
    ------
    InputError
        If an operand has no integer codes, groups differ, or the tile does not fit.
    """
    for name, operand in (("activations", x), ("weights", w)):
        if not operand.format.element.is_integer:
            raise InputError(
                f"the {name} of this GEMM are stored as {operand.format}, which has no integer "
                "codes; choose integer formats (a branch such as W8A8, P as 'branch')"
            )
    sizes = (x.shape[0], w.shape[0], x.shape[1])
    m, n, k = (
        checked_int(f"tile {name}", size, 1, limit)
        for name, size, limit in zip("MNK", tile, sizes, strict=True)
    )
    pass_k = _common_group(x, w, k)
    a_codes, w_codes = (np.ascontiguousarray(t.codes[:rows, :k]) for t, rows in ((x, m), (w, n)))
    bits, starts = x.format.element.bits, range(0, k, pass_k)
    a_zero = np.stack([_zeros_of(x, start)[:m] for start in starts])
    w_zero = np.stack([_zeros_of(w, start)[:n] for start in starts])
    init, reports = [], []
    for start, a_zeros, w_zeros in zip(starts, a_zero, w_zero, strict=True):
        codes = a_codes[:, start : start + pass_k], w_codes[:, start : start + pass_k]
        zeros = ZeroPoints(a=a_zeros, w=w_zeros, after=zero_point == "after")
        init.append(zeros.correction(*codes))
        report = emulate_gemm_report(
            *codes, mac, a_zero=a_zeros, w_zero=w_zeros, zero_point=zero_point, a_bits=bits
        )
        reports.append(report)
    acc: NDArray[Any] = np.stack([report.acc for report in reports])
    shift, reason = _shift_of(acc, srs)
    narrowed = _narrowed(acc, shift, srs)
    requantizer = None if preset is None else filling_requantizer(preset, acc, srs.out_bits)
    if requantizer is not None:
        out = requantizer(acc)
        narrowed = SrsReport(out=out, out_of_range_count=outputs_at_an_end(out, requantizer))
    return GemmVectors(
        a=a_codes,
        w=w_codes,
        a_bits=bits,
        w_bits=w.format.element.bits,
        a_zero=a_zero,
        w_zero=w_zero,
        init=np.stack(init),
        zero_point=zero_point,
        pass_k=pass_k,
        mac=mac,
        acc=acc,
        srs=replace(srs, shift=shift),
        out=narrowed.out,
        shift_reason=reason,
        overflow_count=sum(measured(report.overflow_count) for report in reports),
        safe_acc_bits=max(measured(report.safe_acc_bits) for report in reports),
        out_of_range_count=narrowed.out_of_range_count,
        requantizer=requantizer,
    )


def _zeros_of(tensor: QuantizedTensor, start: int) -> NDArray[np.int64]:
    """Zero points of all rows from `start` of K on, (rows,); 0 where the format has none."""
    zeros = zero_points_at(tensor, start)
    return np.zeros(len(tensor.codes), np.int64) if zeros is None else zeros.astype(np.int64)


def _common_group(x: QuantizedTensor, w: QuantizedTensor, k: int) -> int:
    """Products over which both scales are constant, at most `k`."""
    sizes = {t.format.group_size or t.shape[1] for t in (x, w)}
    if len(sizes) > 1 and min(sizes) < k:
        raise InputError(
            f"activations are stored as {x.format} and weights as {w.format}: vectors need equal "
            "groups along K, so that every pass has the same length"
        )
    return min(*sizes, k)


def _shift_of(acc: NDArray[np.integer], srs: SrsSetting) -> tuple[int, str]:
    """The shift of the vectors and why that one."""
    if srs.shift is not None:
        return checked_int("shift", srs.shift, *SHIFT_RANGE), "given"
    # Sums of products stay far below 2**59, so the last shift of the hardware always fits.
    last = SHIFT_RANGE[1]
    shift = next(
        s for s in range(last + 1) if s == last or _narrowed(acc, s, srs).out_of_range_count == 0
    )
    reason = (
        f"smallest from 0 at which no output of this tile leaves {srs.out_bits} bits; "
        f"the largest accumulator magnitude is {max(int(acc.max()), -int(acc.min()))}"
    )
    return shift, reason


def _narrowed(acc: NDArray[np.integer], shift: int, srs: SrsSetting) -> SrsReport:
    return srs_report(
        acc, shift, out_bits=srs.out_bits, rounding=srs.rounding, saturation=srs.saturation
    )


def write_vectors(
    vectors: GemmVectors, folder: Path, facts: Mapping[str, Any], *, force: bool = False
) -> dict[str, Any]:
    """Write the files of `VECTOR_FILES` to `folder`, made if needed; return the manifest.

    Parameters
    ----------
    vectors : GemmVectors
    folder : Path
    facts : mapping
        Where the vectors come from, put into the manifest under ``source`` as it is (JSON values);
        its ``title``, if any, heads the testbench.
    force : bool
        Replace files that are there.

    Raises
    ------
    InputError
        If one of the files is there already and `force` is not set, `folder` is a file, or the disk
        refuses; then the folder keeps the files it had.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder for the vectors")
    refuse_existing(*(folder / name for name in VECTOR_FILES), overwrite=force)
    contents, files = _hex_files(vectors)
    manifest = {"format": "loraq-sim-vectors-v1", "source": dict(facts)} | _describe(vectors)
    manifest["files"] = files
    if vectors.requantizer is None:
        title = str(facts.get("title", "Test vectors of an integer GEMM"))
        for name, text in _verilog(vectors, title).items():
            contents[name] = text.encode("ascii")
            files[name] = {"what": _WHAT[name], "sha256": _digest(contents[name])}
        manifest |= _SIMULATE
    contents[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode("utf-8")
    make_folder(folder)
    write_together({folder / name: content for name, content in contents.items()})
    for name in set(VECTOR_FILES) - set(contents):
        # A testbench of earlier vectors does not fit these.
        (folder / name).unlink(missing_ok=True)
    return manifest


_SIMULATE = {
    "simulate": [
        f"iverilog -g2012 -o vectors.vvp testbench.sv {' '.join(_RTL_FILES)}",
        "vvp -n vectors.vvp",
    ],
    "simulate_verilator": [
        "verilator --binary --timing -Wno-lint --top-module testbench -o vectors testbench.sv "
        + " ".join(_RTL_FILES),
        "obj_dir/vectors",
    ],
}
_WHAT = {
    "a.hex": "activation codes",
    "w.hex": "weight codes",
    "a_zero.hex": "zero point of each row of activations in every pass, 0 for none",
    "w_zero.hex": "zero point of each row of weights in every pass, 0 for none",
    "init.hex": "what zero points take off each output of every pass, exactly",
    "acc.hex": "expected accumulators of every pass",
    "out.hex": "expected outputs of every pass",
    "testbench.sv": "runs the device and compares it with the hex files",
    "dut.sv": "device under test: the reference; replace it by your own",
    "mac.sv": "reference MAC column",
    "srs.sv": "reference shift-round-saturate",
}


def _hex_files(vectors: GemmVectors) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
    """Content and manifest entry of each hex file by name."""
    a_sign, w_sign = (codes.dtype.kind == "i" for codes in (vectors.a, vectors.w))
    words: dict[str, tuple[NDArray[np.integer], int, tuple[str, ...], bool]] = {
        "a.hex": (vectors.a, vectors.a_bits, ("m", "k"), a_sign),
        "w.hex": (vectors.w, vectors.w_bits, ("n", "k"), w_sign),
        "a_zero.hex": (vectors.a_zero, vectors.a_bits, ("pass", "m"), a_sign),
        "w_zero.hex": (vectors.w_zero, vectors.w_bits, ("pass", "n"), w_sign),
        "init.hex": (vectors.init, _INIT_BITS, ("pass", "m", "n"), True),
        "acc.hex": (vectors.acc, _acc_bits(vectors), ("pass", "m", "n"), True),
        "out.hex": (
            vectors.out,
            vectors.srs.out_bits,
            ("pass", "m", "n"),
            vectors.out.dtype.kind == "i",
        ),
    }
    contents, files = {}, {}
    for name, (values, bits, axes, is_signed) in words.items():
        contents[name] = data = _hex_lines(values, bits)
        files[name] = {
            "what": _WHAT[name],
            "axes": list(axes),
            "shape": list(values.shape),
            "order": "row-major, last axis fastest",
            "words": values.size,
            "bits": bits,
            "digits": -(-bits // 4),
            "signed": is_signed,
            "sha256": _digest(data),
        }
    return contents, files


def _acc_bits(vectors: GemmVectors) -> int:
    """Width of the expected accumulators; what is corrected behind them has 64 bits."""
    return 64 if vectors.zero_point == "after" else vectors.mac.acc_bits


def _hex_lines(values: NDArray[np.integer], bits: int) -> bytes:
    mask, digits = 2**bits - 1, -(-bits // 4)
    words = values.reshape(-1).tolist()
    return "".join(f"{word & mask:0{digits}x}\n" for word in words).encode("ascii")


def _verilog(vectors: GemmVectors, title: str) -> dict[str, str]:
    """Return the testbench with its parameters set, and the reference device as it is."""
    folder = resources.files("loraq_sim.emulator") / "rtl"
    sources = {
        name: (folder / name).read_text(encoding="ascii") for name in ("testbench.sv", *_RTL_FILES)
    }
    lines = [f"    localparam {key} = {value};" for key, value in _parameters(vectors).items()]
    # A title may hold a layer name; what is not plain text could end the comment line.
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in title)
    sources["testbench.sv"] = (
        sources["testbench.sv"].replace("@PARAMETERS@", "\n".join(lines)).replace("@TITLE@", plain)
    )
    return sources


def _parameters(vectors: GemmVectors) -> dict[str, int]:
    mac, srs = vectors.mac, vectors.srs
    passes, m, n = vectors.acc.shape
    return {
        "M": m,
        "N": n,
        "K": vectors.a.shape[1],
        "PASSES": passes,
        "PASS_K": vectors.pass_k,
        "AW": vectors.a_bits,
        "WW": vectors.w_bits,
        "A_SIGNED": int(vectors.a.dtype.kind == "i"),
        "W_SIGNED": int(vectors.w.dtype.kind == "i"),
        "AFTER": int(vectors.zero_point == "after"),
        "RESULT": _acc_bits(vectors),
        "C": mac.products_per_add,
        "P": mac.accumulators,
        "ACC": mac.acc_bits,
        "OVERFLOW": _OVERFLOW_CODES[mac.overflow],
        "TREE": mac.tree_bits or 0,
        "TREE_OVERFLOW": _OVERFLOW_CODES[mac.tree_rule],
        "OUT": srs.out_bits,
        "SHIFT": srs.shift,
        "ROUNDING": rounding_code(srs.rounding, "aie-ml"),
        "SATURATION": _SATURATION_CODES[srs.saturation],
    }


def _describe(vectors: GemmVectors) -> dict[str, Any]:
    mac, srs = vectors.mac, vectors.srs
    passes, m, n = vectors.acc.shape
    k = vectors.a.shape[1]
    described = {
        "tile": {"m": m, "k": k, "n": n},
        "passes": [
            [start, min(start + vectors.pass_k, k)] for start in range(0, k, vectors.pass_k)
        ],
        "meaning": "acc[p, i, j] = MAC array over k in passes[p] of a[i, k] * w[j, k], from "
        "init[p, i, j] under the overflow rule, or with zero_point 'after' from zero, and init "
        "added behind it in 64 bits; init = sum over k of (a - a_zero) * (w - w_zero) - a * w; "
        "out = srs(acc). Scales of the passes are not part of these vectors",
        "zero_point": vectors.zero_point,
        "mac_array": {
            "acc_bits": mac.acc_bits,
            "overflow": mac.overflow,
            "products_per_add": mac.products_per_add,
            "accumulators": mac.accumulators,
            "tree_bits": mac.tree_bits,
            "tree_overflow": mac.tree_rule if mac.tree_bits is not None else None,
        },
        "srs": {
            "out_bits": srs.out_bits,
            "signed": True,
            "shift": srs.shift,
            "shift_reason": vectors.shift_reason,
            "rounding": srs.rounding,
            "saturation": srs.saturation,
        },
        "counts": {
            "accumulators": passes * m * n,
            "overflows": vectors.overflow_count,
            "safe_acc_bits": vectors.safe_acc_bits,
            "outputs_out_of_range": vectors.out_of_range_count,
        },
        "testbench_parameters": _parameters(vectors),
    }
    if vectors.requantizer is None:
        return described
    del described["srs"], described["testbench_parameters"]
    rule = vectors.requantizer.rule
    described["meaning"] = str(described["meaning"]).replace("srs(acc)", "requantizer(acc)")
    why = f"none: outputs are requantized by {rule}, the reference device shifts (SRS)"
    return described | {"requantizer": describe_requantizer(vectors.requantizer), "testbench": why}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
