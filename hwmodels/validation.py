"""How far a prediction can be trusted: against measurements, and how it hangs on each number.

`validate` compares with the shipped table of public GEMM timings, or with a user's own CSV.
Measured kernels take codes, so rounding X is no part of them. Integer kernels have no group scales:
integers go out through a shift (SRS), and partial sums between K tiles are kept in the output
format. The words of the `kernel` column say what ran:

    single core ...                  one unit, operands resident: kernel cycles alone
    ... rank R FORMAT branch ...     with a low-rank branch; `unfused`: three kernels; `recompute`
                                     (here or in the notes): each output tile forms its own P;
                                     else P is given, as in the GEMM kernel of SVDQuant
    anything else                    one plain GEMM

A row whose notes or source name a product of a variant (`products` in the file) is predicted on
that variant.

`sensitivity` says which numbers of an accelerator's file a cost depends on. Every number is changed
by the same fraction, one at a time, and the cost is estimated again:

    elasticity = (change of the cost, relative) / (change of the number, relative)

-1 for a clock that everything waits for, 0 for a number that does not matter here. Whole numbers
move by at least one; a change that breaks a rule of the file is left out.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from hwmodels.branch import split_into_kernels
from hwmodels.cost import Cost, estimate_cost
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError, read_text
from hwmodels.kernel_cycles import single_core_cycles
from hwmodels.overrides import apply_variant, keys_of, with_overrides
from hwmodels.workload import GemmWorkload

__all__ = [
    "MEASURED_CSV",
    "branch_overheads",
    "measured_rows",
    "sensitivity",
    "summarize",
    "validate",
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
_SIZES = ("M", "N", "K")
_SIZE = re.compile(r"[0-9]{1,9}")
_MAX_FILE_BYTES = 16 * 2**20
# Of sizes and of milliseconds; beyond these an error relative to them is no number.
_LEAST, _LARGEST = 1e-9, 1e12
_METRICS = ("latency_s", "energy_j", "dram_bytes")


def measured_rows(path: str | Path = MEASURED_CSV) -> list[dict[str, str]]:
    """Rows of a measured table.

    Raises
    ------
    AcceleratorError
        If the file cannot be read or lacks a column.
    """
    try:
        text = read_text(Path(path), "measured table", _MAX_FILE_BYTES)
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise AcceleratorError(f"cannot read measured table {path}: {error}") from None
    missing = [name for name in _NEEDED if not rows or name not in rows[0]]
    if missing:
        raise AcceleratorError(
            f"{path}: missing column {missing[0]!r}; needed: {', '.join(_NEEDED)}"
        )
    for line, row in enumerate(rows, start=2):
        _check(row, f"{path}:{line}")
    return rows


def validate(
    hw: Accelerator, rows: Iterable[dict[str, str]], *, search_tiles: bool = False
) -> list[dict[str, Any]]:
    """Predicted time of every row measured on `hw`; rows of other devices are left out.

    `search_tiles` uses the best tile found instead of the tile the row was measured with. Each
    result has device, variant, kernel, m, n, k, main, branch, out_bits, tile_mkn, measured_ms,
    predicted_ms, error (signed, relative to measured) and bound.
    """
    # Rows of the machine are rows of each of its variants: b200 of b200@tuned.
    names = {hw.name, hw.name.partition("@")[0], *hw.aliases}
    return [
        _compare(_on_variant(hw, row), row, search_tiles=search_tiles)
        for row in rows
        if row["device"].strip().lower() in names
    ]


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per device: rows, mean and worst absolute relative error."""
    summary = []
    for device in dict.fromkeys(row["device"] for row in results):
        errors = [abs(row["error"]) for row in results if row["device"] == device]
        summary.append(
            {
                "device": device,
                "rows": len(errors),
                "mean_error": sum(errors) / len(errors),
                "worst_error": max(errors),
            }
        )
    return summary


def branch_overheads(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured and predicted overhead of a branch, where a plain row of the same GEMM exists.

    Overheads are fractions of the plain time; `difference` is predicted minus measured.
    """
    alike = ("device", "m", "n", "k", "main", "family", "out_bits")
    plain = {tuple(r[key] for key in alike): r for r in results if r["rank"] == 0}
    rows = []
    for row in results:
        base = plain.get(tuple(row[key] for key in alike))
        if row["rank"] == 0 or base is None:
            continue
        measured, predicted = (
            row[name] / base[name] - 1.0 for name in ("measured_ms", "predicted_ms")
        )
        rows.append(
            {key: row[key] for key in ("device", "kernel", "m", "n", "k", "rank")}
            | {"measured_overhead": measured, "predicted_overhead": predicted}
            | {"difference": predicted - measured}
        )
    return rows


def _workload_of(row: dict[str, str]) -> GemmWorkload:
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
    branch_schedule: str | None


def _branch_of(row: dict[str, str]) -> _Branch:
    found = _BRANCH.search(row["kernel"])
    if found is None:
        return {"branch": None, "rank": 0, "branch_schedule": None}
    said = f"{row['kernel']} {row.get('notes') or ''}".lower()
    schedule = "given_p"
    if "unfused" in row["kernel"].lower():
        schedule = "unfused"
    elif "recompute" in said:
        schedule = "recompute"
    bits = _format(found[2].lower())[1]
    return {"branch": f"W{bits}A{bits}", "rank": int(found[1]), "branch_schedule": schedule}


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
    try:
        _workload_of(row)
    except AcceleratorError as error:
        raise AcceleratorError(f"{where}: {error}") from None


def _on_variant(hw: Accelerator, row: dict[str, str]) -> Accelerator:
    if "@" in hw.name:
        return hw  # The caller chose the variant.
    said = " ".join(row.get(name) or "" for name in ("kernel", "notes", "source")).lower()
    for variant in hw.variants:
        if any(product.lower() in said for product in variant.products):
            return apply_variant(hw, variant.name)
    return hw


def _compare(hw: Accelerator, row: dict[str, str], *, search_tiles: bool) -> dict[str, Any]:
    work = _workload_of(row)
    tile = None if search_tiles else _tile(row.get("tile_mkn") or "")
    if row["kernel"].startswith("single core"):
        tile = (work.m, work.k, work.n) if tile is None else tile
        cycles = single_core_cycles(hw, split_into_kernels(work, hw)[0], tile)
        predicted_s, bound = cycles / hw.units.clock_hz, "compute"
    else:
        cost = _cost_with(work, hw, tile)
        predicted_s, bound, tile = cost.latency_s, cost.bound, cost.tile_mkn
    measured_ms = float(row["time_ms"])
    return {
        "device": row["device"].strip().lower(),
        "accelerator": hw.name,
        "kernel": row["kernel"],
        "m": work.m,
        "n": work.n,
        "k": work.k,
        "main": work.main,
        "family": work.family,
        "rank": work.rank,
        "out_bits": work.out_bits,
        "tile_mkn": "x".join(str(size) for size in tile),
        "measured_ms": measured_ms,
        "predicted_ms": predicted_s * 1e3,
        "error": predicted_s * 1e3 / measured_ms - 1.0,
        "bound": bound,
    }


def _cost_with(work: GemmWorkload, hw: Accelerator, tile: tuple[int, int, int] | None) -> Cost:
    """Cost with the tile of the row; searched where that breaks our buffering rules.

    Kernels that buffer one operand less run tiles that do not fit when all are double-buffered.
    """
    if tile is None:
        return estimate_cost(work, hw)
    try:
        return estimate_cost(work, hw, tile_mkn=tile)
    except AcceleratorError:
        return estimate_cost(work, hw)


def _tile(text: str) -> tuple[int, int, int] | None:
    """(m, k, n) of "112x112x112"; None when the row does not say."""
    sizes = [size.strip() for size in text.split("x")]
    if len(sizes) != 3 or not all(_SIZE.fullmatch(size) and int(size) for size in sizes):
        return None
    m, k, n = (int(size) for size in sizes)
    return m, k, n


def sensitivity(
    work: GemmWorkload,
    hw: Accelerator,
    *,
    step: float = 0.1,
    cost_of: Callable[[GemmWorkload, Accelerator], Cost] = estimate_cost,
) -> list[dict[str, Any]]:
    """Rows of key, value, elasticities of latency, energy and DRAM bytes, and `latency_range`.

    `latency_range` is what the block's own `uncertainty_percent` means for the latency, as a
    fraction; None where the block states none. Rows without any effect are left out; the largest
    effect on latency comes first.
    """
    content = hw.model_dump()
    base = cost_of(work, hw)
    rows = []
    for key, steps in keys_of(hw).items():
        block: Any = content
        for part in steps[:-1]:
            block = block[part]
        value = block[steps[-1]]
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            continue
        moved = (
            value + max(1, round(value * step)) if isinstance(value, int) else value * (1 + step)
        )
        try:
            changed = cost_of(work, with_overrides(hw, {key: moved}))
        except AcceleratorError:
            continue
        relative = moved / value - 1
        row = {
            name: (getattr(changed, name) / getattr(base, name) - 1) / relative for name in _METRICS
        }
        # Sums in another order differ in the last bits.
        if all(abs(effect) < 1e-9 for effect in row.values()):
            continue
        percent = block.get("uncertainty_percent")
        spread = None if percent is None else abs(row["latency_s"]) * percent / 100
        names = {f"{name.rpartition('_')[0]}_elasticity": row[name] for name in _METRICS}
        rows.append({"key": key, "value": value} | names | {"latency_range": spread})
    return sorted(rows, key=lambda row: -abs(row["latency_elasticity"]))
