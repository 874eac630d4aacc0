"""Measured GEMM times as rows: read, checked, and as the call that each one timed.

Measured kernels take codes, so rounding X is no part of them. Integer kernels have no group scales:
integers go out through a shift (SRS), and partial sums between K tiles are kept in the output
format. The words of the `kernel` column say what ran:

    single core ...                  one unit, operands resident: kernel cycles alone
    ... rank R FORMAT branch ...     with a low-rank branch; `unfused`: three kernels; `recompute`
                                     (here or in the notes): each output tile forms its own P;
                                     `residual input`: the branch takes its part out of X first;
                                     else P is given, as in the GEMM kernel of SVDQuant
    anything else                    one plain GEMM

Columns that may be missing or empty: `family`, the kernel family of the machine's file (else the
one whose words, `matches`, stand in kernel, notes or source; else the one a user would get);
`weights`, what L2 held: cold, warm (a loop over one call) or flushed (a cache overwritten before
each call, as Triton's do_bench does); `launch`, stream or graph. A benchmark loops over one call
where nothing else is said.
"""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError, read_text
from hwmodels.kernel_cost import LaunchState, WeightState
from hwmodels.overrides import apply_variant
from hwmodels.workload import GemmWorkload

__all__ = [
    "MEASURED_CSV",
    "Row",
    "RowState",
    "Tile",
    "family_of",
    "is_of",
    "machine_of",
    "measured_rows",
    "state_of",
    "tile_of",
    "workload_of",
]

MEASURED_CSV = Path(__file__).parent / "measured_gemm.csv"
_NEEDED = ("device", "kernel", "a_format", "w_format", "out_format", "M", "K", "N", "time_ms")
# Family and bits of an element; plain fp8 has a scale per tensor only.
_FORMATS = {
    **{f"int{bits}": ("int", bits) for bits in (4, 6, 8)},
    **dict.fromkeys(("fp16", "bf16"), ("float", 16)),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), ("fp8", 8)),
    **dict.fromkeys(("mxfp8", "mxfp8_e4m3", "mxfp8_e5m2"), ("mxfp", 8)),
    **{"mxfp6": ("mxfp", 6), "mxfp4": ("mxfp", 4), "nvfp4": ("nvfp", 4)},
    **{"mxint8": ("mxint", 8), "mxint4": ("mxint", 4), "bfp16ebs8": ("mxint", 8)},
}
_OUT_BITS = {"int8": 8, "int16": 16, "int32": 32, "fp16": 16, "bf16": 16, "fp32": 32}
_OUT_BITS |= dict.fromkeys(("fp8", "fp8_e4m3", "mxfp8", "mxfp8_e4m3"), 8)
_BRANCH = re.compile(r"rank ([0-9]{1,6}) (\w+) branch", re.IGNORECASE)
_STATES = {"weights": ("cold", "warm", "flushed"), "launch": ("stream", "graph")}
# Benchmarks that overwrite L2 before each call; their graph variant does not.
_FLUSHING = re.compile(r"do_bench(?!_cudagraph)|sglang pr|triton (issue|pr)|flashinfer")
_GRAPHS = re.compile(r"cuda ?graph|_cudagraph")
_SIZES = ("M", "N", "K")
Tile = tuple[int, int, int]
Row = dict[str, str]
_SIZE = re.compile(r"[0-9]{1,9}")
_MAX_FILE_BYTES = 16 * 2**20
# Of sizes and of milliseconds; beyond these an error relative to them is no number.
_LEAST, _LARGEST = 1e-9, 1e12


def measured_rows(path: str | Path = MEASURED_CSV) -> list[dict[str, str]]:
    """Rows of a measured table.

    Raises
    ------
    AcceleratorError
        If the file cannot be read or lacks a column.
    """
    try:
        text = read_text(Path(path), "measured table", _MAX_FILE_BYTES)
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise AcceleratorError(f"cannot read measured table {path}: {error}") from None
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise AcceleratorError(
            f"{path}: missing column {missing[0]!r}; needed: {', '.join(_NEEDED)}"
        )
    if not rows:
        raise AcceleratorError(f"{path}: no row below the header; write one for each measured time")
    for line, row in enumerate(rows, start=2):
        _check(row, f"{path}:{line}")
    return rows


def workload_of(row: dict[str, str]) -> GemmWorkload:
    """The GEMM a measured row timed.

    Raises
    ------
    AcceleratorError
        If a format of the row is unknown or the families of its operands do not go together.
    """
    a_family, a_bits = _format(row["a_format"])
    w_family, w_bits = _format(row["w_format"])
    families = {a_family, w_family} - {"float"}
    if len(families) > 1:
        raise AcceleratorError(
            f"a_format {row['a_format']!r} and w_format {row['w_format']!r} are of two families"
        )
    family = families.pop() if families else "int"
    is_unscaled = family in ("int", "fp8")
    out_bits = _OUT_BITS[row["out_format"]]
    return GemmWorkload(
        m=int(row["M"]),
        n=int(row["N"]),
        k=int(row["K"]),
        main=f"W{w_bits}A{a_bits}",
        out_bits=out_bits,
        partial_bits=out_bits,
        group=None,
        scale_bits=0 if is_unscaled else 8,
        family="mxfp" if family == "fp8" else family,
        rounds_x=False,  # The kernels are timed on codes.
        **_branch_of(row),
    )


class _Branch(TypedDict):
    branch: str | None
    rank: int
    feedback_rank: int
    branch_schedule: str | None


def _branch_of(row: dict[str, str]) -> _Branch:
    found = _BRANCH.search(row["kernel"])
    if found is None:
        return {"branch": None, "rank": 0, "feedback_rank": 0, "branch_schedule": None}
    said = f"{row['kernel']} {row.get('notes') or ''}".lower()
    is_residual, rank = "residual input" in row["kernel"].lower(), int(found[1])
    schedule = "fused" if is_residual else "given_p"
    if "unfused" in row["kernel"].lower():
        schedule = "unfused"
    elif "recompute" in said:
        schedule = "recompute"
    bits = _format(found[2].lower())[1]
    return {
        "branch": f"W{bits}A{bits}",
        "rank": rank,
        "feedback_rank": rank if is_residual else 0,
        "branch_schedule": schedule,
    }


def _format(name: str) -> tuple[str, int]:
    if name not in _FORMATS:
        raise AcceleratorError(f"unknown format {name!r:.60}; known: {', '.join(_FORMATS)}")
    return _FORMATS[name]


def _check(row: dict[str, str], where: str) -> None:
    for name in ("device", "kernel"):
        # A short row has no value here.
        if row[name] is None or not row[name].isprintable():
            raise AcceleratorError(f"{where}: {name} must be a text, got {row[name]!r:.60}")
    for name in (*_SIZES, "time_ms"):
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            value = 0.0
        is_size = name not in _SIZES or _SIZE.fullmatch((row[name] or "").strip())
        if not _LEAST <= value <= _LARGEST or not is_size:
            raise AcceleratorError(
                f"{where}: {name} must be a positive number, got {row[name]!r:.60}"
            )
    if row["out_format"] not in _OUT_BITS:
        raise AcceleratorError(
            f"{where}: unknown out_format {row['out_format']!r:.60}; known: {', '.join(_OUT_BITS)}"
        )
    for name, known in _STATES.items():
        if (row.get(name) or known[0]) not in known:
            raise AcceleratorError(
                f"{where}: {name} must be one of {', '.join(known)}, got {row[name]!r:.60}"
            )
    try:
        workload_of(row)
    except AcceleratorError as error:
        raise AcceleratorError(f"{where}: {error}") from None


def is_of(hw: Accelerator, row: dict[str, str]) -> bool:
    """Whether a row was measured on `hw`; rows of a machine are rows of each of its variants."""
    names = {hw.name, hw.name.partition("@")[0], *hw.aliases}
    return row["device"].strip().lower() in names


def machine_of(hw: Accelerator, row: dict[str, str]) -> Accelerator:
    """`hw`, or its variant whose product the row names; a variant that was chosen stays."""
    if "@" in hw.name:
        return hw
    said = _said(row)
    for variant in hw.variants:
        if any(product.lower() in said for product in variant.products):
            return apply_variant(hw, variant.name)
    return hw


def family_of(hw: Accelerator, row: dict[str, str]) -> str | None:
    """Kernel family of a row: the one it names, or whose words it says; None: the usual one."""
    named = (row.get("family") or "").strip()
    if named:
        return named
    said, m = _said(row), int(row["M"])
    serves = "plain" if _BRANCH.search(row["kernel"]) is None else "branch"
    matched = [
        (family.m_max is not None, len(word), family.name)
        for family in hw.kernels
        for word in family.matches
        if serves in family.serves and m <= (family.m_max or m) and word.lower() in said
    ]
    # Kernels for few rows are named by what they are, the others by their library: the longest
    # word says most.
    return max(matched)[2] if matched else None


@dataclass(frozen=True, kw_only=True)
class RowState:
    """The state a row was measured in, as `estimate_cost` takes it."""

    weights: WeightState
    launch: LaunchState


def state_of(row: dict[str, str]) -> RowState:
    """What L2 held and how the call was launched: what the row says, or how its source times."""
    said = _said(row)
    weights: WeightState = "flushed" if _FLUSHING.search(said) else "warm"
    launch: LaunchState = "graph" if _GRAPHS.search(said) else "stream"
    if row.get("weights") in ("cold", "warm", "flushed"):
        weights = row["weights"]  # type: ignore[assignment]  # one of the three
    if row.get("launch") in ("stream", "graph"):
        launch = row["launch"]  # type: ignore[assignment]  # one of the two
    return RowState(weights=weights, launch=launch)


def _said(row: dict[str, str]) -> str:
    return " ".join(row.get(name) or "" for name in ("kernel", "notes", "source")).lower()


def tile_of(row: dict[str, str]) -> Tile | None:
    """(m, k, n) of "112x112x112"; None when the row does not say."""
    sizes = [size.strip() for size in (row.get("tile_mkn") or "").split("x")]
    if len(sizes) != 3 or not all(_SIZE.fullmatch(size) and int(size) for size in sizes):
        return None
    m, k, n = (int(size) for size in sizes)
    return m, k, n
