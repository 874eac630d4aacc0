"""Test vectors of a tile of a GEMM: operand codes, accumulators and SRS outputs, bit exact.

`gemm_operands` takes the stored operands of one GEMM of a layer from its data path:

main   X_a Q^T     activations and weight of the main branch
down   X_b R^T     activations of the branch and its right factor
up     P^ L^T      P = X_b R^T as the data path stores it, and the left factor

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
from loraq_sim.emulator.datapath import Datapath, StoredLayer, walk_steps
from loraq_sim.emulator.gemm import emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray, checked_int
from loraq_sim.emulator.requantize import SHIFT_RANGE, SrsReport, srs_report
from loraq_sim.emulator.tile_job import as_accumulators
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.files import make_folder, refuse_existing, write_together
from loraq_sim.formats import rounding_code
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.split import PrecisionSplit

__all__ = [
    "GemmVectors",
    "MANIFEST",
    "PARTS",
    "SrsSetting",
    "VECTOR_FILES",
    "gemm_operands",
    "make_vectors",
    "write_vectors",
]


PARTS = ("main", "down", "up")
MANIFEST = "manifest.json"
_RTL_FILES = ("dut.sv", "mac.sv", "srs.sv")
VECTOR_FILES = ("a.hex", "w.hex", "acc.hex", "out.hex", "testbench.sv", *_RTL_FILES, MANIFEST)

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
    a, w : ndarray of shape (M, K) and (N, K), int8
        Codes, two's complement in `a_bits` and `w_bits`.
    pass_k : int
        Products of a pass; the last pass may be short.
    acc : ndarray of shape (passes, M, N), int32 or int64
        Accumulators of `mac`, started from zero in every pass.
    out : ndarray of shape (passes, M, N), signed
        SRS outputs of `srs`, whose shift is set.
    shift_reason : str
        Why that shift.
    overflow_count, safe_acc_bits : int
        Accumulator overflows, and the narrowest width without any, over all passes.
    out_of_range_count : int
        Outputs that SRS clamped or cut.
    """

    a: NDArray[np.int8]
    w: NDArray[np.int8]
    a_bits: int
    w_bits: int
    pass_k: int
    mac: MacArray
    acc: NDArray[np.int32] | NDArray[np.int64]
    srs: SrsSetting
    out: NDArray[np.integer]
    shift_reason: str
    overflow_count: int
    safe_acc_bits: int
    out_of_range_count: int


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
    part : {"main", "down", "up"}
    activations : ndarray of shape (M, K), float32
        Full-precision input rows.
    stored, split, datapath
        As for `loraq_sim.emulator.datapath.run_layer`.

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
    raise InputError(
        f"split {split} has no low-rank branch, so there is no part {part!r}; use part 'main' "
        "or a split such as W4A4+W8A8r8"
    )


def make_vectors(
    x: QuantizedTensor,
    w: QuantizedTensor,
    tile: tuple[int, int, int],
    mac: MacArray,
    srs: SrsSetting,
) -> GemmVectors:
    """Emulate a tile of ``x @ w.T`` and keep everything a testbench compares.

    Parameters
    ----------
    x, w : QuantizedTensor of shape (rows, K) and (columns, K)
        Signed integer elements, equal groups along K.
    tile : (int, int, int)
        M, N and K, each from 1 to the size of the GEMM.
    mac : MacArray
    srs : SrsSetting
        Without a shift, the smallest from 0 on at which no output of the tile is out of range.

    Raises
    ------
    InputError
        If an operand has no signed integer codes, groups differ, or the tile does not fit.
    """
    for name, operand in (("activations", x), ("weights", w)):
        element = operand.format.element
        if not (element.is_integer and element.is_signed):
            raise InputError(
                f"the {name} of this GEMM are stored as {operand.format}, which has no signed "
                "integer codes; choose integer formats (a branch such as W8A8, P as 'branch')"
            )
    sizes = (x.shape[0], w.shape[0], x.shape[1])
    m, n, k = (
        checked_int(f"tile {name}", size, 1, limit)
        for name, size, limit in zip("MNK", tile, sizes, strict=True)
    )
    pass_k = _common_group(x, w, k)
    a_codes, w_codes = (np.ascontiguousarray(t.codes[:rows, :k]) for t, rows in ((x, m), (w, n)))
    bits = x.format.element.bits
    reports = [
        emulate_gemm_report(
            a_codes[:, s : s + pass_k], w_codes[:, s : s + pass_k], mac, a_bits=bits
        )
        for s in range(0, k, pass_k)
    ]
    acc = as_accumulators(np.stack([report.acc for report in reports]), mac)
    shift, reason = _shift_of(acc, srs)
    narrowed = _narrowed(acc, shift, srs)
    return GemmVectors(
        a=a_codes,
        w=w_codes,
        a_bits=bits,
        w_bits=w.format.element.bits,
        pass_k=pass_k,
        mac=mac,
        acc=acc,
        srs=replace(srs, shift=shift),
        out=narrowed.out,
        shift_reason=reason,
        overflow_count=sum(measured(report.overflow_count) for report in reports),
        safe_acc_bits=max(measured(report.safe_acc_bits) for report in reports),
        out_of_range_count=narrowed.out_of_range_count,
    )


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
    # Sums of 8-bit products stay far below 2**59, so the last shift of the hardware always fits.
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
    title = str(facts.get("title", "Test vectors of an integer GEMM"))
    for name, text in _verilog(vectors, title).items():
        contents[name] = text.encode("ascii")
        files[name] = {"what": _WHAT[name], "sha256": _digest(contents[name])}
    manifest = {"format": "loraq-sim-vectors-v1", "source": dict(facts)} | _describe(vectors)
    manifest["files"] = files
    manifest["simulate"] = [
        f"iverilog -g2012 -o vectors.vvp testbench.sv {' '.join(_RTL_FILES)}",
        "vvp -n vectors.vvp",
    ]
    manifest["simulate_verilator"] = [
        "verilator --binary --timing -Wno-lint --top-module testbench -o vectors testbench.sv "
        + " ".join(_RTL_FILES),
        "obj_dir/vectors",
    ]
    contents[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode("utf-8")
    make_folder(folder)
    write_together({folder / name: content for name, content in contents.items()})
    return manifest


_WHAT = {
    "a.hex": "activation codes",
    "w.hex": "weight codes",
    "acc.hex": "expected accumulators of every pass",
    "out.hex": "expected shift-round-saturate outputs of every pass",
    "testbench.sv": "runs the device and compares it with the hex files",
    "dut.sv": "device under test: the reference; replace it by your own",
    "mac.sv": "reference MAC column",
    "srs.sv": "reference shift-round-saturate",
}


def _hex_files(vectors: GemmVectors) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
    """Content and manifest entry of each hex file by name."""
    codes = {
        "a.hex": (vectors.a, vectors.a_bits, ("m", "k")),
        "w.hex": (vectors.w, vectors.w_bits, ("n", "k")),
        "acc.hex": (vectors.acc, vectors.mac.acc_bits, ("pass", "m", "n")),
        "out.hex": (vectors.out, vectors.srs.out_bits, ("pass", "m", "n")),
    }
    contents, files = {}, {}
    for name, (values, bits, axes) in codes.items():
        contents[name] = data = _hex_lines(values, bits)
        files[name] = {
            "what": _WHAT[name],
            "axes": list(axes),
            "shape": list(values.shape),
            "order": "row-major, last axis fastest",
            "words": values.size,
            "bits": bits,
            "digits": -(-bits // 4),
            "signed": True,
            "sha256": _digest(data),
        }
    return contents, files


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
    return {
        "tile": {"m": m, "k": k, "n": n},
        "passes": [
            [start, min(start + vectors.pass_k, k)] for start in range(0, k, vectors.pass_k)
        ],
        "meaning": "acc[p, i, j] = MAC array over k in passes[p] of a[i, k] * w[j, k], from zero; "
        "out = srs(acc). Scales of the passes are not part of these vectors",
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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
