# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How far can you trust the latency?
#
# A cost model that never met a stopwatch is an opinion. This one ships with a table of GEMMs that
# other people timed on real chips, and this notebook holds the model against every row of it: how
# far it is off, on which machine, and what its worst rows have in common. Read it before you let
# two splits compete over five percent of latency.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

import hwmodels
from loraq_sim.reporting.labels import SERIES_COLORS

plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9}
)

# %% [markdown]
# ## Predict every row
#
# `hwmodels.validate` predicts the rows that were measured on one machine, with the tile that the
# row names where it names one. A signed error of +10 % says that the model is too pessimistic.

# %%
table = hwmodels.measured_rows()
machines = [hwmodels.load_accelerator(name) for name in hwmodels.list_accelerators()]
rows = pd.DataFrame([row for hw in machines for row in hwmodels.validate(hw, table)])
by_device = pd.DataFrame(hwmodels.summarize(rows.to_dict("records")))
display(by_device.style.format({"mean_error": "{:.1%}", "worst_error": "{:.1%}"}).hide())

# %%
devices = list(by_device["device"])
color = {d: SERIES_COLORS[i % len(SERIES_COLORS)] for i, d in enumerate(devices)}
marker = {d: "osD^v<>P"[i % 8] for i, d in enumerate(devices)}
figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4.2), width_ratios=(1, 1.15), layout="constrained"
)
ends = np.array([rows["measured_ms"].min() * 0.6, rows["measured_ms"].max() * 1.7])
left.fill_between(ends, ends * 0.9, ends * 1.1, color="0.9", linewidth=0, label="within 10 %")
left.plot(ends, ends, color="0.5", linewidth=0.8)
for device, own in rows.groupby("device", sort=False):
    look = {"color": color[device], "marker": marker[device], "linestyle": "none"}
    left.plot(own["measured_ms"], own["predicted_ms"], markersize=5, label=device, **look)
    right.plot(100 * own["error"], [devices.index(device)] * len(own), alpha=0.75, **look)
left.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
left.set(xlabel="measured time (ms)", ylabel="predicted time (ms)")
left.legend(frameon=False, fontsize=8)
right.axvspan(-10, 10, color="0.93", zorder=0)
right.axvline(0, color="0.5", linewidth=0.8)
right.set_yticks(range(len(devices)), devices)
right.invert_yaxis()
right.set(xlabel="signed error (%): right of zero the model is too slow")
figure.suptitle(f"{len(rows)} measured GEMMs on {len(devices)} devices")
plt.show()

# %% [markdown]
# The left picture is the one every paper prints, and it flatters every model: on logarithmic axes
# ten percent is the width of a marker. The right picture is the one to look at. What counts for a
# decision is not only the size of the errors but whether a machine's errors lean to one side:
# a common lean cancels when two splits are compared on that machine, scatter does not.

# %%
lean = rows.groupby("device", sort=False)["error"].agg(["count", "mean", "std"])
lean = lean[lean["count"] >= 3].rename(columns={"mean": "common lean", "std": "scatter"})
display(lean.style.format("{:+.1%}", subset=["common lean"]).format("{:.1%}", subset=["scatter"]))

# %% [markdown]
# ## Where it is wrong
#
# The rows with the largest errors, and the error against what paces the kernel. Whoever fits a
# model on large compute-bound GEMMs should expect it to fail on small and on memory-bound ones.

# %%
worst = rows.reindex(rows["error"].abs().sort_values(ascending=False).index).head(6)
columns = ["device", "kernel", "m", "n", "k", "main", "rank", "measured_ms", "predicted_ms"]
display(
    worst[[*columns, "error", "bound"]]
    .style.format({"measured_ms": "{:.4g}", "predicted_ms": "{:.4g}", "error": "{:+.1%}"})
    .hide()
)

# %%
rows["gmacs"] = rows["m"] * rows["n"] * rows["k"] / 1e9
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
for device, own in rows.groupby("device", sort=False):
    look = {"color": color[device], "marker": marker[device], "linestyle": "none"}
    left.plot(own["gmacs"], 100 * own["error"], label=device, alpha=0.8, **look)
bounds = list(rows["bound"].value_counts().index)
for place, bound in enumerate(bounds):
    own = rows[rows["bound"] == bound]
    spread = np.linspace(-0.22, 0.22, len(own)) if len(own) > 1 else [0.0]
    right.scatter(
        place + np.asarray(spread), 100 * own["error"], c=[color[d] for d in own["device"]], s=24
    )
for axes in (left, right):
    axes.axhline(0, color="0.5", linewidth=0.8)
left.set(xscale="log", xlabel="size (billion MACs)", ylabel="signed error (%)")
right.set_xticks(range(len(bounds)), [f"{b}\n{sum(rows['bound'] == b)} rows" for b in bounds])
right.set(xlabel="what the model says sets the pace")
plt.show()

# %% [markdown]
# ## The question behind this project: what does a low-rank branch cost?
#
# An architect rarely needs the time of one GEMM; the decision hangs on a difference, here the
# overhead of adding a branch. Differences of two predictions can be worse than the predictions, so
# they get a table of their own: branch rows against the plain GEMM of the same sizes.

# %%
overheads = pd.DataFrame(hwmodels.branch_overheads(rows.to_dict("records")))
fractions = ["measured_overhead", "predicted_overhead", "difference"]
display(overheads.style.format("{:+.1%}", subset=fractions).hide())

# %% [markdown]
# ## What the model brings of its own
#
# Some rows name their tile, others leave it to the model's search. Where the search beats the tile
# of a row by much, either the people who timed it chose that tile to show something else, or the
# model is telling fairy tales: such rows deserve a look.

# %%
searched = pd.DataFrame(
    [row for hw in machines for row in hwmodels.validate(hw, table, search_tiles=True)]
)
gain = 1 - searched["predicted_ms"] / rows["predicted_ms"]
most = rows.loc[gain.idxmax()]
display(
    Markdown(
        f"With its own tiles the model would be faster than with the measured ones in "
        f"**{(gain > 0.01).sum()} of {len(gain)} rows** by more than 1 %; the largest gain is "
        f"{gain.max():.1%}, for `{most['kernel']}` on {most['device']} with tile "
        f"{most['tile_mkn']} where the search takes {searched['tile_mkn'][gain.idxmax()]}."
    )
)

# %% [markdown]
# Half of a cost model is what it was fitted on. Each number of a machine's file carries its source
# and the confidence in it; machines nobody has timed rest on documents alone.

# %%
levels = ["measured", "vendor", "inferred", "estimate"]
confidence = pd.DataFrame(
    {
        hw.name: pd.Series([fact["confidence"] for fact in hwmodels.describe(hw)]).value_counts()
        for hw in machines
    }
).T.reindex(columns=levels)
confidence = confidence.fillna(0).astype(int)
timed = rows["accelerator"].str.split("@").str[0].value_counts()
confidence["timed rows"] = timed.reindex(confidence.index).fillna(0)
untimed = list(confidence.index[confidence["timed rows"] == 0])
shares = confidence[levels].div(confidence[levels].sum(axis=1), axis=0)
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
start = np.zeros(len(shares))
for level, shade in zip(levels, ("#009E73", "#0072B2", "#E69F00", "#BDBDBD"), strict=True):
    axes.barh(shares.index, 100 * shares[level], left=start, color=shade, label=level, height=0.7)
    start += 100 * shares[level].to_numpy()
for place, count in enumerate(confidence["timed rows"]):
    axes.text(101, place, f"{count:.0f} timed", va="center", fontsize=8)
axes.invert_yaxis()
axes.set(xlabel="numbers of the machine's file (%)", xlim=(0, 112))
axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0))
plt.show()

# %% [markdown]
# ## Conclusion

# %%
best, last = (by_device.sort_values("mean_error").iloc[i] for i in (0, -1))
first = worst.iloc[0]
margin = by_device.set_index("device")["worst_error"]
display(
    Markdown(
        f"""
- On {len(rows)} measured GEMMs of {len(devices)} devices the latency is off by
  **{rows["error"].abs().mean():.1%} in the mean**: {best["mean_error"]:.1%} on {best["device"]},
  {last["mean_error"]:.1%} on {last["device"]}, and **{first["error"]:+.1%} at worst**
  ({first["device"]}, {first["m"]} x {first["n"]} x {first["k"]}, {first["bound"]}-bound).
- {(rows["error"].abs() < 0.1).mean():.0%} of the rows are within 10 %. Two splits that differ by
  less than {margin.min():.0%} to {margin.max():.0%} (the worst row of a device) are a tie: decide
  by error or bytes.
- The overhead of a branch was timed on {len(overheads)} pairs: between
  {overheads["measured_overhead"].min():.0%} and {overheads["measured_overhead"].max():.0%} of the
  plain GEMM where the model says {overheads["predicted_overhead"].min():.0%} to
  {overheads["predicted_overhead"].max():.0%}; **single pairs are missed by up to
  {100 * overheads["difference"].abs().max():.0f} points**, the mean by
  {100 * abs(overheads["difference"].mean()):.0f}.
- Nothing was timed on {", ".join(untimed)}: take their latencies as what the documents
  promise. `loraq-sim hw validate --measured FILE.csv` takes your own rows, which is the best way
  to change that.
"""
    )
)
