"""Pictures of machines: layers under their roofs, a step in time, arrays, the model measured.

A roofline has every layer of a split under what the machine can do; a timeline has the calls of a
step; an array's picture has its gates beside its error; the last one has what the cost model says
of each measured time.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError, counted
from loraq_sim.reporting.figures import draw_heading, without_math
from loraq_sim.reporting.labels import SERIES_COLORS
from loraq_sim.reporting.panels import GRID, INK, MUTED, can_draw, set_log_axis
from loraq_sim.reporting.report_data import BOUND_NAMES
from loraq_sim.results.rows import AnyRow
from loraq_sim.results.wording import labels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    import hwmodels
    from hwmodels.schedule import ScheduledTask, StepSchedule

__all__ = ["arrays_figure", "roofline_figure", "timeline_figure", "validation_figure"]


def roofline_figure(rows: Sequence[AnyRow], machine: "hwmodels.Accelerator") -> "Figure":
    """Rate of each layer of one split against MACs per byte from DRAM, under the machine's roofs.

    The roof of the MACs is that of the modes in which the rows run, main branch and branch
    together: their MACs in the time that the latency and the utilization leave.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("latency_s") and row.get("dram_bytes")]
    if not rows:
        raise InputError("there is nothing to draw: no layer has a latency and bytes from DRAM")
    figure = Figure(figsize=(7.4, 4.4), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.7))
    macs = [
        row["m"] * (row["n"] * row["k"] + (row.get("rank") or 0) * (row["n"] + row["k"]))
        for row in rows
    ]
    xs = [count / row["dram_bytes"] for count, row in zip(macs, rows, strict=True)]
    ys = [count / row["latency_s"] for count, row in zip(macs, rows, strict=True)]
    roofs = [y / row["utilization"] for y, row in zip(ys, rows, strict=True) if row["utilization"]]
    peak = max(roofs, default=max(ys))
    bytes_per_s = machine.memories.dram.bandwidth_bytes_per_s
    ridge = peak / bytes_per_s
    left, right = min([*xs, ridge]) / 2, max([*xs, ridge]) * 2
    roof = [left * bytes_per_s / 1e9, peak / 1e9, peak / 1e9]
    axes.loglog([left, ridge, right], roof, color=INK, linewidth=1.4)
    counts = Counter(str(row["bound"]) for row in rows)
    for (bound, count), color in zip(counts.most_common(), SERIES_COLORS, strict=False):
        own = [i for i, row in enumerate(rows) if str(row["bound"]) == bound]
        label = f"{BOUND_NAMES.get(bound, bound)} ({counted(count, 'layer')})"
        look: dict[str, Any] = {"color": color, "markersize": 5, "alpha": 0.8, "label": label}
        axes.loglog([xs[i] for i in own], [ys[i] / 1e9 for i in own], "o", **look)
    set_log_axis(axes.xaxis, [left, right], below=0.0, above=0.0)
    set_log_axis(axes.yaxis, [*roof, *(y / 1e9 for y in ys)], below=0.25, above=0.2)
    words: dict[str, Any] = {"fontsize": 8, "color": MUTED}
    axes.text(right / 1.02, roof[1] * 1.15, f"{peak / 1e12:.3g} TMAC/s", ha="right", **words)
    middle = math.sqrt(left * ridge)
    ends = axes.transData.transform([(left, roof[0]), (ridge, roof[1])])
    slope = math.degrees(math.atan2(ends[1][1] - ends[0][1], ends[1][0] - ends[0][0]))
    axes.annotate(
        f"DRAM {bytes_per_s / 1e9:.3g} GB/s",
        (middle, middle * bytes_per_s / 1e9),
        (-4, 4),
        textcoords="offset points",
        rotation=slope,
        rotation_mode="anchor",
        ha="center",
        **words,
    )
    axes.set_xlabel("MACs per byte from DRAM", fontsize=9, color=INK)
    axes.set_ylabel("GMAC/s", fontsize=9, color=INK)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right", title="bound by", title_fontsize=8)
    title = f"{machine.name}: {labels_of(rows)[0]} under the roofs of the machine"
    figure.text(0.11, 0.905, title, fontsize=11, color=INK, fontweight="bold")
    reached = max(y / min(peak, x * bytes_per_s) for x, y in zip(xs, ys, strict=True))
    told = f"{counted(len(rows), 'layer')}; the nearest to its roof reaches {reached:.0%} of it"
    figure.text(0.11, 0.85, told, **words)
    return figure


_TIMELINE_KINDS = {"attention": "C1", "elementwise": "C2", "gemm": "C0"}


@without_math
def timeline_figure(
    schedule: "StepSchedule", kinds: Mapping[str, str], *, title: str, block: int | None = None
) -> "Figure":
    """A step in time: the units in use over all of it, and the calls of one block as bars.

    `kinds` says of each name whether it is gemm, attention or elementwise; `block` counts from 1
    (default: the one in the middle). The height of a bar is the share of the units that the call
    fills; bars that no measured row carries are pale.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    blocks = sorted({task.block for task in schedule.tasks if task.block > 0})
    number = blocks[len(blocks) // 2] if block is None else block
    if number not in blocks:
        raise InputError(f"block={number} is not in the step; it has blocks 1 to {blocks[-1]}")
    shown = [task for task in schedule.tasks if task.block == number]
    # What is early may have run long before its block: bars are drawn where the block is.
    stays = [task for task in shown if task.end_s >= _block_start(shown)]
    names = list(dict.fromkeys(task.name for task in sorted(stays, key=lambda t: t.start_s)))
    figure = Figure(figsize=(9.0, 2.6 + 0.24 * len(names)), layout="constrained")
    whole, bars = figure.subplots(2, 1, height_ratios=(1, 1 + 0.2 * len(names)))
    times, in_use = _units_in_use(schedule)
    whole.fill_between(
        [1e3 * t for t in times], in_use, step="post", color="C0", alpha=0.6, linewidth=0
    )
    whole.set(
        ylim=(0, 1.05), xlim=(0, 1e3 * schedule.makespan_s), ylabel="units in use", xlabel="ms"
    )
    for task in stays:
        bars.barh(
            names.index(task.name),
            1e3 * (task.end_s - task.start_s),
            left=1e3 * task.start_s,
            height=max(0.08, 0.9 * task.units_share),
            color=_TIMELINE_KINDS[kinds[task.name]],
            alpha=1.0 if task.is_validated else 0.45,
            linewidth=0,
        )
    bars.set_yticks(range(len(names)), names, fontsize="small")
    bars.invert_yaxis()
    bars.set_xlabel(f"ms, block {number} of {blocks[-1]}")
    patches = [Patch(color=color, label=kind) for kind, color in _TIMELINE_KINDS.items()]
    patches.append(Patch(color="0.4", alpha=0.45, label="pale: no measured row"))
    bars.legend(handles=patches, frameon=False, fontsize="small", loc="lower left")
    facts = (
        f"{1e3 * schedule.makespan_s:,.4g} ms; one call after the other "
        f"{1e3 * schedule.serial_s:,.4g} ms, critical path "
        f"{1e3 * schedule.critical_path_s:,.4g} ms, idle {schedule.idle_share:.1%} of the units, "
        f"{schedule.validated_share:.0%} of the time validated"
    )
    whole.set_title(f"{title}\n{facts}", loc="left", fontsize="small")
    return figure


def _block_start(tasks: "Sequence[ScheduledTask]") -> float:
    """When the last call of a block ends, less the time of its calls: before that is early."""
    spent = sum(task.end_s - task.start_s for task in tasks)
    return max(task.end_s for task in tasks) - 1.2 * spent


def _units_in_use(schedule: "StepSchedule") -> tuple[list[float], list[float]]:
    changes: dict[float, float] = {}
    for task in schedule.tasks:
        changes[task.start_s] = changes.get(task.start_s, 0.0) + task.units_share
        changes[task.end_s] = changes.get(task.end_s, 0.0) - task.units_share
    times, level, levels = sorted(changes), 0.0, []
    for time in times:
        level += changes[time]
        levels.append(min(1.0, max(0.0, level)))
    return times, levels


_MOST_BARS = 40


@without_math
def arrays_figure(drawn: Mapping[str, Any], context: str) -> "Figure | None":
    """Area of arrays by part beside their error; None where a context has no grid of arrays."""
    from matplotlib.figure import Figure

    rows = [row for row in drawn["arrays"] if row["context"] == context]
    if not rows:
        return None
    order = ("products_per_add", "accumulators", "acc_bits", "overflow")
    bars = sorted((r for r in rows if r["parts"]), key=lambda row: [row[key] for key in order])
    bars = bars[:: -(-len(bars) // _MOST_BARS)] if bars else []
    figure = Figure(figsize=(11.5, 6.2), dpi=100, layout=None)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.22})
    figure.subplots_adjust(left=0.12, right=0.97, top=0.80, bottom=0.10)
    _draw_array_parts(left, bars)
    _draw_array_errors(right, rows)
    free = sum(row["overflow_count"] == 0 for row in rows)
    draw_heading(
        figure,
        f"What the accumulator costs on {context}",
        f"{counted(len(rows), 'array')} of one throughput; {free} hold every sum of these layers; "
        "circle: the verdict; cross: adds overflow; gates from synthesis",
    )
    return figure


def _draw_array_parts(axes: "Axes", rows: Sequence[AnyRow]) -> None:
    """Gate equivalents per MAC by part, one bar an array; `rows` as of `ReportData.arrays`."""
    names = dict.fromkeys(part for row in rows for part in row["parts"])
    ends = [0.0] * len(rows)
    for part, color in zip(names, SERIES_COLORS, strict=False):
        sizes = [row["parts"].get(part, 0.0) for row in rows]
        axes.barh(range(len(rows)), sizes, left=ends, color=color, height=0.72, label=part)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    texts = [f"{row['products_per_add']} x, {row['acc_bits']} {row['overflow']}" for row in rows]
    axes.set_yticks(range(len(rows)), texts, fontsize=7 if len(rows) < 30 else 5)
    axes.invert_yaxis()
    axes.set_xlabel("Gate equivalents per MAC", fontsize=9, color=INK)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8)


def _draw_array_errors(axes: "Axes", rows: Sequence[AnyRow]) -> None:
    """Error (log) against area, a line for each adder tree and rule; crosses overflow."""
    lines: dict[str, list[AnyRow]] = {}
    drawn = [row for row in rows if row["error"] and can_draw(row["error"])]
    for row in sorted(drawn, key=lambda row: row["acc_bits"]):
        turns = f", {row['accumulators']} accumulators" if (row["accumulators"] or 1) > 1 else ""
        name = f"{row['products_per_add']} an add, {row['overflow']}{turns}"
        lines.setdefault(name, []).append(row)
    for i, (name, own) in enumerate(lines.items()):
        color = SERIES_COLORS[i % len(SERIES_COLORS)]
        style = "-" if own[0]["overflow"] == "wrap" else ":"
        x, y = [row["area_ge"] for row in own], [100 * row["error"] for row in own]
        axes.plot(x, y, label=name, color=color, linestyle=style, linewidth=1.2)
        for overflows, marker in ((False, "o"), (True, "x")):
            at = [p for p, row in enumerate(own) if bool(row["overflow_count"]) is overflows]
            points = ([x[p] for p in at], [y[p] for p in at])
            axes.plot(*points, linestyle="none", marker=marker, color=color, ms=5)
    for row in drawn:
        if row["is_answer"]:
            at_answer = (row["area_ge"], 100 * row["error"])
            axes.plot(*at_answer, marker="o", ms=13, mfc="none", mec=INK, mew=1.6)
    if drawn:
        set_log_axis(axes.yaxis, [100 * row["error"] for row in drawn], below=0.08, above=0.08)
    axes.set_xlabel("Gate equivalents per MAC", fontsize=9, color=INK)
    axes.set_ylabel("Error (%)", fontsize=9, color=INK)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


_BAND = 0.15
_DEVICE_MARKS = "osD^v<>PX*ph"


def validation_figure(rows: list[dict[str, Any]]) -> "Figure":
    """Predicted over measured time against measured time, a mark per row and a look per device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.4), dpi=100, facecolor="white")
    axes = figure.add_axes((0.08, 0.11, 0.66, 0.71))
    times = [row["measured_ms"] for row in rows]
    ratios = [row["predicted_ms"] / row["measured_ms"] for row in rows]
    set_log_axis(axes.xaxis, times, below=0.05, above=0.05)
    set_log_axis(axes.yaxis, [0.5, 2.0, *ratios], below=0.05, above=0.05)
    axes.axhspan(1 - _BAND, 1 + _BAND, color=GRID, linewidth=0)
    axes.axhline(1, color=MUTED, linewidth=0.8)
    devices = list(dict.fromkeys(row["device"] for row in rows))
    for index, device in enumerate(devices):
        own = [i for i, row in enumerate(rows) if row["device"] == device]
        axes.plot(
            [times[i] for i in own],
            [ratios[i] for i in own],
            linestyle="none",
            marker=_DEVICE_MARKS[index % len(_DEVICE_MARKS)],
            color=SERIES_COLORS[index % len(SERIES_COLORS)],
            markersize=5,
            alpha=0.8,
            label=f"{device}: {counted(len(own), 'row')}, {100 * _mean_error(rows, own):.0f} %",
        )
    axes.set_xlabel("Measured time (ms)", fontsize=9, color=INK)
    axes.set_ylabel("Predicted over measured time", fontsize=9, color=INK)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1.02),
        title="mean error of a device", title_fontsize=8.5, alignment="left",
    )  # fmt: skip
    mean, worst = _mean_error(rows, range(len(rows))), max(abs(row["error"]) for row in rows)
    draw_heading(
        figure,
        f"Measured GEMMs: the cost model is off by {100 * mean:.1f} % in the mean of {len(rows)}",
        f"{counted(len(devices), 'device')}; at worst {100 * worst:.0f} %; "
        f"shaded: within {100 * _BAND:.0f} %",
    )
    return figure


def _mean_error(rows: Sequence[AnyRow], own: Sequence[int]) -> float:
    return sum(abs(rows[i]["error"]) for i in own) / len(own)
