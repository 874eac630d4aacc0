"""Fit the kernel families of the shipped machines to the shipped rows, or cross-validate them.

    python benchmarks/kernel_families.py --fit             writes hwmodels/accelerators/*.yaml
    python benchmarks/kernel_families.py --cross           writes benchmarks/kernel_families.md
    python benchmarks/kernel_families.py --cross --hw t4   prints one machine's table

Cross-validated: every row is predicted without any row of its own source (`hwmodels.fitting` says
with what instead). That is what the model is worth on a kernel that nobody fitted.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hwmodels

_FILES = Path(hwmodels.__file__).parent / "accelerators"
_PAGE = Path(__file__).with_suffix(".md")


def fit(names: Iterable[str]) -> None:
    """Fit every family with rows again and write it into its machine's file."""
    rows = hwmodels.measured_rows()
    for name in names:
        hw = hwmodels.load_accelerator(name)
        if not hw.kernels:
            continue
        text = "kernels:\n"
        for family in hw.kernels:
            fitted = family
            if family.rows and {"plain", "branch"} & {*family.serves}:
                fitted = hwmodels.fitted_family(
                    hw, hwmodels.fit_family(hw, family.name, rows), rows
                )
            text += hwmodels.family_text(fitted)
            print(f"{name} {family.name}: {fitted.rows} rows, {fitted.mean_error}", file=sys.stderr)
        path = _FILES / f"{name}.yaml"
        content = path.read_text(encoding="utf-8")
        start, end = content.index("\nkernels:\n"), content.find("\nvariants:")
        rest = content[end:] if end > start else ""
        path.write_text(content[: start + 1] + text + rest, encoding="utf-8")


def cross(names: Iterable[str]) -> list[dict[str, Any]]:
    """Rows per device and family: errors of the fit, and cross-validated by source."""
    rows = hwmodels.measured_rows()
    table = []
    for name in names:
        hw = hwmodels.load_accelerator(name)
        fitted = hwmodels.validate(hw, rows)
        if not fitted:
            continue
        left_out = hwmodels.cross_validate(hw, rows)
        for family in ("all", *dict.fromkeys(row["kernel_family"] for row in fitted)):
            table.append(
                {
                    "device": name,
                    "kernels": family,
                    "rows": len(_of(fitted, family)),
                    "sources": len({row["source"] for row in _of(fitted, family)}),
                    "fitted": _mean(_of(fitted, family)),
                    "cross-validated": _mean(_of(left_out, family)),
                    "worst": max(abs(row["error"]) for row in _of(left_out, family)),
                }
            )
        print(f"{name}: {table[-1]}", file=sys.stderr)
    return table


def _of(rows: list[dict[str, Any]], family: str) -> list[dict[str, Any]]:
    return [row for row in rows if family in ("all", row["kernel_family"])]


def _mean(rows: list[dict[str, Any]]) -> float:
    return sum(abs(row["error"]) for row in rows) / len(rows)


def page(table: list[dict[str, Any]]) -> str:
    """The table as Markdown, machines first, then their families."""
    whole = [row for row in table if row["kernels"] == "all"]
    count = sum(row["rows"] for row in whole)
    means = {
        key: sum(row["rows"] * row[key] for row in whole) / count
        for key in ("fitted", "cross-validated")
    }
    lines = [
        "# Kernel families against measured rows",
        "",
        f"`python benchmarks/kernel_families.py --cross`, {count} rows: mean error "
        f"{means['fitted']:.1%} with the fitted values, {means['cross-validated']:.1%} where each "
        "row is predicted without the rows of its own source. `worst` is of the latter.",
        "",
        "| device | kernels | rows | sources | fitted | cross-validated | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['device']} | {row['kernels']} | {row['rows']} | {row['sources']} | "
        f"{row['fitted']:.1%} | {row['cross-validated']:.1%} | {row['worst']:.0%} |"
        for row in table
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="fit and write the shipped files")
    parser.add_argument("--cross", action="store_true", help="cross-validate by source")
    parser.add_argument("--hw", action="append", help="only these machines")
    options = parser.parse_args()
    names = options.hw or hwmodels.list_accelerators()
    if options.fit:
        fit(names)
    if options.cross:
        text = page(cross(names))
        if options.hw:
            print(text)
        else:
            _PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
