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
# # PixArt-Σ on AIE2, end to end
#
# From a model to a decision at full size: the layers of one transformer block of PixArt-Σ (1152
# wide, 4608 in the feed-forward network), AMD's XDNA1 NPU, and a budget. The weights are synthetic
# with the statistics of trained ones, since the real ones are 2.4 GB; with your own checkpoint,
# `loraq-sim dump capture` takes the place of the first step and everything else stays the same.
#
# Four commands: `dump synth`, `sweep`, `allocate`, `report`.

# %%
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

import loraq_sim as lq
from loraq_sim.reporting.figures import pareto_figure
from loraq_sim.reporting.labels import main_colors
from loraq_sim.results.front import best_under
from loraq_sim.results.totals import model_totals

# %matplotlib inline
SCRATCH = tempfile.TemporaryDirectory()
FOLDER = Path(SCRATCH.name)
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9}
)


def terminal(command):
    """Run a loraq-sim command as in a terminal and show what it prints."""
    words = [word.format(OUT=FOLDER) for word in shlex.split(command)[1:]]
    program = [sys.executable, "-c", "from loraq_sim.cli.start import main; main()"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    display({"text/plain": done.stdout or done.stderr}, raw=True)
    done.check_returncode()


# %% [markdown]
# ## 1. The layers
#
# Few tokens: the error of a layer is an average over tokens and settles quickly. The cost does not
# depend on them; it is that of the 1024-pixel model, with both guidance branches in one call.

# %%
terminal(
    "loraq-sim dump synth --model pixart-sigma --tokens 32 --seed 0 --quiet "
    "--layers 'transformer_blocks.14.attn1.to_q,transformer_blocks.14.attn1.to_out.0,"
    "transformer_blocks.14.attn2.to_q,transformer_blocks.14.ff.*' --out {OUT}/block.safetensors"
)
dump = lq.read_layer_dump(FOLDER / "block.safetensors")
display(dump)

# %% [markdown]
# ## 2. The sweep
#
# Main branches W4A4 and W4A8, the latter without and with branches. `@fp16r32` means the rank that
# fits the bytes of SVDQuant's 16-bit rank-32 branch.

# %%
SPLITS = ["W4A4", "W4A4+W8A8@fp16r32", "W4A8", "W4A8+W8A8@fp16r32", "W8A8"]
terminal(
    f"loraq-sim sweep --hw aie2 --layer-dump {{OUT}}/block.safetensors --split {','.join(SPLITS)} "
    "--preset fast --jobs 1 --no-solution-cache --quiet --out {OUT}/sweep"
)

# %%
with lq.ResultStore.open(FOLDER / "sweep" / "results.sqlite") as store:
    rows = store.frame()
totals = model_totals(rows)
front = lq.pareto_front(totals, minimize=["output_error", "latency_s"])
totals["pareto"] = totals.index.isin(front.index)
display(pareto_figure(totals, x=["latency_s", "weight_bytes"], model="a block of PixArt-Σ"))

# %% [markdown]
# ## 3. The allocation
#
# Uniform splits waste: some layers would take 4 bits gladly, others beg for 8. The budget is the
# latency halfway between the fastest and the slowest uniform split; the integer program picks one
# split per layer with the least error within it, and proves how far from the optimum it can be.

# %%
budget_s = (totals["latency_s"].min() + totals["latency_s"].max()) / 2
found = lq.allocate(rows, {"latency_s": budget_s})
display(found)
terminal(
    f"loraq-sim allocate {{OUT}}/sweep --budget latency_s={budget_s} --quiet --out {{OUT}}/mixed"
)
recipe = tomllib.loads((FOLDER / "mixed" / "recipe.toml").read_text(encoding="utf-8"))

# %% [markdown]
# The whole frontier of mixed models, against the uniform ones:

# %%
evenly = np.linspace(totals["latency_s"].min(), totals["latency_s"].max(), 24)
limits = np.sort([*evenly, *totals["latency_s"]])
mixed = [lq.allocate(rows, {"latency_s": limit}).totals for limit in limits]
figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
axes.step(
    [1e3 * m["latency_s"] for m in mixed],
    [100 * m["output_error"] for m in mixed],
    where="post", color="#5A5A5A", marker=".", label="one split per layer",
)  # fmt: skip
colors = main_colors(SPLITS)
for _, row in totals.iterrows():
    color = colors[row["split"].split("+")[0]]
    axes.plot(1e3 * row["latency_s"], 100 * row["output_error"], "o", color=color)
    axes.annotate(
        row["split"], (1e3 * row["latency_s"], 100 * row["output_error"]),
        xytext=(5, 4), textcoords="offset points", fontsize=8, color=color,
    )  # fmt: skip
axes.axvline(1e3 * budget_s, color="0.6", linestyle=":")
axes.set(yscale="log", xlabel="latency of the layers in a denoising step (ms)")
axes.set(ylabel="output error (%)")
axes.yaxis.set_major_formatter("{x:g}")
axes.yaxis.set_minor_formatter("{x:g}")
axes.margins(x=0.12)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. The report
#
# One page that works offline, for whoever was not in the room.

# %%
terminal("loraq-sim report {OUT}/sweep --out {OUT}/report.html --page-only --quiet")
page = FOLDER / "report.html"

# %% [markdown]
# Before the decision, one layer under the microscope: where the error of the chosen split comes
# from, each source switched off in turn.

# %%
worst = max(found.rows, key=lambda row: row["output_error"])
case = lq.explain_case(dump[worst["layer"]], worst["split"], "aie2", preset="fast", seed=0)
display(case)

# %% [markdown]
# ## Conclusion

# %%
within = best_under(totals, {"latency_s": budget_s}).iloc[0]
gain = 1 - found.totals["output_error"] / within["output_error"]
used = {split: list(found.splits.values()).count(split) for split in SPLITS}
used_text = ", ".join(f"{count} in {split}" for split, count in used.items() if count)
source = max(case.errors, key=lambda term: term["share"])
branch = totals.set_index("split")["output_error"]
display(
    Markdown(
        f"""
- Within {1e3 * budget_s:.1f} ms the best uniform split is {within["split"]} with
  {within["output_error"]:.2%} error; **one split per layer ({used_text}) reaches
  {found.totals["output_error"]:.2%}**, {gain:.0%} less, at
  {1e3 * found.totals["latency_s"]:.1f} ms and
  {found.totals["weight_bytes"] / 2**20:.1f} MiB. No choice of these splits is better by more than
  {found.gap:.2%}.
- An 8-bit branch takes W4A4 from {branch["W4A4"]:.1%} to {branch["W4A4+W8A8@fp16r32"]:.1%} and W4A8
  from {branch["W4A8"]:.1%} to {branch["W4A8+W8A8@fp16r32"]:.1%}.
- The hardest layer left is `{worst["layer"]}` in {worst["split"]}: {source["share"]:.0%} of its
  squared error is **{source["source"]}**.
- The recipe has {len(recipe["layers"])} layers and goes to `loraq-sim solve --recipe`; the report
  is one file of {page.stat().st_size / 2**20:.1f} MiB.
"""
    )
)
SCRATCH.cleanup()
