"""Predicted against measured: the shipped table of public GEMM timings, or a user's own CSV.

Measured kernels have no group scales: integers go out through a shift (SRS), and partial sums
between K tiles are kept in the output format.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

from hwmodels.branch import split_into_kernels
from hwmodels.cost import estimate_cost
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError
from hwmodels.kernel_cycles import single_core_cycles
from hwmodels.workload import GemmWorkload

__all__ = ["MEASURED_CSV", "measured_rows", "validate"]

MEASURED_CSV = Path(__file__).parent / "measured_gemm.csv"
_BITS = {"int4": 4, "int8": 8, "int16": 16, "int32": 32, "fp16": 16, "bf16": 16, "fp32": 32}
_NEEDED = ("device", "kernel", "a_format", "w_format", "out_format", "M", "K", "N", "time_ms")


def measured_rows(path: str | Path = MEASURED_CSV) -> list[dict[str, str]]:
    """Rows of a measured table.

    Raises
    ------
    AcceleratorError
        If the file cannot be read or lacks a column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AcceleratorError(f"cannot read measured table {path}: {error}") from None
    missing = [name for name in _NEEDED if not rows or name not in rows[0]]
    if missing:
        raise AcceleratorError(
            f"{path}: missing column {missing[0]!r}; needed: {', '.join(_NEEDED)}"
        )
    return rows


def validate(
    hw: Accelerator, rows: Iterable[dict[str, str]], *, search_tiles: bool = False
) -> list[dict]:
    """Predicted time of every row measured on `hw` that its modes can express.

    Rows of other devices, and with formats the integer and 16-bit modes do not cover, are left
    out. `search_tiles` uses the best tile found instead of the tile the row was measured with.
    Each result has device, kernel, m, n, k, out_bits, tile_mkn, measured_ms, predicted_ms, error
    (signed, relative to measured) and bound.
    """
    names = {hw.name, *hw.aliases}
    results = []
    for row in rows:
        formats = (row["a_format"], row["w_format"], row["out_format"])
        if row["device"] in names and all(f in _BITS for f in formats) and _is_plain(row):
            results.append(_compare(hw, row, search_tiles=search_tiles))
    return results


def _is_plain(row: dict[str, str]) -> bool:
    return "branch" not in row["kernel"]


def _compare(hw: Accelerator, row: dict[str, str], *, search_tiles: bool) -> dict:
    work = _workload(row)
    tile = None if search_tiles else _tile(row.get("tile_mkn") or "")
    if row["kernel"].startswith("single core"):
        tile = (work.m, work.k, work.n) if tile is None else tile
        cycles = single_core_cycles(hw, split_into_kernels(work, hw)[0], tile)
        predicted_s, bound = cycles / hw.units.clock_hz, "compute"
    else:
        cost = estimate_cost(work, hw, tile_mkn=tile)
        predicted_s, bound, tile = cost.latency_s, cost.bound, cost.tile_mkn
    measured_ms = float(row["time_ms"])
    return {
        "device": row["device"],
        "kernel": row["kernel"],
        "m": work.m,
        "n": work.n,
        "k": work.k,
        "main": work.main,
        "out_bits": work.out_bits,
        "tile_mkn": tile,
        "measured_ms": measured_ms,
        "predicted_ms": predicted_s * 1e3,
        "error": predicted_s * 1e3 / measured_ms - 1.0,
        "bound": bound,
    }


def _workload(row: dict[str, str]) -> GemmWorkload:
    out_bits = _BITS[row["out_format"]]
    return GemmWorkload(
        m=int(row["M"]),
        n=int(row["N"]),
        k=int(row["K"]),
        main=f"W{_BITS[row['w_format']]}A{_BITS[row['a_format']]}",
        out_bits=out_bits,
        group=None,
        scale_bits=0,
        partial_bits=out_bits,
    )


def _tile(text: str) -> tuple[int, int, int] | None:
    """(m, k, n) of "112x112x112"; None when the row does not say."""
    sizes = text.split("x")
    return tuple(int(size) for size in sizes) if len(sizes) == 3 else None
