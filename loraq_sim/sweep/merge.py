"""One store from several: shards of a sweep become that sweep, other sweeps stand side by side.

Rows of one case must agree in everything but the time they took; a finished row goes before a
failed one. Runs that are parts of one plan become one run, with the order of the whole plan.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq_sim.errors import StoreError
from loraq_sim.rows import EVALUATED, Row
from loraq_sim.store import ResultStore

__all__ = ["merge_stores"]

# What may differ between two runs of one case.
_LOOSE = ("seconds", "pareto", "dump", "group", "case_id")
# What names a plan; the rest of the provenance says where and when a part of it ran.
_PLAN = ("plan", "dump_digest", "accelerator_digests", "code_digest", "seed")
_MOST_NAMED = 3


def merge_stores(out: str | Path, sources: Sequence[str | Path]) -> int:
    """Write the rows of all `sources` to a new store at `out`; return how many.

    Raises
    ------
    StoreError
        If a source cannot be read, two rows of one case differ (the message names them), or `out`
        cannot be written. Nothing is written before all rows have been compared.
    """
    rows: dict[str, tuple[Row, Path]] = {}
    runs: dict[str, dict[str, Any]] = {}
    conflicts: list[str] = []
    for source in map(Path, sources):
        with ResultStore.open(source) as store:
            planned = store.planned()
            found = store.rows(list(planned))
            provenance = {facts["run"]: facts for facts in store.provenance()}
        for run, facts in provenance.items():
            cases = {case: place for case, (number, place) in planned.items() if number == run}
            _add_run(runs, facts, cases, source)
        for row in found:
            earlier = rows.get(row["case_id"])
            if earlier is None or earlier[0]["status"] not in EVALUATED:
                rows[row["case_id"]] = (row, source)
            elif row["status"] in EVALUATED and (difference := _difference(earlier[0], row)):
                conflicts.append(f"{difference} in {earlier[1]} and {source}")
    if conflicts:
        more = len(conflicts) - _MOST_NAMED
        text = "; ".join(conflicts[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise StoreError(f"{len(conflicts)} rows of the same case differ: {text}")
    _write(Path(out), {case: row for case, (row, _) in rows.items()}, list(runs.values()))
    return len(rows)


def _add_run(
    runs: dict[str, dict[str, Any]], facts: dict[str, Any], cases: dict[str, int], source: Path
) -> None:
    name = json.dumps([_plan_of(facts), facts.get("started") if "plan" not in facts else ""])
    facts = {key: value for key, value in facts.items() if key != "run"}
    run = runs.setdefault(name, {"facts": facts | {"shard": "", "merged": []}, "cases": {}})
    kept = ("shard", "started", "ended", "seconds", "jobs", "cpu", "command", "n_ok", "n_failed")
    part = {key: facts[key] for key in kept if key in facts}
    run["facts"]["merged"].append({"store": str(source)} | part)
    run["cases"] |= cases


def _plan_of(facts: dict[str, Any]) -> list[str]:
    """What the parts of one sweep have in common; jobs may see the dump at different paths."""
    named = {key: facts.get(key) for key in _PLAN}
    if isinstance(named["plan"], dict):
        named["plan"] = named["plan"] | {"dump": Path(str(named["plan"].get("dump"))).name}
    return [json.dumps(named, sort_keys=True)]


def _difference(one: Row, other: Row) -> str:
    for name in (*one, *(name for name in other if name not in one)):
        if name not in _LOOSE and one.get(name) != other.get(name):
            where = f"layer {one['layer']!r}, split {one['split']}"
            return f"{where}: {name} is {one.get(name)!r} and {other.get(name)!r}"
    return ""


def _write(out: Path, rows: dict[str, Row], runs: list[dict[str, Any]]) -> None:
    with ResultStore.open(out, create=True) as store:
        for run in runs:
            ordered = sorted(run["cases"], key=run["cases"].__getitem__)
            places = [run["cases"][case] for case in ordered]
            store.begin_run(run["facts"], ordered, positions=places)
        store.add_all(
            {case: {k: v for k, v in row.items() if k != "case_id"} for case, row in rows.items()}
        )
