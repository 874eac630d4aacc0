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
# How much of the array that is depends on how many multipliers share it. This notebook prices
# columns from synthesized gates, runs the same arrays on a trained layer, bit for bit, and asks
# what the layer's own operands cost in them.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display

import hwmodels
import loraq_sim as lq
from loraq_sim.silicon.toggles import layer_energy

HERE = Path.cwd()
EXAMPLES = next(p / "examples" for p in (HERE, *HERE.parents) if (p / "examples").is_dir())
COLORS = {"multiplier": "#0072B2", "tree": "#E69F00", "accumulator": "#009E73"}
COLORS |= {"saturation": "#CC79A7"}
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9}
)

# %% [markdown]
# ## Gates of a column
#
# Gate equivalents per multiply-accumulate, 8-bit operands, by part. One product an add: the
# accumulator is nearly half of the column. Eight: it is shared, and the tree takes its place.

# %%
gates = []
for products in (1, 8):
    for bits in (16, 20, 24, 32):
        mac = lq.MacArray(acc_bits=bits, products_per_add=products)
        array = hwmodels.synthesized_array(mac, a_bits=8, w_bits=8, node_nm=7)
        row = {"products": products, "bits": bits, **{p: array.parts[p] for p in COLORS}}
        gates.append(row | {"GE": array.area_ge, "depth": array.depth})
gates = pd.DataFrame(gates)
display(gates.round(0))

figure, axes = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
left = 0
for part, color in COLORS.items():
    axes.barh(range(len(gates)), gates[part], left=left, color=color, label=part, height=0.7)
    left = left + gates[part]
axes.set_yticks(range(len(gates)), [f"{r.products} x, {r.bits} bits" for r in gates.itertuples()])
axes.invert_yaxis()
axes.set(xlabel="gate equivalents per MAC")
axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0))
plt.show()

# %% [markdown]
# ## The same arrays on a trained layer
#
# A sweep with several values of array settings makes an array of every combination: emulated,
# priced and named by itself, all of one throughput.

# %%
study = lq.sweep(
    EXAMPLES / "tiny_pixart.pt",
    hw="aie2",
    layers="transformer_blocks.0.attn1.to_q",
    splits=["W8A8"],
    tokens=16,
    jobs=0,
    datapath={
        "acc_bits": (14, 16, 17, 18, 20, 24, 32),
        "products_per_add": (1, 8),
        "overflow": ("wrap", "saturate"),
    },
)
rows = study.df
figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
for (products, rule), own in rows.groupby(["products_per_add", "overflow"]):
    own = own.sort_values("acc_bits")
    style = {"linestyle": "-" if rule == "wrap" else ":", "color": "#0072B2"}
    style["color"] = "#0072B2" if products == 1 else "#D55E00"
    axes.semilogy(own["area_ge"], 100 * own["output_error"], marker="o", ms=4, **style)
    axes.annotate(
        f"{products} x, {rule}", (own["area_ge"].iloc[0], 100 * own["output_error"].iloc[0])
    )
axes.set(xlabel="gate equivalents per MAC", ylabel="output error (%)")
plt.show()
verdict = study.verdict()
(arrays,) = [note for note in verdict.notes if note.startswith("Arrays of")]
display(Markdown(f"> {arrays}"))

# %% [markdown]
# ## What the operands cost
#
# Energy follows toggles. Weights and activations of a trained layer are mostly small, and many are
# zero, so they toggle less than random codes do.

# %%
layer = lq.read_layer_dump(EXAMPLES / "tiny_pixart.pt")["transformer_blocks.0.attn1.to_q"]
mac = lq.MacArray(acc_bits=24, products_per_add=8)
energy = []
for text in ("W4A4", "W8A8"):
    found = layer_energy(layer, lq.parse_split(text), mac, node_nm=7, cycles=2048)
    energy.append(
        {
            "split": text,
            "pJ per MAC": found.pj_per_mac,
            "random operands": found.random_pj_per_mac,
            "ratio": found.pj_per_mac / found.random_pj_per_mac,
            "glitches, at most": found.glitch_factor,
        }
    )
energy = pd.DataFrame(energy).set_index("split")
display(energy.round(3))

# %% [markdown]
# ## Conclusion

# %%
one, eight = (gates[gates["products"] == count].set_index("bits")["GE"] for count in (1, 8))
free = rows[rows["overflow_count"] == 0]
least = free.loc[free["area_ge"].idxmin()]
display(
    Markdown(
        f"""
- From 32 to 20 bits saves **{1 - one[20] / one[32]:.0%} of the column** with one product an add and
  {1 - eight[20] / eight[32]:.0%} with eight. A tree of eight saves {1 - eight[32] / one[32]:.0%}
  at 32 bits by itself.
- On this layer {int(least["acc_bits"])} bits hold every sum; the smallest array that does has
  {int(least["products_per_add"])} products an add and {least["area_ge"]:.0f} GE per MAC. One step
  narrower the error climbs at once: an accumulator is either wide enough or it is not.
- The layer's operands take {energy["ratio"]["W4A4"]:.0%} of the energy of random ones in W4A4 and
  {energy["ratio"]["W8A8"]:.0%} in W8A8: numbers from random operands are upper bounds for trained
  layers.
"""
    )
)
