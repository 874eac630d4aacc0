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
# An accumulator bit is flip-flops and carry chain in every cell of a MAC array, so 32 bits "to be
# safe" is a bill paid thousands of times over. How many are needed? The textbook answer assumes the
# worst operands that fit the formats. Weights, however, are known before the chip runs, and
# activations leave most of their range unused most of the time. This notebook measures both gaps on
# trained layers, bit for bit, and then shows what happens below the safe width.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

import loraq_sim as lq

HERE = Path.cwd()
EXAMPLES = next(p / "examples" for p in (HERE, *HERE.parents) if (p / "examples").is_dir())
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9}
)

# %% [markdown]
# ## Real operands
#
# Eight layers of a trained sentence encoder with the activations it saw. Both sides are rounded to
# int8, one scale per weight row and per token: the plain W8A8 that every integer array runs.

# %%
dump = lq.read_layer_dump(EXAMPLES / "minilm.pt")
display(dump)
TOKENS = 48


def int8_codes(layer):
    """Activation and weight codes of one layer, (tokens, K) and (N, K)."""
    x = layer.activations[:: len(layer.activations) // TOKENS][:TOKENS]
    return lq.quantize(x, "int8/row").codes, lq.quantize(layer.weight, "int8/row").codes


operands = {name: int8_codes(dump[name]) for name in dump}

# %% [markdown]
# ## Three answers to one question
#
# **Worst case of the formats.** $K$ products of at most $2^7 \cdot 127$ in magnitude.
#
# **Guaranteed by the weights.** For known weight codes $w_n$ and *any* int8 activations no sum is
# larger than $2^7 \lVert w_n \rVert_1$: the $\ell_1$ bound that A2Q (Colbert et al., 2023) trains
# for. It holds for every prefix of the sum, in any order.
#
# **Measured.** The narrowest accumulator that held every partial sum of these operands, in the
# order in which the array adds. `emulate_gemm_report` tracks them all.

# %%
reference = lq.MacArray(acc_bits=32, overflow="wrap", products_per_add=8)
reports = {name: lq.emulate_gemm_report(a, w, reference) for name, (a, w) in operands.items()}
display(next(iter(reports.values())))


def signed_bits(largest):
    """Width of a two's complement number that holds -largest..largest."""
    return math.ceil(math.log2(largest + 1)) + 1


widths = pd.DataFrame(
    {
        "K": {name: a.shape[1] for name, (a, _) in operands.items()},
        "formats": {n: signed_bits(a.shape[1] * 128 * 127) for n, (a, _) in operands.items()},
        "guaranteed": {name: r.guaranteed_acc_bits for name, r in reports.items()},
        "measured": {name: r.safe_acc_bits for name, r in reports.items()},
    }
)
# The bound once more, by hand: the report and the formula must agree.
by_hand = {
    name: signed_bits(128 * int(np.abs(w.astype(np.int64)).sum(axis=1).max()))
    for name, (_, w) in operands.items()
}
widths["l1 bound"] = pd.Series(by_hand)
display(widths)

# %%
short = [name.removeprefix("encoder.layer.") for name in widths.index]
figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
places = np.arange(len(widths))
for shift, (column, color) in enumerate(
    [("formats", "#BDBDBD"), ("guaranteed", BLUE), ("measured", GREEN)]
):
    bars = axes.barh(
        places + 0.27 * (shift - 1), widths[column], height=0.25, color=color, label=column
    )
    axes.bar_label(bars, fontsize=7, padding=2)
axes.set_yticks(places, short)
axes.invert_yaxis()
axes.set(xlabel="accumulator width (bits)", xlim=(widths["measured"].min() - 4, 27))
axes.legend(ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0))
plt.show()

# %% [markdown]
# The weights alone save bits, for certain and for every input. The measured widths save more, but
# they are a statement about these tokens: a margin, not a proof.
#
# ## Below the safe width: wrap or saturate?
#
# Take the layer that needs most and let the accumulator shrink. Wrapping forgives every overflow on
# the way as long as the *final* sum fits, for modular sums do not care about order. Saturation
# destroys the sum the moment it clips, but when the final sum does not fit it answers with the
# nearest representable value, where wrapping answers with the opposite sign.

# %%
hardest = widths["measured"].idxmax()
a, w = operands[hardest]
exact = reports[hardest].acc.astype(np.int64)
sweep = []
for acc_bits in range(int(widths["measured"].max()) - 6, int(widths["measured"].max()) + 2):
    for overflow in ("wrap", "saturate"):
        mac = lq.MacArray(acc_bits=acc_bits, overflow=overflow, products_per_add=8)
        report = lq.emulate_gemm_report(a, w, mac)
        sweep.append(
            {
                "acc_bits": acc_bits,
                "overflow": overflow,
                "overflowing adds": report.overflow_count,
                "outputs affected": report.outputs_affected / exact.size,
                "error": np.linalg.norm(report.acc - exact) / np.linalg.norm(exact),
            }
        )
sweep = pd.DataFrame(sweep)
table = sweep.pivot(index="acc_bits", columns="overflow", values=["overflowing adds", "error"])
display(table)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
for overflow, color, marker in (("wrap", ORANGE, "o"), ("saturate", BLUE, "s")):
    own = sweep[sweep["overflow"] == overflow]
    look = {"color": color, "marker": marker, "label": overflow}
    left.plot(own["acc_bits"], 100 * own["outputs affected"].replace(0, np.nan), **look)
    right.plot(own["acc_bits"], 100 * own["error"].replace(0, np.nan), **look)
for axes, title in ((left, "outputs with an overflow (%)"), (right, "error of the sums (%)")):
    axes.axvline(widths["measured"][hardest], color="0.6", linestyle=":")
    axes.set(yscale="log", xlabel="accumulator width (bits)", ylabel=title)
right.text(widths["measured"][hardest] - 0.1, right.get_ylim()[0] * 1.3, "safe", ha="right")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What the adder tree changes
#
# Products are rarely added one by one: a dot-product unit sums $c$ of them exactly in a tree, and
# only the tree's result goes through the accumulator. Fewer adds are fewer occasions to clip. With
# saturation the answer depends on $c$, on the order, and on how many partial accumulators there
# are; with wrapping it does not, which is why wrapping arrays are easier to verify.

# %%
narrow = int(widths["measured"][hardest]) - 2
tree = []
for products in (1, 2, 4, 8, 16, 32):
    for overflow in ("wrap", "saturate"):
        mac = lq.MacArray(acc_bits=narrow, overflow=overflow, products_per_add=products)
        report = lq.emulate_gemm_report(a, w, mac)
        error = np.linalg.norm(report.acc - exact) / np.linalg.norm(exact)
        tree.append({"c": products, "overflow": overflow, "error": error})
        tree[-1] |= {"adds": report.overflow_count, "bits": report.safe_acc_bits}
tree = pd.DataFrame(tree)
display(tree.pivot(index="c", columns="overflow", values=["adds", "error", "bits"]))
same_bits = tree[tree["overflow"] == "wrap"]["error"].nunique() == 1

# %% [markdown]
# ## What group scales change
#
# With a scale for every 64 weights along $K$ the integer sum ends after 64 products; the partial
# sums are scaled and added in floating point (or shifted, with power-of-two scales). Then $K$ no
# longer matters. This is a quiet gift of the 4-bit formats with small groups: the integer
# accumulator of the main branch can be *narrow*.

# %%
GROUP = 64


def group_widths(layer, element):
    """Bits measured and guaranteed over all groups of one layer in one element type."""
    x = layer.activations[:: len(layer.activations) // TOKENS][:TOKENS]
    a = lq.quantize(x, f"{element}/g{GROUP}").codes
    w = lq.quantize(layer.weight, f"{element}/g{GROUP}").codes
    a_bits = int(element.removeprefix("int"))
    found = [
        lq.emulate_gemm_report(a[:, k : k + GROUP], w[:, k : k + GROUP], reference, a_bits=a_bits)
        for k in range(0, a.shape[1], GROUP)
    ]
    return max(r.safe_acc_bits for r in found), max(r.guaranteed_acc_bits for r in found)


grouped = pd.DataFrame(
    [
        {"layer": name, "operands": element, "measured": measured, "guaranteed": guaranteed}
        for name in widths.index
        for element in ("int4", "int8")
        for measured, guaranteed in [group_widths(dump[name], element)]
    ]
)
per_element = grouped.groupby("operands")[["measured", "guaranteed"]].max()
per_element.loc["int8, whole K"] = widths[["measured", "guaranteed"]].max()
figure, axes = plt.subplots(figsize=(6.5, 2.4), layout="constrained")
for shift, (column, color) in enumerate((("guaranteed", BLUE), ("measured", GREEN))):
    bars = axes.barh(
        np.arange(3) + 0.32 * shift - 0.16,
        per_element[column],
        height=0.3,
        color=color,
        label=column,
    )
    axes.bar_label(bars, fontsize=8, padding=2)
axes.set_yticks(range(3), ["int4, groups of 64", "int8, groups of 64", "int8, whole K"])
axes.set(xlabel="accumulator width that holds all eight layers (bits)")
axes.legend(ncols=2, frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0))
plt.show()

# %% [markdown]
# ## Conclusion

# %%
below = sweep[sweep["acc_bits"] == narrow].set_index("overflow")["error"]
better = below.idxmin()
saturating = tree[tree["overflow"] == "saturate"].set_index("c")["error"]
display(
    Markdown(
        f"""
- W8A8 without groups needs **{widths["guaranteed"].max()} bits for any input** to these layers and
  {widths["measured"].max()} for the tokens measured; the formats alone would ask for
  {widths["formats"].max()}. Knowing the weights saves up to
  {(widths["formats"] - widths["guaranteed"]).max()} bits in a layer, knowing the tokens up to
  {(widths["guaranteed"] - widths["measured"]).max()} more.
- Two bits too few ({narrow}) leave the sums with an error of {below["wrap"]:.2%} by wrapping and
  of {below["saturate"]:.2%} by saturating: here **{better}** is the lesser evil.
- An adder tree changes the saturated answer ({saturating.iloc[0]:.2%} at one product per add,
  {saturating.iloc[-1]:.2%} at {saturating.index[-1]}) and
  {"not a bit of" if same_bits else "also"} the wrapped one.
- With groups of {GROUP}, **{per_element["guaranteed"]["int4"]} bits are proved enough for W4A4**
  of these layers and {per_element["guaranteed"]["int8"]} for W8A8, however long K is. If your
  array scales groups, do not pay for 32-bit integer accumulators; pay for the adder that combines
  the groups.
"""
    )
)
