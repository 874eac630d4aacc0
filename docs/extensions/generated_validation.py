"""Accuracy of the cost model and coverage of the golden vectors, as of this build."""

import json
from functools import cache
from pathlib import Path

from markdown_table import table

__all__ = [
    "accuracy_by_device",
    "attention_rows",
    "branch_rows",
    "golden_counts",
    "measured_rows_table",
]

_GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


@cache
def _results() -> tuple[dict, ...]:
    import hwmodels

    rows = hwmodels.measured_rows()
    machines = [hwmodels.load_accelerator(name) for name in hwmodels.list_accelerators()]
    return tuple(result for hw in machines for result in hwmodels.validate(hw, rows))


def accuracy_by_device() -> str:
    """Rows, mean and worst error of each device."""
    import hwmodels

    rows = [
        (s["device"], s["rows"], _percent(s["mean_error"]), _percent(s["worst_error"]))
        for s in hwmodels.summarize(_results())
    ]
    return table(("device", "measured rows", "mean error", "worst error"), rows)


def measured_rows_table() -> str:
    """Rows, ranges and errors of each kernel family of each machine."""
    import hwmodels

    rows = []
    for name in hwmodels.list_accelerators():
        for family in hwmodels.overview(hwmodels.load_accelerator(name))[2]:
            if family["rows"] and "attention" not in family["serves"]:
                sizes = [family[size] for size in ("m", "n", "k")]
                errors = [_percent(family[key]) for key in ("mean_error", "worst_error")]
                rows.append(
                    (name, family["kernel"], family["rows"], family["modes"], *sizes, *errors)
                )
    heads = ("machine", "kernels", "rows", "modes", "M", "N", "K", "mean error", "worst error")
    return table(heads, rows)


def attention_rows() -> str:
    """Measured and predicted attention."""
    import hwmodels

    rows = [
        (
            r["device"],
            *(f"{r[size]:,}" for size in ("heads", "queries", "head_size")),
            "yes" if r["held_out"] else "no",
            f"{r['measured_ms']:.4g}",
            f"{r['predicted_ms']:.4g}",
            f"{100 * r['error']:+.0f}\N{NO-BREAK SPACE}%",
        )
        for r in hwmodels.validate_attention()
    ]
    heads = ("device", "heads", "queries and keys", "head size", "held out")
    return table((*heads, "measured ms", "predicted ms", "error"), rows)


def branch_rows() -> str:
    """Measured and predicted overhead of a branch over the same GEMM without one."""
    import hwmodels

    rows = [
        (
            r["device"],
            *(f"{r[size]:,}" for size in ("m", "n", "k")),
            r["rank"],
            _percent(r["measured_overhead"]),
            _percent(r["predicted_overhead"]),
        )
        for r in hwmodels.branch_overheads(_results())
    ]
    return table(("device", "M", "N", "K", "rank", "measured", "predicted"), rows)


def golden_counts() -> str:
    """How many committed outputs of simulated Verilog the emulator is compared with."""
    rows = []
    for title, files, names in (
        ("MAC array", _GOLDEN.glob("*.json"), ("acc", "overflows", "tree_overflows")),
        (
            "two-level array",
            (_GOLDEN / "two_level").glob("*.json"),
            ("acc", "overflows", "column_overflows", "tree_overflows"),
        ),
        (
            "requantization and upshift",
            (_GOLDEN / "requantize").glob("*.json"),
            ("ups_wrap", "ups_after", "ups_before", "srs", "twice", "once"),
        ),
    ):
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(files)]
        n_values = sum(len(record.get(name) or ()) for record in records for name in names)
        n_srs = sum(len(out) for record in records for out in record.get("out", ()))
        rows.append((title, len(records), f"{n_values:,}", f"{n_srs:,}" if n_srs else "-"))
    heads = ("what", "configurations", "values compared", "outputs after shift-round-saturate")
    return table(heads, rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
