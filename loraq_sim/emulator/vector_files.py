"""Test vectors as files: $readmemh hex, a JSON manifest and a SystemVerilog testbench.

Every hex file holds one word per line, two's complement, zero-padded to whole hex digits, in
row-major order. The manifest says shapes, widths, order and digests. No file takes its place before
all are written, and the manifest is the last.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.requantizers import Requantizer
from loraq_sim.emulator.vectors import GemmVectors
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing, write_together
from loraq_sim.formats import rounding_code

__all__ = ["MANIFEST", "VECTOR_FILES", "write_vectors"]

MANIFEST = "manifest.json"
_RTL_FILES = ("dut.sv", "mac.sv", "srs.sv")
_HEX_FILES = ("a.hex", "w.hex", "a_zero.hex", "w_zero.hex", "init.hex", "acc.hex", "out.hex")
VECTOR_FILES = (*_HEX_FILES, "testbench.sv", *_RTL_FILES, MANIFEST)
_INIT_BITS = 64
_OVERFLOW_CODES = {"wrap": 0, "saturate": 1, "saturate_symmetric": 2}
_SATURATION_CODES = {"none": 0, "saturate": 1, "symmetric": 3}


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
    return described | {"requantizer": _describe_requantizer(vectors.requantizer), "testbench": why}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _describe_requantizer(requantizer: Requantizer) -> dict[str, Any]:
    """Rule and parameters as JSON values; float32 operands exactly, as float64."""
    values: dict[str, Any] = {"rule": requantizer.rule}
    for field in fields(requantizer):
        value = getattr(requantizer, field.name)
        if field.name == "steps":
            value = [[name, np.asarray(operand, np.float64).tolist()] for name, operand in value]
        elif isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        if field.name != "by":
            values[field.name] = value
    return values
