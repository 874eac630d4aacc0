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
# From a model to a decision at full size: layers of a transformer block of PixArt-Σ (1152 wide, 4608
# in the feed-forward network) on AMD's XDNA1 NPU. Weights and inputs are drawn with the statistics
# of trained ones, since the real ones are 2.4 GB; with your own checkpoint its path takes the place
# of the first cell. Error settles with few tokens; cost is that of a 1024-pixel image.

# %%
import tempfile
from pathlib import Path

from IPython.display import Markdown

import loraq_sim as lq
from loraq_sim.dumps.synthesize import synthesize_layers

FOLDER = Path(tempfile.mkdtemp())
BLOCK = "transformer_blocks.14."
model = synthesize_layers("pixart-sigma", tokens=32, seed=0)
block = model.select([f"{BLOCK}attn1.to_q", f"{BLOCK}attn2.to_q", f"{BLOCK}ff.*"])
lq.write_layer_dump(FOLDER / "block.safetensors", block)
block

# %% [markdown]
# Main branches W4A4 and W4A8, without and with a low-rank branch; `@fp16r32` is the rank that fits
# the bytes of SVDQuant's 16-bit rank-32 branch.

# %%
SPLITS = ["W4A4", "W4A4+W8A8@fp16r32", "W4A8", "W4A8+W8A8@fp16r32", "W8A8"]
study = lq.sweep(FOLDER / "block.safetensors", hw="aie2", splits=SPLITS, presets="fast")
study.verdict()

# %%
study.plot_front()

# %% [markdown]
# At this size the machine is busy with the layers, not with starting them:

# %%
study.plot_roofline("W4A8+W8A8@fp16r32")

# %% [markdown]
# Uniform splits waste. Within the latency halfway between the fastest and the slowest of them, one
# split per layer, chosen by an integer program that says how far from the optimum it can be:

# %%
times = [row["latency_s"] for row in study.totals]
budget_s = (min(times) + max(times)) / 2
mixed = study.allocate(latency_s=budget_s)
mixed

# %% [markdown]
# ## Conclusion

# %%
uniform = study.best(latency_s=budget_s)
recipe = study.recipe(FOLDER / "recipe.toml", latency_s=budget_s)
error = {row["split"]: row["output_error"] for row in study.totals}
Markdown(f"""
- Within {1e3 * budget_s:.1f} ms the best uniform split is {uniform["split"]} with
  {uniform["output_error"]:.2%} error; **one split per layer reaches
  {mixed.totals["output_error"]:.2%}**, {1 - mixed.totals["output_error"] / uniform["output_error"]:.0%}
  less, at {1e3 * mixed.totals["latency_s"]:.1f} ms. No choice of these splits is better by more than
  {mixed.gap:.2%}.
- An 8-bit branch takes W4A4 from {error["W4A4"]:.1%} to {error["W4A4+W8A8@fp16r32"]:.1%}, and W4A8
  from {error["W4A8"]:.1%} to {error["W4A8+W8A8@fp16r32"]:.1%}.
- `{recipe!r}`, written as TOML, goes to `loraq-sim solve --recipe`; `study.report("r.html")` is a
  page for whoever was not in the room.
""")
