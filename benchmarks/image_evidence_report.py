"""Tables and figures of benchmarks/image_evidence.py."""

from pathlib import Path

import numpy as np
from image_aggregates import aggregate_all
from scipy.stats import bootstrap, spearmanr

from loraq_sim.reporting.figures import save_figure

__all__ = ["write_report"]

INTRO = """# Images of examples/tiny_pixart under each arithmetic

`python benchmarks/image_evidence.py`. Checkpoint {checkpoint} (SHA-256 of the weights), {images}
images of noise seeds {seeds}, 25 Euler steps, guidance 3. Every linear layer that SVDQuant
quantizes ({n_layers} of them) runs on the emulated data path of `aie2` (32-bit accumulators unless
said otherwise, combine in float32, output bfloat16); the rest is float32. PSNR (range 2, mean over
images) and SSIM are against float32 at the same noise; `±` is the standard deviation over seeds
(seed 0 alone for sums outside the accumulator, single layers and recipes), `images ±` that over
images. Branches have the bytes of a 16-bit branch of rank 4 (3 % of the width,
as 32 of 1152 in PixArt-Σ). Two unrelated noises are {floor:.1f} dB apart.
"""
PREDICTORS = """
## Which number of the layers predicts the images?

Spearman's rank correlation of each aggregate of the layers' output errors with the images' mean
square error (means over seeds), with its 95 % interval (bootstrap over variants). Layer errors are
measured on {rows} captured rows of other noise. `recipes`: {n_mixed} random mixed recipes, every
layer W4A4, W4A8, W8A8, W3A4, W4A3, a 4-bit main branch with an 8-bit branch (two ranks), or 16
bits: the choice that `allocate` makes. `uniform`: all layers alike ({n_uniform} splits, smoothings,
rounding modes, accumulators without overflow). `overflow`: {n_overflow} accumulators that overflow.
`all`: everything. The last line is not free: it needs the images of every layer alone.
"""
UNIFORM = ("splits", "smoothing", "rounding", "combine")


def write_report(kept, report, figures):
    """Write the Markdown page and its figures."""
    means = _means(kept["images"])
    tables = [
        _section("Splits", means, "splits", "smoothing"),
        _section("Rounding of activations and P", means, "rounding"),
        _section("Sums outside the accumulator", means, "combine"),
        _widths(means),
        _predictors(kept, means),
        _alone(kept, means),
    ]
    some = next(iter(kept["images"].values()))
    seeds = sorted({row["seed"] for row in kept["images"].values()})
    intro = INTRO.format(
        checkpoint=kept["about"]["checkpoint"],
        images=some["images"],
        seeds=", ".join(map(str, seeds)),
        n_layers=max(row["n_layers"] for row in kept["images"].values()),
        floor=kept["about"].get("floor_db", float("nan")),
    )
    report.write_text(intro + "\n" + "\n".join(tables), encoding="utf-8")
    Path(figures).mkdir(parents=True, exist_ok=True)
    save_figure(_split_figure(means), Path(figures) / "image_splits.png")
    save_figure(_width_figure(means), Path(figures) / "image_widths.png")
    save_figure(_predictor_figure(kept, means), Path(figures) / "image_predictors.png")


def _means(images):
    """Mean and spread over seeds of each (part, label)."""
    groups = {}
    for row in images.values():
        groups.setdefault((row["part"], row["label"]), []).append(row)
    means = {}
    for key, rows in groups.items():
        psnr = np.array([row["psnr_db"] for row in rows])
        means[key] = {
            **rows[0],
            "psnr_db": float(psnr.mean()),
            "spread": float(psnr.std(ddof=1)) if len(rows) > 1 else None,
            "psnr_std": float(np.mean([row["psnr_std"] for row in rows])),
            "ssim": float(np.mean([row["ssim"] for row in rows])),
            "mse": float(np.mean([row["mse"] for row in rows])),
            "overflow_count": float(np.mean([row["overflow_count"] for row in rows])),
        }
    return means


def _of_part(means, *parts):
    return {key: row for key, row in means.items() if key[0] in parts}


def _psnr(row):
    return f"{row['psnr_db']:.2f}" + ("" if row["spread"] is None else f" ± {row['spread']:.2f}")


def _section(title, means, *parts):
    lines = [f"## {title}", "", "| arithmetic | bits per weight | PSNR dB | images ± | SSIM |"]
    lines.append("|---|---|---|---|---|")
    for (_, label), row in _of_part(means, *parts).items():
        cells = f"{row['bits_per_weight']:.2f} | {_psnr(row)} | {row['psnr_std']:.1f}"
        lines.append(f"| {label} | {cells} | {row['ssim']:.4f} |")
    return "\n".join(lines) + "\n"


def _widths(means):
    rows = _of_part(means, "widths")
    if not rows:
        return ""
    safe = max(row["safe_acc_bits"] for row in rows.values())
    lines = [
        "## Accumulators",
        "",
        f"LoRaQ W4A4+W8A8@fp16r4, 8 products an add; the narrowest width without an overflow in "
        f"these images is {safe} bits.",
        "",
        "| bits | saturate dB | overflows | wrap dB | overflows |",
        "|---|---|---|---|---|",
    ]
    for bits in sorted({row["acc_bits"] for row in rows.values()}, reverse=True):
        cells = []
        for overflow in ("saturate", "wrap"):
            row = means[("widths", f"{overflow} {bits}")]
            cells += [_psnr(row), f"{row['overflow_count']:.3g}"]
        lines.append(f"| {bits} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- aggregates


def _table_of_aggregates(kept, means):
    """(values, mse, set name) of every variant with layer errors."""
    alone_rows = {
        label: kept["layers"][f"alone|{label}"][0]
        for part, label in means
        if part == "alone" and f"alone|{label}" in kept["layers"]
    }
    gain = {
        label: means[("alone", label)]["mse"] / (row["miss"] / row["size"])
        for label, row in alone_rows.items()
    }
    found = []
    for (part, label), row in means.items():
        if part == "alone":
            continue
        values = aggregate_all(kept["layers"][f"{part}|{label}"], alone_rows, gain)
        is_safe = row["overflow_count"] == 0
        kind = "recipes" if part == "mixed" else "uniform" if is_safe else "overflow"
        found.append((values, row, kind))
    return found


def _correlation(x, y):
    # Rounding noise is not an order: weight errors are the same whatever the accumulator is.
    if len(set(np.round(x, 12))) < 3:
        return None, None
    rho = spearmanr(x, y).statistic
    if len(x) < 6:
        return rho, None
    interval = bootstrap(
        (np.array(x), np.array(y)),
        lambda a, b: spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=500,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return rho, (interval.low, interval.high)


def _correlations(kept, means):
    """Aggregate -> set -> (rho, interval)."""
    table = _table_of_aggregates(kept, means)
    sets = {
        "recipes": [entry for entry in table if entry[2] == "recipes"],
        "uniform": [entry for entry in table if entry[2] == "uniform"],
        "overflow": [entry for entry in table if entry[2] == "overflow"],
        "all": table,
    }
    names = list(table[0][0])
    return {
        name: {
            set_name: _correlation([e[0][name] for e in entries], [e[1]["mse"] for e in entries])
            for set_name, entries in sets.items()
            if len(entries) > 2
        }
        for name in names
    }, {set_name: len(entries) for set_name, entries in sets.items()}


def _predictors(kept, means):
    found, sizes = _correlations(kept, means)
    text = PREDICTORS.format(
        rows=256, n_mixed=sizes["recipes"], n_uniform=sizes["uniform"],
        n_overflow=sizes["overflow"],
    )  # fmt: skip
    sets = list(next(iter(found.values())))
    lines = [text, "| aggregate | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for name, by_set in found.items():
        cells = [
            ("-" if rho is None else f"{rho:.2f}")
            + ("" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})")
            for rho, interval in by_set.values()
        ]
        lines.append(f"| {name.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    gain, low, high = _gain(kept, means)
    lines += [
        "",
        f"On the recipes, weighting by outputs gains {gain:+.2f} of correlation over weighting by "
        f"calls (95 % interval {low:+.2f} to {high:+.2f}, paired bootstrap over recipes). Every "
        "layer of this model runs once a call, so weighting by calls is no weighting here.",
    ]
    return "\n".join(lines) + "\n"


def _gain(kept, means):
    """Spearman by outputs less that by calls on the recipes, with its 95 % interval."""
    entries = [entry for entry in _table_of_aggregates(kept, means) if entry[2] == "recipes"]
    names = [name for name in entries[0][0] if name.startswith(("rms by outputs", "rms by calls"))]
    by_calls, by_outputs = (np.array([e[0][name] for e in entries]) for name in names)
    mse = np.array([e[1]["mse"] for e in entries])

    def difference(calls, outputs, truth):
        return spearmanr(outputs, truth).statistic - spearmanr(calls, truth).statistic

    data = (by_calls, by_outputs, mse)
    interval = bootstrap(
        data,
        difference,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return difference(*data), interval.low, interval.high


def _alone(kept, means):
    """What one unit of a layer's error does to images, by kind of layer."""
    groups = {}
    for (part, label), row in means.items():
        if part == "alone":
            layer = kept["layers"][f"alone|{label}"][0]
            error = np.sqrt(layer["miss"] / layer["size"])
            block = int(label.split(".")[1])
            groups.setdefault(layer["kind"], {})[block] = (error, row["psnr_db"])
    lines = [
        "## One layer at a time", "",
        "Each layer alone in RTN W4A4 (noise seed 0): output error, and PSNR of the images.", "",
    ]  # fmt: skip
    blocks = sorted({block for by_block in groups.values() for block in by_block})
    lines.append("| kind | " + " | ".join(f"block {block}" for block in blocks) + " |")
    lines.append("|---" * (len(blocks) + 1) + "|")
    for kind, by_block in groups.items():
        cells = [f"{by_block[b][0]:.3f}: {by_block[b][1]:.1f} dB" for b in blocks if b in by_block]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- figures


def _figure(width, height, columns=1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _split_figure(means):
    rows = sorted(_of_part(means, "splits", "smoothing").items(), key=lambda kv: kv[1]["psnr_db"])
    figure, (ax,) = _figure(7.2, 0.34 * len(rows) + 1.1)
    colors = dict(zip(("rtn", "svdquant", "loraq"), ("#8C8C8C", "#D55E00", "#0072B2"), strict=True))
    for i, ((_, label), row) in enumerate(rows):
        color = colors[label.split()[0]]
        ax.errorbar(row["psnr_db"], i, xerr=row["spread"], fmt="o", color=color, capsize=3)
        text = f"  {row['psnr_db']:.1f}"
        ax.text(row["psnr_db"] + (row["spread"] or 0), i, text, va="center", fontsize=8.5)
    ax.set_yticks(range(len(rows)), [label for (_, label), _ in rows], fontsize=9)
    ax.margins(x=0.12)
    ax.set_xlabel("PSNR against full precision at the same noise, dB")
    ax.set_title("Images of each arithmetic (bars: standard deviation over seeds)", loc="left",
                 fontsize=10)  # fmt: skip
    return figure


def _width_figure(means):
    rows = _of_part(means, "widths")
    figure, (ax,) = _figure(6.4, 3.6)
    for overflow, color in (("saturate", "#0072B2"), ("wrap", "#D55E00")):
        mine = sorted(
            (row["acc_bits"], row["psnr_db"], row["spread"] or 0)
            for (_, label), row in rows.items()
            if label.startswith(overflow)
        )
        bits, psnr, spread = zip(*mine, strict=True)
        ax.errorbar(bits, psnr, yerr=spread, fmt="o-", color=color, capsize=3, label=overflow)
    safe = max(row["safe_acc_bits"] for row in rows.values())
    ax.axvline(safe, color="#666666", linestyle=":", linewidth=1)
    ax.annotate(f"no overflow from {safe} bits", (safe, ax.get_ylim()[0]), xytext=(-4, 6),
                textcoords="offset points", ha="right", fontsize=8.5, color="#666666")  # fmt: skip
    ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    ax.set_xticks(sorted({row["acc_bits"] for row in rows.values()}))
    ax.set_xlabel("accumulator, bits")
    ax.set_ylabel("PSNR, dB")
    ax.legend(frameon=False)
    ax.set_title("W4A4+W8A8@fp16r4 on narrower accumulators", loc="left", fontsize=10)
    return figure


def _predictor_figure(kept, means):
    found, _ = _correlations(kept, means)
    table = _table_of_aggregates(kept, means)
    figure, (left, right) = _figure(11.5, 4.9, columns=2)
    names = list(found)[::-1]
    for offset, set_name, color in ((0.2, "recipes", "#0072B2"), (-0.2, "uniform", "#E69F00")):
        for i, name in enumerate(names):
            rho, interval = found[name][set_name]
            low, high = interval or (rho, rho)
            errors = [[max(rho - low, 0)], [max(high - rho, 0)]]
            label = set_name if i == 0 else None
            left.errorbar(rho, i + offset, xerr=errors, fmt="o", color=color, ms=4, label=label)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_xlabel("Spearman correlation with the images' mean square error")
    left.legend(frameon=False, fontsize=8.5, loc="lower left")
    default = next(iter(found))
    for color, kind in zip(("#0072B2", "#E69F00"), ("recipes", "uniform"), strict=True):
        points = [(v[default], row["psnr_db"]) for v, row, k in table if k == kind]
        right.scatter(*zip(*points, strict=True), s=18, color=color, label=kind)
    right.set_xscale("log")
    right.set_xticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    right.minorticks_off()
    right.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    right.set_xlabel(default)
    right.set_ylabel("PSNR of images, dB")
    right.legend(frameon=False, fontsize=8.5)
    return figure
