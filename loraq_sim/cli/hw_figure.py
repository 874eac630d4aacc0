"""The picture of ``hw validate``: predicted against measured time on logarithmic axes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["validation_figure"]

_BAND = 0.15


def validation_figure(rows: list[dict[str, Any]]) -> "Figure":
    """Points per device around the line of equal times, with a band of 15 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.0), layout="constrained")
    axes = figure.add_subplot()
    times = [row[name] for row in rows for name in ("measured_ms", "predicted_ms")]
    ends = [0.6 * min(times), 1.7 * max(times)]
    low, high = ([end * (1 + sign * _BAND) for end in ends] for sign in (-1, 1))
    axes.fill_between(ends, low, high, color="0.9", linewidth=0, label=f"within {_BAND:.0%}")
    axes.plot(ends, ends, color="0.5", linewidth=0.8)
    for marker, device in zip(
        "osD^v<>PX*ph" * 9, dict.fromkeys(r["device"] for r in rows), strict=False
    ):
        own = [row for row in rows if row["device"] == device]
        mean = sum(abs(row["error"]) for row in own) / len(own)
        axes.plot(
            [row["measured_ms"] for row in own],
            [row["predicted_ms"] for row in own],
            linestyle="none",
            marker=marker,
            markersize=5,
            label=f"{device}: {len(own)} rows, {mean:.1%} mean",
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured time (ms)", ylabel="predicted time (ms)")
    axes.legend(frameon=False, fontsize="small")
    return figure
