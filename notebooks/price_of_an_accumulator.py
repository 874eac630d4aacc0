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
# How much of the array that is depends on how many multipliers share it. A sweep over array settings
# makes an array of every combination: emulated on a trained layer, priced in gates from synthesis,
# and compared at one throughput.

# %%
from pathlib import Path

from IPython.display import Markdown

import loraq_sim as lq
from loraq_sim.silicon.toggles import layer_energy

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "examples").is_dir())
DUMP, LAYER = ROOT / "examples" / "tiny_pixart.pt", "transformer_blocks.0.attn1.to_q"
study = lq.sweep(
    DUMP, hw="aie2", layers=LAYER, splits=["W8A8"], tokens=16,
    datapath={
        "acc_bits": (14, 16, 17, 18, 20, 24, 32),
        "products_per_add": (1, 8),
        "overflow": ("wrap", "saturate"),
    },
)  # fmt: skip
study.verdict()

# %%
study.plot_arrays()

# %% [markdown]
# One product an add: the accumulator is nearly half of the column. Eight: it is shared, and the tree
# takes its place. The error in percent by width, products an add and what an overflow does:

# %%
rows = study.df
by_array = ["products_per_add", "overflow"]
errors = 100 * rows.pivot_table("output_error", "acc_bits", by_array, observed=True)
errors.style.format("{:.3g}")

# %% [markdown]
# Energy follows toggles, and operands of trained layers are mostly small. Against random ones:

# %%
layer, mac = lq.read_layer_dump(DUMP)[LAYER], lq.MacArray(acc_bits=24, products_per_add=8)
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
size = rows.groupby(["products_per_add", "acc_bits"])["area_ge"].min()
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
