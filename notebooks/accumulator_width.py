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
# # Which accumulator width does my array need?
#
# An accumulator bit is flip-flops and carry chain in every cell of an array, so 32 bits "to be safe"
# is a bill paid thousands of times. The formats alone ask for the worst case. Weights, however, are
# known before the chip runs, and activations leave most of their range unused. Eight layers of a
# trained sentence encoder, W8A8 with one scale a row, bit for bit:

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown

import loraq_sim as lq

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "examples").is_dir())
MINILM = ROOT / "examples" / "minilm.pt"
BY_ROW = {"splits": ["W8A8"], "group": 2048, "tokens": 48, "jobs": 0, "progress": False}
rows = lq.sweep(MINILM, "aie2", **BY_ROW).df.set_index("layer")
widths = pd.DataFrame({
    "by the formats": np.log2(128 * 127 * rows["k"]).astype(int) + 2,
    "by the weights": rows["guaranteed_acc_bits"],
    "measured": rows["safe_acc_bits"],
})  # fmt: skip
widths.rename(lambda name: name.removeprefix("encoder.layer."))

# %% [markdown]
# The second column holds for *any* activations: no sum exceeds 128 times the sum of a row's weight
# magnitudes (A2Q, Colbert et al., 2023). The third is a statement about these tokens: a margin, not
# a proof. What happens below it, to the outputs of the layer that needs most?

# %%
hardest, safe = widths["measured"].idxmax(), widths["measured"].max()
narrow = {"acc_bits": tuple(range(safe - 6, safe + 1)), "overflow": ("wrap", "saturate")}
study = lq.sweep(MINILM, "aie2", layers=hardest, datapath=narrow, **BY_ROW)
errors = 100 * study.df.pivot_table("output_error", "acc_bits", "overflow", observed=True)
axes = errors.plot(
    logy=True, marker="o", figsize=(6.5, 3), color=["#D55E00", "#0072B2"],
    xlabel="accumulator width (bits)", ylabel="output error (%)",
)  # fmt: skip
axes.yaxis.set_major_formatter("{x:g}")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Where the lines meet, what is left is the rounding to 8 bits. With a scale for every 64 weights the
# integer sum ends after 64 products, whatever K is:

# %%
grouped = lq.sweep(
    MINILM, "aie2", splits=["W4A4", "W8A8"], tokens=8, jobs=0, progress=False
).df.groupby("split", observed=True)["guaranteed_acc_bits"].max()  # fmt: skip
grouped

# %% [markdown]
# ## Conclusion

# %%
below = errors.loc[safe - 2]
Markdown(f"""
- W8A8 without groups needs **{widths["by the weights"].max()} bits for any input** to these layers,
  {safe} for the tokens measured; the formats alone ask for {widths["by the formats"].max()}.
- Two bits too few ({safe - 2}) take the output error of `{hardest}` from {errors.loc[safe, "wrap"]:.1f} %
  to {below["wrap"]:.0f} % by wrapping and to {below["saturate"]:.0f} % by saturating.
- With groups of 64, **{grouped["W4A4"]} bits are proved enough for W4A4** and {grouped["W8A8"]} for
  W8A8, however long K is: do not pay for 32-bit integer accumulators there; pay for the adder that
  combines the groups.
""")
