"""Where the numbers of a report come from, as short facts for its last section."""

from collections.abc import Iterable, Mapping
from typing import Any

from reports.report_data import ReportData

__all__ = ["provenance_view"]

_DIGEST_DIGITS = 16


def provenance_view(data: ReportData) -> dict[str, Any]:
    """Facts of each sweep, its plan, and each accelerator's numbers with their sources."""
    return {
        "runs": [{"title": _title(run), "facts": _facts(run)} for run in data.runs],
        "machines": [
            {"name": name, "title": machine.get("title") or "", "facts": _sourced(machine)}
            for name, machine in data.machines.items()
        ],
    }


def _title(run: Mapping[str, Any]) -> str:
    started = run.get("started")
    return f"Sweep {run.get('run', '')} of {started}" if started else f"Sweep {run.get('run', '')}"


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan = run.get("plan") or {}
    facts: list[tuple[str, Any]] = [
        ("Command", " ".join(map(str, run.get("command") or ()))),
        ("Layer dump", plan.get("dump")),
        ("Digest of the dump's layers", _digest(run.get("dump_digest"))),
    ]
    for name, digest in (run.get("accelerator_digests") or {}).items():
        facts.append((f"Digest of {name}", _digest(digest)))
    facts += [
        ("Digest of the code", _digest(run.get("code_digest"))),
        ("Plan", _settings(plan, without=("dump",))),
        ("Seed", run.get("seed")),
        ("Cases", _counts(run)),
        ("Versions", _settings(run.get("versions") or {})),
        ("Machine", _listing(run, ("cpu", "machine", "platform"))),
        ("Started, ended", _listing(run, ("started", "ended"))),
        ("Remarks", "; ".join(map(str, run.get("notes") or ()))),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "", [], {})]


def _digest(value: Any) -> str:
    return str(value)[:_DIGEST_DIGITS] if value else ""


def _settings(values: Mapping[str, Any], *, without: Iterable[str] = ()) -> str:
    parts = []
    for name, value in values.items():
        if name in without or value in (None, "", [], {}):
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts)


def _counts(run: Mapping[str, Any]) -> str:
    words = (("n_ok", "ok"), ("n_failed", "failed"), ("n_skipped", "found from earlier sweeps"))
    return ", ".join(f"{run[key]:,} {word}" for key, word in words if run.get(key))


def _listing(run: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(str(run[key]) for key in keys if run.get(key))


def _sourced(machine: Mapping[str, Any]) -> list[dict[str, str]]:
    """Numbers of one machine by source, so that a source is read once."""
    by_source: dict[tuple[str, str], list[str]] = {}
    for fact in machine.get("facts") or ():
        where = (str(fact.get("source") or "not stated"), str(fact.get("confidence") or ""))
        value = f"{fact['value']} {fact.get('unit') or ''}".strip()
        by_source.setdefault(where, []).append(f"{fact['key']} = {value}")
    return [
        {"source": source, "confidence": confidence, "numbers": "; ".join(numbers)}
        for (source, confidence), numbers in by_source.items()
    ]
