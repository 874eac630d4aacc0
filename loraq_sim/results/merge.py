"""Two or more sets of result rows: made one store, or compared.

Merging: shards of a sweep become that sweep, other sweeps stand side by side. Rows of one case must
agree in everything but the time they took; a finished row goes before a failed one. Runs that are
parts of one plan become one run, with the order of the whole plan.

Comparing: rows are matched by `results.rows.IDENTITY`; what changed between the two sets is listed,
and whether a change is worse than a limit such as ``output_error>+1%`` allows.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq_sim.errors import InputError, StoreError, counted, unknown_name
from loraq_sim.results.planned import newest
from loraq_sim.results.rows import (
    COLUMNS,
    EVALUATED,
    IDENTITY,
    Row,
    StoredRow,
    cells_of,
    every_name,
)
from loraq_sim.results.store import ResultStore
from loraq_sim.results.store_records import write_csv

__all__ = [
    "Change",
    "Comparison",
    "Limit",
    "compare_rows",
    "merge_stores",
    "parse_limit",
]


# What may differ between two runs of one case.
_LOOSE = ("seconds", "pareto", "dump", "group", "case_id")
# What names a plan; the rest of the provenance says where and when a part of it ran.
_PLAN = ("plan", "dump_digest", "accelerator_digests", "code_digest", "seed")
_MOST_NAMED = 3


def merge_stores(
    out: str | Path, sources: Sequence[str | Path], *, csv: str | Path | None = None
) -> int:
    """Write the rows of all `sources` to a new store at `out`; return how many.

    With `csv` they are also written there, as `ResultStore.export_csv` of the new store would.

    Raises
    ------
    StoreError
        If a source cannot be read, two rows of one case differ (the message names them), or `out`
        or `csv` cannot be written. Nothing is written before all rows have been compared.
    """
    rows: dict[str, StoredRow] = {}
    origins: dict[str, Path] = {}
    checksums: dict[str, str] = {}
    runs: dict[str, dict[str, Any]] = {}
    conflicts: list[str] = []
    for source in map(Path, sources):
        with ResultStore.open(source) as store:
            planned = store.planned()
            found, sealed = store.sealed_rows(list(planned))
            provenance = {facts["run"]: facts for facts in store.provenance()}
            plans = store.plans()
        for run, facts in provenance.items():
            cases = {case: place for case, (number, place) in planned.items() if number == run}
            _add_run(runs, facts, cases, source, plans.get(run, ""))
        for row in found:
            case = row["case_id"]
            earlier = rows.get(case)
            if earlier is None or earlier["status"] not in EVALUATED:
                rows[case], origins[case] = row, source
                checksums[case] = sealed.get(case, "")
            elif row["status"] in EVALUATED and (difference := _difference(earlier, row)):
                conflicts.append(f"{difference} in {origins[case]} and {source}")
    if conflicts:
        more = len(conflicts) - _MOST_NAMED
        text = "; ".join(conflicts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise StoreError(f"the rows of {counted(len(conflicts), 'case')} differ: {text}")
    asked = _write(Path(out), rows, checksums, list(runs.values()))
    if csv is not None:
        ordered = _as_read(rows, asked)
        write_csv(csv, ordered, every_name(ordered))
    return len(rows)


def _add_run(
    runs: dict[str, dict[str, Any]],
    facts: dict[str, Any],
    cases: dict[str, int],
    source: Path,
    plan: str,
) -> None:
    name = json.dumps([_plan_of(facts), facts.get("started") if "plan" not in facts else ""])
    facts = {key: value for key, value in facts.items() if key != "run"}
    run = runs.setdefault(name, {"facts": facts | {"shard": "", "merged": []}, "cases": {}})
    kept = ("shard", "started", "ended", "seconds", "jobs", "cpu", "command", "n_ok", "n_failed")
    part = {key: facts[key] for key in kept if key in facts}
    run["facts"]["merged"].append({"store": str(source)} | part)
    run["cases"] |= cases
    run["plan"] = run.get("plan") or plan


def _plan_of(facts: dict[str, Any]) -> list[str]:
    """What the parts of one sweep have in common; jobs may see the dump at different paths."""
    named = {key: facts.get(key) for key in _PLAN}
    if isinstance(named["plan"], dict):
        named["plan"] = named["plan"] | {"dump": Path(str(named["plan"].get("dump"))).name}
    return [json.dumps(named, sort_keys=True)]


def _difference(one: StoredRow, other: StoredRow) -> str:
    for name in (*one, *(name for name in other if name not in one)):
        if name not in _LOOSE and one.get(name) != other.get(name):
            where = f"layer {one['layer']!r}, split {one['split']}"
            return f"{where}: {name} is {one.get(name)!r} and {other.get(name)!r}"
    return ""


def _write(
    out: Path,
    rows: Mapping[str, StoredRow],
    checksums: Mapping[str, str],
    runs: Sequence[dict[str, Any]],
) -> dict[str, tuple[int, int]]:
    """Make the store; return which run asked last for each case, and where in its order."""
    asked: dict[str, tuple[int, int]] = {}
    with ResultStore.open(out, create=True) as store:
        for run in runs:
            ordered = sorted(run["cases"], key=run["cases"].__getitem__)
            places = [run["cases"][case] for case in ordered]
            number = store.begin_run(run["facts"], ordered, positions=places, plan=run["plan"])
            asked |= {case: (number, place) for case, place in run["cases"].items()}
        store.add_all(rows, checksums)
    return asked


def _as_read(
    rows: Mapping[str, StoredRow], asked: Mapping[str, tuple[int, int]]
) -> list[StoredRow]:
    """`rows` as the new store gives them, which need not be read for it."""
    stored = {case: place for place, case in enumerate(rows)}
    order = sorted(rows, key=lambda case: (*asked.get(case, (0, -1)), stored[case]))
    ages = ((asked.get(case, (0, 0))[0], stored[case]) for case in order)
    ordered = [rows[case] for case in order]
    return newest(ordered, cells_of(ordered, IDENTITY), ages)


# What tells rows apart, what says nothing about a result, and the clock.
_NOT_COMPARED = {*IDENTITY, "kind", "group", "seconds", "pareto"}
_NUMERIC = tuple(
    column.name
    for column in COLUMNS
    if column.sql_type in ("INTEGER", "REAL") and column.name not in _NOT_COMPARED
)
_TEXT = ("status", "bound", "arithmetic", "message")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How much `column` may grow (`allowed` > 0) or shrink (< 0), absolute or in percent."""

    column: str
    allowed: float
    is_percent: bool
    text: str

    def is_broken_by(self, before: Any, after: Any) -> bool:
        """Whether the change from `before` to `after` goes beyond the limit.

        A value that is gone, or that appears, breaks it; percent of zero count as infinite.
        """
        if before is None and after is None:
            return False
        if before is None or after is None or math.isnan(before) or math.isnan(after):
            return before is not None
        if before == after:
            return False
        change = after - before
        if self.is_percent:
            change = 100.0 * change / abs(before) if before else math.copysign(math.inf, change)
        return change > self.allowed if self.allowed >= 0 else change < self.allowed


@dataclass(frozen=True, kw_only=True)
class Change:
    """One column of one row that differs. `relative` is None where it means nothing."""

    row: Row
    column: str
    before: Any
    after: Any

    @property
    def relative(self) -> float | None:
        """(after - before) / abs(before)."""
        numbers = (self.before, self.after)
        if any(isinstance(v, str) or v is None for v in numbers) or not self.before:
            return None
        change = (self.after - self.before) / abs(self.before)
        return None if math.isnan(change) else change


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows matched by identity: what changed, what only one side has, what breaks a limit."""

    n_matched: int
    changes: tuple[Change, ...]
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    regressions: tuple[tuple[Limit, Change], ...]


def parse_limit(text: str) -> Limit:
    """Parse ``COLUMN>+2%`` (may not grow by more), ``COLUMN<-0.5`` (may not shrink by more).

    Raises
    ------
    InputError
        If the text is not of this form or the column is not numeric.
    """
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise InputError(f"--fail-if {text!r} must look like 'output_error>+2%' or 'sqnr_db<-0.5'")
    column, sign, number, percent = match.groups()
    if column not in _NUMERIC:
        raise InputError(unknown_name("column", column, _NUMERIC) + f" (in --fail-if {text!r})")
    allowed = float(number)
    if (sign == ">") != (allowed >= 0) and allowed != 0:
        raise InputError(f"--fail-if {text!r}: write '>+' for growth and '<-' for shrinking")
    # -0.0 keeps 'smaller by anything' apart from 'larger by anything'.
    allowed = -5e-324 if sign == "<" and allowed == 0 else allowed
    return Limit(column=column, allowed=allowed, is_percent=bool(percent), text=text.strip())


def compare_rows(
    before: Sequence[Row], after: Sequence[Row], limits: Sequence[Limit] = ()
) -> Comparison:
    """Match rows by what a reader tells them apart by; see `loraq_sim.results.rows.IDENTITY`."""
    old, new = _by_identity(before), _by_identity(after)
    matched = [key for key in old if key in new]
    changes = tuple(change for key in matched for change in _changes(old[key], new[key]))
    regressions = tuple(
        (limit, _change(limit.column, old[key], new[key]))
        for limit in limits
        for key in matched
        if limit.is_broken_by(old[key].get(limit.column), new[key].get(limit.column))
    )
    return Comparison(
        n_matched=len(matched),
        changes=changes,
        only_before=tuple(row for key, row in old.items() if key not in new),
        only_after=tuple(row for key, row in new.items() if key not in old),
        regressions=regressions,
    )


def _by_identity(rows: Sequence[Row]) -> dict[tuple, Row]:
    return {tuple(row.get(name) for name in IDENTITY): row for row in rows}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    names = [name for name in (*_NUMERIC, *_TEXT) if before.get(name) != after.get(name)]
    return [_change(name, before, after) for name in names]


def _change(column: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    return Change(
        row=dict(before), column=column, before=before.get(column), after=after.get(column)
    )
