"""Write test vectors as $readmemh hex, a JSON manifest and a SystemVerilog testbench.

Every hex file holds one word per line, two's complement, zero-padded to whole hex digits, in
row-major order. The manifest says shapes, widths, order and digests. No file takes its place before
all are written, and the manifest is the last.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.vectors import GemmVectors
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing, write_together
from loraq_sim.rounding import rounding_code

__all__ = ["MANIFEST", "VECTOR_FILES", "write_vectors"]

MANIFEST = "manifest.json"
_RTL_FILES = ("dut.sv", "mac.sv", "srs.sv")
VECTOR_FILES = ("a.hex", "w.hex", "acc.hex", "out.hex", "testbench.sv", *_RTL_FILES, MANIFEST)

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
