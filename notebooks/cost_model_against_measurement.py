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
# other people timed on real chips; here it predicts every row of it. Read this before you let two
# splits compete over five percent of latency.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown

import hwmodels
from loraq_sim.reporting.labels import SERIES_COLORS

table = hwmodels.measured_rows()
machines = [hwmodels.load_accelerator(name) for name in hwmodels.list_accelerators()]
rows = pd.DataFrame([row for hw in machines for row in hwmodels.validate(hw, table)])
devices = pd.DataFrame(hwmodels.summarize(rows.to_dict("records"))).set_index("device")
devices.style.format({"mean_error": "{:.1%}", "worst_error": "{:.1%}"})

# %% [markdown]
# On logarithmic axes ten percent is the width of a marker, which flatters every model. Look at the
# errors themselves, and whether those of a machine lean to one side: a common lean cancels when two
# splits are compared on that machine, scatter does not.

# %%
figure, axes = plt.subplots(figsize=(8, 0.9 + 0.32 * len(devices)), layout="constrained")
axes.axvspan(-10, 10, color="0.92", zorder=0)
axes.axvline(0, color="0.5", linewidth=0.8)
for place, device in enumerate(devices.index):
    own = 100 * rows[rows["device"] == device]["error"]
    axes.plot(own, np.full(len(own), place), "o", markersize=4, alpha=0.6,
              color=SERIES_COLORS[place % len(SERIES_COLORS)])  # fmt: skip
axes.set_yticks(range(len(devices)), devices.index)
axes.invert_yaxis()
axes.set_xlabel("error of the predicted time (%); right of zero the model is too slow")
axes.spines[["top", "right", "left"]].set_visible(False)
plt.show()

# %% [markdown]
# What do the worst have in common? Whoever fits a model on large compute-bound GEMMs should expect
# it to fail on small and on memory-bound ones.

# %%
worst = rows.reindex(rows["error"].abs().sort_values(ascending=False).index).head(6)
shown = ["device", "m", "n", "k", "main", "rank", "measured_ms", "predicted_ms", "error", "bound"]
worst[shown].style.format(
    {"measured_ms": "{:.4g}", "predicted_ms": "{:.4g}", "error": "{:+.1%}"}
).hide()

# %% [markdown]
# An architect rarely needs the time of one GEMM; the decision hangs on a difference, here what
# adding a branch costs. Branch rows against the plain GEMM of the same sizes:

# %%
overheads = pd.DataFrame(hwmodels.branch_overheads(rows.to_dict("records")))
overheads[["measured_overhead", "predicted_overhead", "difference"]].describe().loc[
    ["count", "mean", "min", "max"]
]

# %% [markdown]
# ## Conclusion

# %%
worst_rows = devices[devices["rows"] >= 10]["worst_error"]
timed = set(rows["accelerator"].str.split("@").str[0])
untimed = [hw.name for hw in machines if hw.name not in timed]
missed = 100 * overheads["difference"]
Markdown(f"""
- On {len(rows)} measured GEMMs of {len(devices)} devices the latency is off by
  **{rows["error"].abs().mean():.1%} in the mean** and by {worst.iloc[0]["error"]:+.0%} at worst;
  {(rows["error"].abs() < 0.1).mean():.0%} of the rows are within 10 %.
- Two splits that differ by less than the worst row of a device
  ({worst_rows.min():.0%} to {worst_rows.max():.0%} where ten rows or more were timed) tie: decide by error or
  bytes. Verdicts do.
- The overhead of a branch is missed by {abs(missed.mean()):.0f} points in the mean of {len(missed)}
  pairs, and by up to {missed.abs().max():.0f} in single ones.
- Nothing was timed on {", ".join(untimed)}: their latencies are what documents promise.
  `loraq-sim hw validate --measured FILE.csv` takes your own rows.
""")
