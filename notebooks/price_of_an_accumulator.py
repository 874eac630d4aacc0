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
# # What does an accumulator bit cost?
#
# Every bit of an accumulator is a flip-flop and an adder cell beside the multipliers that feed it.
# How much of the array that is depends on how many multipliers share it. Gate equivalents per
# multiply-accumulate from synthesis, 8-bit operands:

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown

import hwmodels
import loraq_sim as lq
from loraq_sim.silicon.toggles import layer_energy

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "examples").is_dir())
arrays = {
    (products, bits): hwmodels.synthesized_array(
        lq.MacArray(acc_bits=bits, products_per_add=products), a_bits=8, w_bits=8
    )
    for products in (1, 8)
    for bits in (16, 20, 24, 32)
}
parts = ["multiplier", "tree", "accumulator"]
gates = pd.DataFrame({place: array.parts for place, array in arrays.items()}).T[parts]
gates.index = [
    f"{bits} bits, {products} product{'s' * (products > 1)} an add"
    for products, bits in gates.index
]
axes = gates.plot.barh(
    stacked=True, figsize=(7.5, 3), xlabel="gate equivalents per MAC", width=0.75,
    color=["#0072B2", "#E69F00", "#009E73"],
)  # fmt: skip
axes.invert_yaxis()
axes.spines[["top", "right"]].set_visible(False)
axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0))
plt.show()

# %% [markdown]
# One product an add: the accumulator is nearly half of the column. Eight: it is shared, and the tree
# takes its place. Now the same arrays on a trained layer. A sweep over array settings makes an array
# of every combination: emulated, priced, and compared at one throughput.

# %%
LAYER = "transformer_blocks.0.attn1.to_q"
study = lq.sweep(
    ROOT / "examples" / "tiny_pixart.pt", hw="aie2", layers=LAYER, splits=["W8A8"], tokens=16,
    datapath={
        "acc_bits": (14, 16, 17, 18, 20, 24, 32),
        "products_per_add": (1, 8),
        "overflow": ("wrap", "saturate"),
    },
)  # fmt: skip
study.verdict()

# %% [markdown]
# The error in percent by width, products an add and what an overflow does:

# %%
rows = study.df
errors = 100 * rows.pivot_table(
    "output_error", "acc_bits", ["products_per_add", "overflow"], observed=True
)
errors.style.format("{:.3g}")

# %% [markdown]
# Energy follows toggles, and operands of trained layers are mostly small. Against random ones:

# %%
layer = lq.read_layer_dump(ROOT / "examples" / "tiny_pixart.pt")[LAYER]
mac = lq.MacArray(acc_bits=24, products_per_add=8)
energy = {
    text: layer_energy(layer, lq.parse_split(text), mac, node_nm=7, cycles=2048)
    for text in ("W4A4", "W8A8")
}
ratio = {text: found.pj_per_mac / found.random_pj_per_mac for text, found in energy.items()}
ratio

# %% [markdown]
# ## Conclusion

# %%
least = rows[rows["overflow_count"] == 0].sort_values("area_ge").iloc[0]
size = {place: array.area_ge for place, array in arrays.items()}
Markdown(f"""
- From 32 to 20 bits saves **{1 - size[1, 20] / size[1, 32]:.0%} of the column** with one product an
  add and {1 - size[8, 20] / size[8, 32]:.0%} with eight. A tree of eight saves
  {1 - size[8, 32] / size[1, 32]:.0%} at 32 bits by itself.
- On this layer {least["acc_bits"]} bits hold every sum; the smallest array that does has
  {least["products_per_add"]} products an add and {least["area_ge"]:.0f} GE per MAC. One step narrower
  the error climbs at once: an accumulator is either wide enough or it is not.
- The layer's operands take {ratio["W4A4"]:.0%} of the energy of random ones in W4A4 and
  {ratio["W8A8"]:.0%} in W8A8: numbers from random operands are upper bounds for trained layers.
""")
