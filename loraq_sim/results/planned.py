"""What a sweep planned, as its store keeps it, and which of it has no result yet.

A store knows the names (digests) of all cases that its sweeps asked for, and in what order. What a
case *is* (layer, split, accelerator, ...) stands in its row once it has one; for those without a
row the run keeps a text that says it for the whole plan: its distinct settings once, and which of
them each layer has. A shard keeps that of the whole sweep: parts that nobody ran are missing, too.

A case is **missing** where it was planned and has no row. A failed case has a row, so it is not. Of
equal cases that several sweeps planned (another release or a changed file gives them other names)
the latest counts. Stores of older releases do not know what their cases are: there the missing
cases of the latest sweep are counted, without names.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraq_sim.results.rows import IDENTITY, Row
from loraq_sim.results.wording import some_of

__all__ = [
    "missing_cases",
    "newest",
    "partial_in_short",
    "partial_text",
    "planned_text",
    "unfinished",
]

_NOT_YET = "have no result yet"
_SETTINGS = tuple(name for name in IDENTITY if name != "layer")


def planned_text(labels: Iterable[Mapping[str, Any]]) -> str:
    """The cases of a plan in their order, as JSON; `labels` hold the columns of `rows.IDENTITY`.

    Keys ``settings``, the distinct ones, and ``layers``, pairs of names and places in these that
    each of them has, one after the other.
    """
    places: dict[tuple, int] = {}
    layers: list[tuple[str, list[int]]] = []
    for case in labels:
        key = tuple(map(case.get, _SETTINGS))
        place = places.setdefault(key, len(places))
        if not layers or layers[-1][0] != case["layer"]:
            layers.append((str(case["layer"]), []))
        layers[-1][1].append(place)
    alike: list[tuple[list[str], list[int]]] = []
    for name, own in layers:
        if not alike or alike[-1][1] != own:
            alike.append(([], own))
        alike[-1][0].append(name)
    settings = [
        {name: v for name, v in zip(_SETTINGS, key, strict=True) if v is not None} for key in places
    ]
    return json.dumps({"settings": settings, "layers": alike}, separators=(",", ":"))


class _Plan:
    """A text of `planned_text`, read from a store of anyone, to be asked for single places."""

    def __init__(self, text: str) -> None:
        content = _mapping(json.loads(text))
        settings, layers = content.get("settings"), content.get("layers")
        if not isinstance(settings, list) or not isinstance(layers, list):
            raise TypeError("a plan has no settings or no layers")
        self._settings = [tuple(map(_mapping(s).get, _SETTINGS)) for s in settings]
        if not all(isinstance(v, str | int | float | None) for s in self._settings for v in s):
            raise TypeError("a plan has a setting that is no plain value")
        self._groups: list[tuple[list[str], list[int]]] = []
        self._starts = [0]
        for names, places in layers:
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a plan has a layer that is no text")
            if not all(type(p) is int and 0 <= p < len(self._settings) for p in places):
                raise ValueError("a plan has a place without settings")
            self._groups.append((names, places))
            self._starts.append(self._starts[-1] + len(names) * len(places))

    def at(self, position: int) -> tuple[str, tuple] | None:
        """Layer and settings of a case; None for a place that the plan does not have."""
        if not 0 <= position < self._starts[-1]:
            return None
        group = bisect_right(self._starts, position) - 1
        names, places = self._groups[group]
        layer, own = divmod(position - self._starts[group], len(places))
        return names[layer], self._settings[places[own]]


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("a plan, or settings of it, is no JSON object")
    return value


def missing_cases(
    left: Sequence[tuple[int, int]], planned: Sequence[tuple[int, int]], texts: Mapping[int, str]
) -> list[Row]:
    """Cases of `left` that no later sweep planned again, in order: the columns of `rows.IDENTITY`.

    Parameters
    ----------
    left, planned : sequence of (run, position)
        Places of the cases without a row, and of all.
    texts : mapping of int to str
        `planned_text` by run, empty where a run of an older release has none. An empty dict stands
        for a case of such a run, if it is the latest.

    Raises
    ------
    ValueError, TypeError, RecursionError
        If a text is none that `planned_text` wrote.
    """
    plans = {run: _Plan(texts[run]) for run in {run for run, _ in planned} if texts.get(run)}
    latest = max((run for run, _ in planned), default=0)
    asked: dict[tuple[str, tuple], int] = {}
    for run, position in planned:
        case = plans[run].at(position) if run in plans else None
        if case is not None and asked.get(case, -1) < run:
            asked[case] = run
    found: list[Row] = []
    for run, position in left:
        case = plans[run].at(position) if run in plans else None
        if case is None and run == latest:
            found.append({})
        elif case is not None and asked[case] == run:
            values = dict(zip(_SETTINGS, case[1], strict=True)) | {"layer": case[0]}
            found.append({name: values[name] for name in IDENTITY})
    return found


def newest(
    rows: list[Any], identities: Iterable[tuple], ages: Iterable[tuple[int, int]]
) -> list[Any]:
    """Of rows a reader could not tell apart the one of the sweep that asked last.

    They come from a changed dump, accelerator file or release. `ages` are the number of the sweep
    that asked for a row last and its place in the store.
    """
    kept: dict[tuple, tuple[tuple[int, int], int]] = {}
    for place, (identity, age) in enumerate(zip(identities, ages, strict=True)):
        if identity not in kept or age > kept[identity][0]:
            kept[identity] = (age, place)
    if len(kept) == len(rows):
        return rows
    return [rows[place] for place in sorted(place for _, place in kept.values())]


def partial_text(n_rows: int, missing: Sequence[Mapping[str, Any]], *, is_kept: bool = True) -> str:
    """What was planned and has no row, beside `n_rows` that do, in words; empty if nothing.

    `is_kept`: whether there is a store, into which the same sweep continues.
    """
    if not missing:
        return ""
    names = list(dict.fromkeys(str(case["layer"]) for case in missing if "layer" in case))
    splits = list(dict.fromkeys(str(case["split"]) for case in missing if "split" in case))
    where = f": {some_of(splits)} in {some_of(names)}" if names else ""
    more = "; the same sweep into this store continues" if is_kept else ""
    return (
        f"Partial: {len(missing):,} of {n_rows + len(missing):,} planned cases {_NOT_YET}"
        f"{where}. They may change the answer{more}."
    )


def partial_in_short(text: str) -> str:
    """Of what `partial_text` said the count alone, where there is little room."""
    count, found, _ = text.partition(_NOT_YET)
    return count + found


def unfinished(n_rows: int, missing: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What JSON outputs on a store say of it under this name; None where nothing is missing."""
    if not missing:
        return None
    return {
        "planned": n_rows + len(missing),
        "missing": len(missing),
        "text": partial_text(n_rows, missing),
        "cases": [dict(case) for case in missing if case],
    }
