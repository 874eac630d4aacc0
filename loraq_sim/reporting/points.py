"""What a reader may ask of a point of the front, answered beforehand.

**Another machine.** Costs of every case at the points of a coarse grid of machines: the one of the
rows with other numbers of columns, clocks and DRAM bandwidths, all else as it is. Each is what
`hwmodels.estimate_cost` says of that machine; nothing lies between the points. Errors do not depend
on these three. The verdict at each point is the one rule of `loraq_sim.results.verdict`.

**In images.** An output error in percent says little by itself: `report_data.image_anchors` has
images of a small model at measured errors.

**Without scripts.** The front is also a plain picture, of coordinates alone.

**Run it again.** The command of a case, its split as a recipe, and the vectors of its layer with
the widest sums, as lines to copy: names of strangers are quoted for a shell.
"""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import hwmodels
from loraq_sim.errors import LoraqError
from loraq_sim.recipe import Recipe, recipe_text
from loraq_sim.reporting.labels import Box, main_and_branch, main_colors, place_labels
from loraq_sim.reporting.panels import can_draw, nice_log_ticks, tick_texts
from loraq_sim.reporting.report_data import Answer, ReportData, image_anchors
from loraq_sim.results.columns import choose_unit, column_for, is_missing
from loraq_sim.results.rows import AnyRow
from loraq_sim.results.verdict import verdict_of
from loraq_sim.results.wording import pretty_unit, value_text

__all__ = [
    "GRID_COSTS",
    "case_texts",
    "machine_grid",
    "static_front",
    "strips_view",
]

CONTROLS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("columns", "units.columns", (0.5, 1.0, 2.0)),
    ("clock", "units.clock_hz", (0.75, 1.0, 1.5)),
    ("DRAM bandwidth", "memories.dram.bandwidth_bytes_per_s", (0.5, 1.0, 2.0, 4.0)),
)
"""Name, key of an accelerator file, and factors of each control of the page."""

GRID_COSTS = ("latency_s", "energy_j", "dram_bytes")
# An estimate takes half a millisecond, a verdict on all cases some.
_MOST_ESTIMATES = 6_000
_MOST_CASES = 300


@dataclass(frozen=True)
class _Machine:
    """A machine that is known by its content."""

    digest: str
    hw: "hwmodels.Accelerator" = field(compare=False)


def machine_grid(
    totals: Sequence[AnyRow], parts: Sequence[AnyRow], machine: "hwmodels.Accelerator"
) -> dict[str, Any] | None:
    """Costs of the cases of one context on other machines; None where that is too much to ask.

    Parameters
    ----------
    totals : sequence of rows
        Of one context, with numbers.
    parts : sequence of rows
        Cost of each shape of these cases, with ``call``: its workload, array and kernel.
    machine : Accelerator
        The machine of the rows.

    Returns
    -------
    grid : dict or None
        ``controls`` (``name``, ``values`` as texts, ``base``, the index of the machine as it is),
        ``labels`` of the cases, for each of `GRID_COSTS` a list of values by label at each point,
        in the order of ``product`` over the controls, and ``answers``: the verdict's label at each.
    """
    by_label: dict[str, list[AnyRow]] = {}
    for part in parts:
        by_label.setdefault(part["label"], []).append(part)
    rows = [row for row in totals if row["label"] in by_label]
    controls = [control for asked in CONTROLS if (control := _on(machine, *asked))]
    n_points = math.prod(len(control["values"]) for control in controls)
    n_estimates = len({part["call"] for part in parts}) * n_points
    if not rows or len(rows) > _MOST_CASES or n_estimates > _MOST_ESTIMATES:
        return None
    known = _Machine(machine.digest(), machine)
    grid: dict[str, list[Any]] = {name: [] for name in (*GRID_COSTS, "answers")}
    for chosen in product(*(control.pop("changes") for control in controls)):
        changes = tuple(pair for pair in chosen if pair is not None)
        there = [{**row, **_costs(by_label[row["label"]], known, changes)} for row in rows]
        for name in GRID_COSTS:
            grid[name].append([row[name] for row in there])
        best = verdict_of(there).row
        grid["answers"].append(None if best is None else best["label"])
    return {"controls": controls, "labels": [row["label"] for row in rows], **grid}


def _on(
    machine: "hwmodels.Accelerator", name: str, key: str, factors: Sequence[float]
) -> dict[str, Any] | None:
    """A control as it is on a machine; None where it has one value only."""
    block: Any = machine
    for step in key.split("."):
        block = getattr(block, step)
    is_count = isinstance(block, int)
    # Half a column is none.
    kept = [f for f in factors if not is_count or (block * f).is_integer()]
    values = [int(block * f) if is_count else block * f for f in kept]
    if len(kept) < 2:
        return None
    return {
        "name": name,
        "values": [f"{v:,}" if is_count else _in_words(key, v) for v in values],
        "base": kept.index(1.0),
        "changes": [None if f == 1.0 else (key, v) for f, v in zip(kept, values, strict=True)],
    }


def _in_words(key: str, value: float) -> str:
    if key.endswith("hz"):
        return f"{value / 1e9:.4g} GHz"
    return f"{value / 1e9:,.4g} GB/s" if value < 1e12 else f"{value / 1e12:,.4g} TB/s"


@lru_cache(maxsize=512)
def _changed(
    machine: _Machine, changes: tuple[tuple[str, float], ...], mac: Any
) -> "hwmodels.Accelerator":
    hw = hwmodels.with_overrides(machine.hw, dict(changes)) if changes else machine.hw
    return hwmodels.machine_with_array(hw, mac)


@lru_cache(maxsize=20_000)
def _cost(
    machine: _Machine, changes: tuple[tuple[str, float], ...], call: tuple[Any, Any, str | None]
) -> tuple[float, ...]:
    work, mac, kernel = call
    cost = hwmodels.estimate_cost(work, _changed(machine, changes, mac), kernel=kernel)
    return tuple(getattr(cost, name) for name in GRID_COSTS)


def _costs(
    parts: Iterable[AnyRow], machine: _Machine, changes: tuple[tuple[str, float], ...]
) -> dict[str, float]:
    sums = dict.fromkeys(GRID_COSTS, 0.0)
    for part in parts:
        for name, value in zip(GRID_COSTS, _cost(machine, changes, part["call"]), strict=True):
            sums[name] += part["calls"] * value
    return sums


def strips_view(data: ReportData, found: Sequence[Answer]) -> dict[str, Any] | None:
    """Images of a small model at measured errors; those of the nearest to a choice stand out."""
    if data.error != "output_error":
        return None
    known = image_anchors()
    wanted = [a.best[data.error] for a in found if a.best and a.best.get(data.error)]
    nearest = {
        min(known["anchors"], key=lambda x: abs(math.log(x[data.error] / error)))["split"]
        for error in wanted
        if 0 < error < math.inf
    }
    rows = [
        {
            "name": anchor["split"],
            "text": f"{value_text(data.error, anchor[data.error])} error, "
            f"{anchor['psnr_db']:.1f} dB",
            "strip": anchor["strip"],
            "strong": anchor["split"] in nearest,
        }
        for anchor in known["anchors"]
    ]
    full = {"name": "full precision", "text": "", "strip": known["reference"], "strong": False}
    told = "In bold: the error nearest to the choice." if nearest else ""
    return {**known["about"], "rows": [*rows, full], "told": told}


def case_texts(data: ReportData, total: AnyRow) -> dict[str, str]:
    """What to copy of a case: its ``command``, ``recipe`` and ``vectors``.

    Parameters
    ----------
    data : ReportData
    total : row
        One of its totals.
    """
    plan = _plan_of(data.runs, total)
    head = ["--hw", _source(plan, str(total["accelerator"]))]
    head += ["--layer-dump", str(plan.get("dump") or total.get("dump") or "DUMP")]
    shared, paced, path = _path_words(total, plan)
    sweep = ["sweep", *head, *_plan_flags(plan), *_flags(total, _COLUMNS), *shared, *paced, *path]
    texts = {"command": shlex.join(["loraq-sim", *sweep, "--out", "runs/again"])}
    texts["recipe"] = _recipe(total)
    rows = [row for row in data.rows_of(total["context"]) if row["label"] == total["label"]]
    known = [row for row in rows if not is_missing(row.get("safe_acc_bits"))]
    if known and not path:
        widest = max(known, key=lambda row: row["safe_acc_bits"])
        own = _flags({**total, "split": widest.get("run_split") or total["split"]}, _COLUMNS)
        words = ["vectors", *head, "--layer", str(widest["layer"]), *own]
        words += [*shared, *_drawn(plan), "--out", "runs/vectors"]
        texts["vectors"] = shlex.join(["loraq-sim", *words])
    return texts


# Columns of a row and the options that ask for them.
_COLUMNS = {
    **{"split": "--split", "method": "--method", "preset": "--preset", "family": "--family"},
    **{"group_size": "--group", "token_limit": "--tokens", "seed": "--seed"},
    **{"smooth": "--smooth", "rotation": "--rotate", "condition": "--condition"},
    "finish": "--finish",
}
_OF_PLAN = {"model": "--model", "resolution": "--resolution", "kernel": "--kernel"}


def _flags(row: AnyRow, options: Mapping[str, str]) -> list[str]:
    words = []
    for name, option in options.items():
        if not is_missing(row.get(name)) and row[name] != "":
            words += [option, str(row[name])]
    return words


def _plan_of(runs: Sequence[AnyRow], total: AnyRow) -> Mapping[str, Any]:
    """The plan of the last sweep that asked for a case, as far as can be told."""
    for run in reversed(runs):
        plan = run.get("plan") or {}
        if not _is_sound(plan):
            continue
        names = str(plan.get("dump") or "").replace("\\", "/").rstrip("/").split("/")
        if names[-1] == total.get("dump") and total["split"] in (plan.get("splits") or ()):
            return plan
    return {}


def _is_sound(plan: Any) -> bool:
    """Whether a plan has the shape of one: a store may hold anything."""
    if not isinstance(plan, Mapping):
        return False
    lists = [plan.get(k) or [] for k in ("layers", "splits", "accelerators", "lora", "overrides")]
    tables = [plan.get(k) or {} for k in ("rows", "datapath")]
    if not all(isinstance(x, list) for x in lists):
        return False
    tables += [
        override.get("settings") or {} for override in lists[-1] if isinstance(override, Mapping)
    ]
    return all(isinstance(x, Mapping) for x in (*tables, *lists[-1]))


def _source(plan: Mapping[str, Any], name: str) -> str:
    """How the plan named an accelerator: a file, where its name is not the file's."""
    asked = [str(text) for text in plan.get("accelerators") or ()]
    files_asked = [text for text in asked if text.endswith((".yaml", ".yml"))]
    if name in asked or not files_asked:
        return name
    alike = [text for text in files_asked if name.partition("@")[0] in text]
    return (alike or files_asked)[0]


def _plan_flags(plan: Mapping[str, Any]) -> list[str]:
    words = []
    for pattern in plan.get("layers") or ():
        words += ["--layers", str(pattern)]
    for pattern, rows in (plan.get("rows") or {}).items():
        words += ["--rows", f"{pattern}={rows}"]
    for override in plan.get("overrides") or ():
        settings = ",".join(f"{k}={v}" for k, v in (override.get("settings") or {}).items())
        words += ["--override", f"{override.get('pattern')}:{settings}"]
    words += _drawn(plan)
    if (plan.get("batch") or 1) != 1:
        words += ["--batch", str(plan["batch"])]
    return words + _flags(plan, _OF_PLAN)


def _drawn(plan: Mapping[str, Any]) -> list[str]:
    """What becomes of the layers before anything else, in sweeps and vectors alike."""
    words = [word for text in plan.get("lora") or () for word in ("--lora", str(text))]
    return words + (["--synthesize-inputs"] if plan.get("synthesize_inputs") else [])


# Settings of the data path that have an option; a sweep can be told all others by --set.
_OF_PATH = {
    **{"acc_bits": "--acc-bits", "overflow": "--overflow", "accumulators": "--accumulators"},
    **{"products_per_add": "--products-per-add", "p_format": "--p-format", "array": "--array"},
    "zero_point": "--zero-point",
}


def _path_words(total: AnyRow, plan: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Words for the data path and the kernels: of both commands, of a sweep, and of `--set`."""
    try:
        options = json.loads(total.get("options") or "{}")
        path = dict(options.get("datapath") or {})
    except (AttributeError, TypeError, ValueError):
        options, path = {}, {}
    # What has a column is not among the options.
    for name, asked in (plan.get("datapath") or {}).items():
        if name not in path:
            path[name] = _one_of(asked, total.get(name))
    paced = ["--unfused"] if options.get("fused") is False else []
    rest = [f"datapath.{name}={value}" for name, value in path.items() if name not in _OF_PATH]
    return _flags(path, _OF_PATH), paced, [word for text in rest for word in ("--set", text)]


def _one_of(asked: Any, value: Any) -> Any:
    """Which of the values that a plan asked for a row has: formats of P are told in full there."""
    if not isinstance(asked, list | tuple):
        return asked
    alike = (value, str(value).partition("/")[0])
    return next((one for one in asked if one in alike), "branch" if "branch" in asked else value)


def _recipe(total: AnyRow) -> str:
    """The split of a case for all layers; empty where no recipe can say it."""
    names = {
        **{"split": "split", "method": "method", "preset": "preset", "family": "family"},
        **{"group_size": "group", "smooth": "smooth", "rotation": "rotate"},
        **{"condition": "condition", "finish": "finish", "seed": "seed"},
    }
    entry = {key: total[name] for name, key in names.items() if not is_missing(total.get(name))}
    try:
        recipe = Recipe.model_validate({"layers": {"*": entry}})
        return recipe_text(recipe)
    except (LoraqError, ValueError):
        # A store may hold anything.
        return ""


# Of the picture that stands where scripts do not run, in units of its view box.
_WIDTH, _HEIGHT = 720.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 706.0, 14.0, 350.0
_LETTER, _LINE = 6.4, 15.0
_MOST_NOTES = 12
_NEAR = 14


def static_front(data: ReportData, answer: Answer) -> dict[str, Any] | None:
    """Error against cost of one context as coordinates of a picture; None without points."""
    cost, error = answer.cost, answer.verdict.error
    rows = [
        row
        for row in data.totals_of(answer.context)
        if not is_missing(row.get(cost)) and not is_missing(row.get(error)) and row[error] > 0
    ]
    drawn = [row[error] for row in rows] + [row[cost] for row in rows if row[cost]]
    if not rows or not all(map(can_draw, drawn)):
        return None
    x_unit, y_unit = (
        choose_unit([row[key] for row in rows], column_for(key).quantity) for key in (cost, error)
    )
    xs, ys = (
        [row[key] / unit.size for row in rows] for key, unit in ((cost, x_unit), (error, y_unit))
    )
    low, high = _spread(min(xs), max(xs))
    ends = (math.log(min(ys)) - 0.2, math.log(max(ys)) + 0.2)

    def x_at(value: float) -> float:
        return round(_LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT), 1)

    def y_at(value: float) -> float:
        return round(
            _BOTTOM - (math.log(value) - ends[0]) / (ends[1] - ends[0]) * (_BOTTOM - _TOP), 1
        )

    places = {id(row): (x_at(x), y_at(y)) for row, x, y in zip(rows, xs, ys, strict=True)}
    best = None if answer.best is None else answer.best["label"]
    on_front = sorted((row for row in rows if cost in row["fronts"]), key=lambda row: row[cost])
    edge = [places[id(row)] for row in on_front]
    colors = main_colors([str(row["split"]) for row in data.totals])
    y_ticks = nice_log_ticks(math.exp(ends[0]), math.exp(ends[1]))
    x_ticks = _even_ticks(low, high)
    heading, of_error = column_for(cost).heading, column_for(error).heading
    return {
        **{"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT},
        **{"top": _TOP, "bottom": _BOTTOM},
        "label": f"{of_error} against {heading} on {answer.context}",
        "x_title": f"{heading[:1].upper()}{heading[1:]} ({pretty_unit(x_unit.symbol)})",
        "y_title": f"{of_error[:1].upper()}{of_error[1:]} ({pretty_unit(y_unit.symbol)})",
        "x_ticks": [
            {"at": x_at(tick), "text": text}
            for tick, text in zip(x_ticks, tick_texts(x_ticks, even=True), strict=True)
        ],
        "y_ticks": [
            {"at": y_at(tick), "text": text}
            for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True)
        ],
        "edge": _step(edge),
        "points": [
            {
                "x": places[id(row)][0], "y": places[id(row)][1], "label": row["label"],
                "r": 7 if row["label"] == best else 5,
                "color": colors[main_and_branch(str(row["split"]))[0]],
                "opacity": 1 if cost in row["fronts"] or row["label"] == best else 0.45,
            }
            for row in rows
        ],
        "notes": _notes(on_front[:_MOST_NOTES], places, best, edge),
    }  # fmt: skip


def _spread(low: float, high: float) -> tuple[float, float]:
    span = (high - low) or 0.2 * abs(high) or 1.0
    return max(low - 0.12 * span, 0.0 if low >= 0 else -math.inf), high + 0.1 * span


def _even_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round values between `low` and `high`, evenly spaced."""
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 5, 10, 20) if (high - low) / (size * m) <= most)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _step(edge: Sequence[tuple[float, float]]) -> str:
    """The path of a front: from above its first point to right of its last."""
    if not edge:
        return ""
    path = f"M{edge[0][0]},{_TOP}V{edge[0][1]}"
    path += "".join(f"H{x}V{y}" for x, y in edge[1:])
    return f"{path}H{_RIGHT}"


def _notes(
    rows: Sequence[AnyRow],
    places: dict[int, tuple[float, float]],
    best: str | None,
    edge: Sequence[tuple[float, float]],
) -> list[dict[str, Any]]:
    """Labels of the front where they cover neither point nor line."""
    # The engine has y upward.
    up = [(places[id(row)][0], -places[id(row)][1]) for row in rows]
    sizes = [(_LETTER * len(row["label"]) + 4, _LINE) for row in rows]
    corners = [(x0, -y0, x1, -y1) for (x0, y0), (x1, y1) in pairwise(edge)]
    line = [(x0 + t * (x1 - x0) / 40, y0) for x0, y0, x1, _ in corners for t in range(41)]
    line += [(x1, y0 + t * (y1 - y0) / 40) for _, y0, x1, y1 in corners for t in range(41)]
    dots = [Box(x0=x - 8, y0=-y - 8, x1=x + 8, y1=-y + 8) for x, y in places.values()]
    bounds = Box(x0=_LEFT + 2, y0=-_BOTTOM + 2, x1=_WIDTH - 2, y1=-_TOP)
    boxes = place_labels(up, sizes, bounds=bounds, obstacles=dots, line=line)
    found = []
    for row, box, anchor in zip(rows, boxes, up, strict=True):
        near = box.nearest(anchor)
        leader = f"M{near[0]:.1f},{-near[1]:.1f}L{anchor[0]:.1f},{-anchor[1]:.1f}"
        found.append(
            {
                "x": round(box.x0 + 2, 1), "y": round(-box.y0 - 4, 1), "text": row["label"],
                "strong": row["label"] == best,
                "leader": leader if math.dist(near, anchor) > _NEAR else "",
            }
        )  # fmt: skip
    return found
