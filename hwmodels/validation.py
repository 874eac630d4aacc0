"""How far a prediction can be trusted: against measurements, and how it hangs on each number.

`validate` compares with the shipped table of public GEMM timings, or with a user's own CSV
(`hwmodels.measured` reads both). A row whose notes or source name a product of a variant
(`products` in the file) is predicted on that variant. Every row gets a prediction, with the kernel
family it is of and whether that family's rows carry it (`confidence`). A row that says no family,
by its name or one of its words, is of a kernel that nobody fitted: predicted in the usual family,
and extrapolated at best.

Shapes are told apart by what paces them: ``decode`` (M of at most 16), ``skinny`` (M below 512),
``square`` (no side above four times another), ``wide`` (the rest).

`sensitivity` says which numbers of an accelerator's file a cost depends on. Every number is changed
by the same fraction, one at a time, and the cost is estimated again:

    elasticity = (change of the cost, relative) / (change of the number, relative)

-1 for a clock that everything waits for, 0 for a number that does not matter here. Whole numbers
move by at least one; a change that breaks a rule of the file is left out.

`rests_on` asks it of what a file calls assumed: the numbers a result hangs on and nobody has said.
"""

import csv
import functools
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hwmodels.branch import split_into_kernels
from hwmodels.cost import Cost, estimate_cost
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError, read_text, unit_of
from hwmodels.families import GENERIC, weakest
from hwmodels.inventory import InventoryEntry, product_cost
from hwmodels.kernel_cycles import single_core_cycles
from hwmodels.loader import load_accelerator
from hwmodels.measured import (
    MEASURED_CSV,
    Tile,
    family_of,
    is_of,
    machine_of,
    measured_rows,
    state_of,
    tile_of,
    workload_of,
)
from hwmodels.overrides import assumed_keys, idle_keys, keys_of, with_overrides
from hwmodels.workload import GemmWorkload

__all__ = [
    "ATTENTION_CSV",
    "ELEMENTWISE_CSV",
    "MEASURED_CSV",
    "branch_overheads",
    "compare",
    "measured_rows",
    "resting",
    "resting_text",
    "rests_on",
    "sensitivity",
    "shape_class",
    "summarize",
    "validate",
    "validate_attention",
    "validate_elementwise",
]

ATTENTION_CSV = Path(__file__).parent / "measured_attention.csv"
ELEMENTWISE_CSV = Path(__file__).parent / "measured_elementwise.csv"
_MAX_FILE_BYTES = 2**20
_METRICS = ("latency_s", "energy_j", "dram_bytes")
_IMPOSSIBLE = 0.8
"""Of the time at the chip's peak: clocks boost and peaks are rounded, but not by a quarter."""


def validate(
    hw: Accelerator, rows: Iterable[dict[str, str]] | None = None, *, search_tiles: bool = False
) -> list[dict[str, Any]]:
    """Predicted time of every row measured on `hw`; rows of other devices are left out.

    `rows` are by default the measured rows that ship, compared once per machine object.
    `search_tiles` uses the best tile found instead of the tile the row was measured with. Each
    result has device, accelerator, kernel, kernel_family, confidence, shape, source, m, n, k, main,
    family (of the elements), rank, out_bits, tile_mkn, measured_ms, predicted_ms, error (signed,
    relative to measured) and bound.

    Raises
    ------
    AcceleratorError
        If a row names a kernel family that `hw` lacks, or a time that no clock of it allows.
    """
    if rows is None:
        key = ("validated", search_tiles)
        if key not in hw._cache:
            hw._cache[key] = validate(hw, measured_rows(), search_tiles=search_tiles)
        return [dict(row) for row in hw._cache[key]]
    return [
        compare(machine_of(hw, row), row, search_tiles=search_tiles)
        for row in rows
        if is_of(hw, row)
    ]


def summarize(results: Sequence[dict[str, Any]], by: str = "device") -> list[dict[str, Any]]:
    """Per device (or another key of the results): rows, mean and worst absolute relative error."""
    summary = []
    for group in dict.fromkeys(row[by] for row in results):
        errors = [abs(row["error"]) for row in results if row[by] == group]
        summary.append(
            {
                by: group,
                "rows": len(errors),
                "mean_error": sum(errors) / len(errors),
                "worst_error": max(errors),
            }
        )
    return summary


def shape_class(m: int, n: int, k: int) -> str:
    """decode, skinny, square or wide."""
    if m <= 16:
        return "decode"
    if m < 512:
        return "skinny"
    return "square" if max(m, n, k) <= 4 * min(m, n, k) else "wide"


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


def compare(hw: Accelerator, row: dict[str, str], *, search_tiles: bool = False) -> dict[str, Any]:
    """One measured row and its prediction on `hw`, as `validate` gives them."""
    work = workload_of(row)
    tile = None if search_tiles else tile_of(row)
    measured_ms = float(row["time_ms"])
    if row["kernel"].startswith("single core"):
        tile = (work.m, work.k, work.n) if tile is None else tile
        cycles = single_core_cycles(hw, split_into_kernels(work, hw)[0], tile)
        predicted_s, bound = cycles / hw.units.clock_hz, "compute"
        about = {"kernel_family": GENERIC, "confidence": "assumed"}
        if measured_ms < _IMPOSSIBLE * 1e3 * work.macs_main / _peak(hw, work):
            raise _impossible(hw, row)
    else:
        cost = _cost_with(work, hw, tile, row)
        predicted_s, bound, tile = cost.latency_s, cost.bound, cost.tile_mkn
        trusted = cost.confidence
        if family_of(hw, row) is None:
            trusted = weakest([trusted, "extrapolated"])
        about = {"kernel_family": cost.kernel, "confidence": trusted}
        if measured_ms < _IMPOSSIBLE * 1e3 * cost.utilization * cost.latency_s:
            raise _impossible(hw, row)
    return {
        "device": row["device"].strip().lower(),
        "accelerator": hw.name,
        "kernel": row["kernel"],
        **about,
        "shape": shape_class(work.m, work.n, work.k),
        "source": row.get("source") or "",
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


def validate_attention(path: str | Path = ATTENTION_CSV) -> list[dict[str, Any]]:
    """Measured and predicted time of every shipped row of attention, on the machine it was taken.

    Each result has device, heads, queries, keys, head_size, held_out (of the fit), measured_ms,
    predicted_ms, error, kernel, confidence and source.

    Raises
    ------
    AcceleratorError
        If the file cannot be read, or names an unknown machine.
    """
    results = []
    for row in _product_rows(path):
        entry = InventoryEntry(
            kind="attention", op="attention", m=int(row["queries"]), n=int(row["keys"]),
            k=int(row["head_size"]), calls=1, precision="W16A16", batch=int(row["heads"]),
        )  # fmt: skip
        sizes = {"heads": entry.batch, "queries": entry.m, "keys": entry.n, "head_size": entry.k}
        results.append(_product_result(row, entry, sizes))
    return results


def validate_elementwise(path: str | Path = ELEMENTWISE_CSV) -> list[dict[str, Any]]:
    """Measured and predicted time of every shipped row of elementwise work, as for attention.

    In place of the sizes of attention a result has work, rows and columns.

    Raises
    ------
    AcceleratorError
        If the file cannot be read, or names an unknown machine or work.
    """
    results = []
    for row in _product_rows(path):
        entry = InventoryEntry(
            kind=row["work"], op="elementwise", m=int(row["rows"]), n=int(row["columns"]), k=1,
            calls=1, precision="A16", work=row["work"],
        )  # fmt: skip
        sizes = {"work": entry.work, "rows": entry.m, "columns": entry.n}
        results.append(_product_result(row, entry, sizes))
    return results


def _product_rows(path: str | Path) -> Iterable[dict[str, str]]:
    text = read_text(Path(path), "measured table", _MAX_FILE_BYTES)
    return csv.DictReader(io.StringIO(text, newline=""))


def _product_result(
    row: dict[str, str], entry: InventoryEntry, sizes: dict[str, Any]
) -> dict[str, Any]:
    cost = product_cost(entry, load_accelerator(row["device"]))
    measured_ms, predicted_ms = float(row["time_ms"]), cost.latency_s * 1e3
    return {
        "device": row["device"],
        **sizes,
        "held_out": "held out" in row["notes"],
        "measured_ms": measured_ms,
        "predicted_ms": predicted_ms,
        "error": predicted_ms / measured_ms - 1,
        "kernel": cost.kernel,
        "confidence": cost.confidence,
        "source": row["source"],
    }


def _peak(hw: Accelerator, work: GemmWorkload) -> float:
    """MACs a second of one unit in the mode of the main product."""
    return split_into_kernels(work, hw)[0].choice.mode.macs_per_cycle * hw.units.clock_hz


def _impossible(hw: Accelerator, row: dict[str, str]) -> AcceleratorError:
    shape = "x".join(row[name] for name in "MKN")
    return AcceleratorError(
        f"{row['device']} {row['kernel']} {shape}: time_ms={row['time_ms']} is beyond the peak of "
        f"{hw.name} by more than a quarter; check the unit of the time and the device"
    )


def _cost_with(work: GemmWorkload, hw: Accelerator, tile: Tile | None, row: dict[str, str]) -> Cost:
    """Cost in the state of the row, with its tile; searched where that breaks our buffering rules.

    Kernels that buffer one operand less run tiles that do not fit when all are double-buffered.
    """
    state, kernel = state_of(row), family_of(hw, row)
    if tile is not None:
        try:
            return estimate_cost(
                work, hw, tile_mkn=tile, kernel=kernel, weights=state.weights, launch=state.launch
            )
        except AcceleratorError as error:
            if "tile" not in str(error):
                raise
    return estimate_cost(work, hw, kernel=kernel, weights=state.weights, launch=state.launch)


def sensitivity(
    work: Any,
    hw: Accelerator,
    *,
    step: float = 0.1,
    cost_of: Callable[[Any, Accelerator], Any] = estimate_cost,
    keys: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of key, value, elasticities of latency, energy and DRAM bytes, and `latency_range`.

    `latency_range` is what the block's own `uncertainty_percent` means for the latency, as a
    fraction; None where the block states none. Rows without any effect are left out; the largest
    effect on latency comes first. `keys`: those looked at, all by default. `cost_of` says what
    `work`, by default a `GemmWorkload`, costs on a machine: latency_s, energy_j and dram_bytes.
    """
    content = hw.model_dump()
    base = cost_of(work, hw)
    rows = []
    for key, steps in keys_of(hw).items():
        if keys is not None and key not in keys:
            continue
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


LEAST_EFFECT = 0.1
"""Elasticity below which a result is not said to rest on a number: 1 % for a change of 10 %."""
_MOST_SAID = 3


def rests_on(
    work: Any,
    hw: Accelerator,
    *,
    cost_of: Callable[[Any, Accelerator], Any] = estimate_cost,
    of: Literal["latency", "energy"] = "latency",
) -> dict[str, float]:
    """Elasticity of the latency (or energy) by assumed key of `hw`; small ones are left out.

    Largest first; empty for a machine whose file calls nothing assumed. `cost_of` as in
    `sensitivity`.
    """
    keys = set(assumed_keys(hw)) - set(idle_keys(hw))
    if not keys:
        return {}
    # Blocks, steps and buffers come in powers of two: a tenth more of them fits nothing.
    counts = {key for key in keys if not unit_of(key) and not key.startswith("units.")}
    rows = sensitivity(work, hw, cost_of=cost_of, keys=keys - counts)
    rows += sensitivity(work, hw, cost_of=cost_of, keys=counts, step=1.0)
    rows.sort(key=lambda row: -abs(row[f"{of}_elasticity"]))
    effects = {row["key"]: row[f"{of}_elasticity"] for row in rows}
    return {key: effect for key, effect in effects.items() if abs(effect) >= LEAST_EFFECT}


def resting(work: GemmWorkload, hw: Accelerator, **how: Any) -> str | None:
    """`rests_on` as JSON, as a row keeps it; None where nothing is assumed. `how`: of the cost."""
    if not hw.assumed:
        return None
    key = ("resting", work, *sorted(how.items()))
    if key not in hw._cache:
        cost_of = functools.partial(estimate_cost, **how)
        effects = rests_on(work, hw, cost_of=cost_of)
        hw._cache[key] = json.dumps({name: round(effect, 4) for name, effect in effects.items()})
    text: str = hw._cache[key]
    return text


def resting_text(effects: Mapping[str, float], of: str = "latency") -> str:
    """The assumptions a latency or an energy rests on as words; empty where there are none.

    >>> resting_text({"dispatch.launch_s": 0.4})
    'rests on assumed dispatch.launch_s (10 % of it moves the latency by 4 %)'
    """
    largest = sorted(effects.items(), key=lambda item: -abs(item[1]))
    told = [
        f"{key} ({f'10 % of it moves the {of} by ' if not index else ''}{abs(effect) * 10:.2g} %)"
        for index, (key, effect) in enumerate(largest[:_MOST_SAID])
        if abs(effect) >= LEAST_EFFECT
    ]
    return f"rests on assumed {', '.join(told)}" if told else ""
