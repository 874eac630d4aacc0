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
# # A quick look at a sweep
#
# One question, one command, one picture: *which precision should the layers of this model have on
# this machine?* The model is a small trained PixArt-style transformer that ships with the project,
# the machine AMD's XDNA1 NPU. In less than a minute you will have a Pareto front, know which layers
# are hard, and have a recommendation with its price.

# %%
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib.colors import LogNorm

import loraq_sim as lq
from loraq_sim.reporting.figures import pareto_figure
from loraq_sim.reporting.tables import front_table
from loraq_sim.results.front import best_under, knee_point
from loraq_sim.results.totals import model_totals

# %matplotlib inline
HERE = Path.cwd()
EXAMPLES = next(p / "examples" for p in (HERE, *HERE.parents) if (p / "examples").is_dir())
SCRATCH = tempfile.TemporaryDirectory()
FOLDER = Path(SCRATCH.name)
plt.rcParams.update({"figure.dpi": 110, "font.size": 9})


def terminal(command):
    """Run a loraq-sim command as in a terminal and show what it prints."""
    words = [word.format(EXAMPLES=EXAMPLES, OUT=FOLDER) for word in shlex.split(command)[1:]]
    program = [sys.executable, "-c", "from loraq_sim.cli.start import main; main()"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    display({"text/plain": done.stdout or done.stderr}, raw=True)
    done.check_returncode()


# %% [markdown]
# ## Sweep
#
# Every layer is solved in every split, its integer arithmetic is emulated on the activations that
# the layer saw during denoising, and its cost is estimated. A split such as `W4A4+W8A8@fp16r4` is a
# 4-bit main branch and an 8-bit low-rank branch of the rank that fits the bytes of a 16-bit rank-4
# one. Results land in a store; the same command again would continue where it stopped.

# %%
terminal(
    "loraq-sim sweep --hw aie2 --layer-dump {EXAMPLES}/tiny_pixart.pt --preset fast --tokens 128 "
    "--jobs 1 --no-solution-cache --quiet --out {OUT}/sweep"
)

# %% [markdown]
# ## The front
#
# The store gives the rows back as a DataFrame: one per layer and split. `model_totals` adds them up
# for the whole model; `pareto_front` keeps what nothing else beats in both error and bytes. (In
# latency the splits of these tiny layers hardly differ: starting a kernel takes longer than running
# it, and a picture that hid this would mislead.)

# %%
with lq.ResultStore.open(FOLDER / "sweep" / "results.sqlite") as store:
    rows = store.frame()
totals = model_totals(rows)
GOAL = ["output_error", "weight_bytes"]
front = lq.pareto_front(totals, minimize=GOAL)
totals["pareto"] = totals.index.isin(front.index)
display(
    pareto_figure(totals, x="weight_bytes", model="tiny PixArt", layers=rows["layer"].nunique())
)

# %%
display(Markdown(front_table(front.sort_values("weight_bytes")).to_markdown()))

# %% [markdown]
# ## The layers behind it
#
# A model is as good as its worst layers allow. Across: layers; down: splits, from the largest error
# of the model to the smallest. Dark is bad.

# %%
order = totals.sort_values("output_error", ascending=False)["split"]
cells = 100 * rows.pivot(index="split", columns="layer", values="output_error")
cells = cells.loc[order, rows["layer"].unique()]
figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
image = axes.imshow(
    cells, cmap="cividis_r", norm=LogNorm(cells.min().min(), cells.max().max()), aspect="auto"
)
names = [name.removeprefix("transformer_blocks.") for name in cells.columns]
axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
axes.set_yticks(range(len(cells)), cells.index)
axes.tick_params(length=0)
figure.colorbar(image, label="output error of a layer (%)", pad=0.01)
plt.show()

# %% [markdown]
# ## Ask the store
#
# Which split is best if the weights must not take more than what W4A4 plus a fifth needs? And is
# there a bend in the front, a point after which bytes buy little?

# %%
plain = totals.set_index("split").loc["W4A4"]
limit = 1.2 * plain["weight_bytes"]
(best,) = best_under(totals, {"weight_bytes": limit}).to_dict("records")
points = np.column_stack([np.log(front["output_error"]), front["weight_bytes"]])
bend = front.iloc[knee_point(points)]
bend_text = f"its bend at **{bend['split']}**"
hardest = cells.loc[best["split"]].idxmax()
display(rows[(rows["split"] == best["split"])][["layer", "kind", "rank", "output_error", "bound"]]
        .sort_values("output_error", ascending=False).head(5).style.format(
            {"output_error": "{:.2%}"}).hide())  # fmt: skip

# %% [markdown]
# ## Conclusion

# %%
spread = totals["latency_s"].max() / totals["latency_s"].min() - 1
overflows = int(rows["overflow_count"].fillna(0).sum())
display(
    Markdown(
        f"""
- {len(rows)} cases ({rows["layer"].nunique()} layers in {rows["split"].nunique()} splits):
  {len(front)} splits are on the front of error and bytes, which has {bend_text}.
- With at most 1.2 times the bytes of W4A4 build **{best["split"]}**: it takes the output error from
  {plain["output_error"]:.1%} to **{best["output_error"]:.1%}** for
  {best["weight_bytes"] / plain["weight_bytes"] - 1:.0%} more bytes.
- Its hardest layer is `{hardest}` with {cells.loc[best["split"], hardest]:.1f} %; give that one
  more bits first (`loraq-sim allocate` does it for all layers at once).
- Latency does not decide here: all splits lie within {spread:.0%}, bound by
  {totals["bound"].mode().iloc[0]}.
- {"No accumulator overflowed" if not overflows else f"Accumulators overflowed {overflows:,} times"}
  in the emulation.
"""
    )
)
SCRATCH.cleanup()
