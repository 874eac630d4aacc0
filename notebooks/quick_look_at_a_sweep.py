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
# *Which precision should the layers of this model have on this machine?* The model is a small
# trained PixArt-style transformer that ships with the project, the machine AMD's XDNA1 NPU.

# %%
from pathlib import Path

from IPython.display import Markdown

import loraq_sim as lq

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "examples").is_dir())
study = lq.sweep(ROOT / "examples" / "tiny_pixart.pt", hw="aie2", presets="fast", tokens=128)
study

# %% [markdown]
# The default splits ask LoRaQ's question: what do branches below 16 bits buy at the bytes of a
# 16-bit one? Down and left is better; nothing else beats what the line joins.

# %%
study.plot_front()

# %% [markdown]
# The model is as good as its worst layers. Across: layers; down: splits. Dark is bad.

# %%
study.plot_layers()

# %% [markdown]
# And within a budget of memory, a fifth more than W4A4 takes?

# %%
plain = next(row for row in study.totals if row["split"] == "W4A4")
best = study.best(weight_bytes=1.2 * plain["weight_bytes"])
best

# %% [markdown]
# Which of its layers is hardest, and where does that layer's error come from?

# %%
layers = study.df[study.df["split"] == best["split"]].set_index("layer")["output_error"]
case = study.explain(layers.idxmax(), best["split"])
case

# %% [markdown]
# ## Conclusion

# %%
worst = max(case.errors, key=lambda term: term["share"])
times = [row["latency_s"] for row in study.totals]
Markdown(f"""
- {study.verdict().headline}: {len(study)} cases, {len(study.front())} splits on the front.
- With at most 1.2 times the bytes of W4A4 it is **{best["split"]}**, which takes the output error
  from {plain["output_error"]:.1%} to **{best["output_error"]:.1%}** for
  {best["weight_bytes"] / plain["weight_bytes"] - 1:.0%} more bytes.
- Its hardest layer is `{layers.idxmax()}` with {layers.max():.1%}: {worst["share"]:.0%} of the squared
  error is `{worst["source"]}`, {worst["meaning"]}.
- Latency does not decide: all splits lie within {max(times) / min(times) - 1:.0%}, since starting a
  kernel takes longer than running it on layers as small as these.
""")
