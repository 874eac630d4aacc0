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
dump = lq.read_layer_dump(ROOT / "examples" / "minilm.pt")
array = lq.MacArray(acc_bits=32, products_per_add=8)


def codes(layer, fmt):
    """Activation and weight codes of one layer."""
    tokens = layer.activations[:: len(layer.activations) // 48][:48]
    return lq.quantize(tokens, fmt).codes, lq.quantize(layer.weight, fmt).codes


operands = {name: codes(dump[name], "int8/row") for name in dump}
reports = {name: lq.emulate_gemm_report(a, w, array) for name, (a, w) in operands.items()}
widths = pd.DataFrame(
    {
        "by the formats": {n: int(a.shape[1] * 128 * 127).bit_length() + 1
                           for n, (a, _) in operands.items()},
        "by the weights": {name: r.guaranteed_acc_bits for name, r in reports.items()},
        "measured": {name: r.safe_acc_bits for name, r in reports.items()},
    }
)  # fmt: skip
widths.index = widths.index.str.removeprefix("encoder.layer.")
widths

# %% [markdown]
# The second column holds for *any* activations: no sum exceeds 128 times the sum of a row's weight
# magnitudes (A2Q, Colbert et al., 2023). The third is a statement about these tokens: a margin, not
# a proof. What happens below it?

# %%
hardest = max(reports, key=lambda name: reports[name].safe_acc_bits)
a, w = operands[hardest]
exact = reports[hardest].acc.astype(float)
safe = reports[hardest].safe_acc_bits
errors = pd.DataFrame(
    {
        rule: {
            bits: 100 * np.linalg.norm(lq.emulate_gemm(
                a, w, lq.MacArray(acc_bits=bits, overflow=rule, products_per_add=8)) - exact)
            / np.linalg.norm(exact)
            for bits in range(safe - 6, safe + 1)
        }
        for rule in ("wrap", "saturate")
    }
)  # fmt: skip
axes = errors[errors > 0].plot(
    logy=True, marker="o", figsize=(6.5, 3), color=["#D55E00", "#0072B2"],
    xlabel="accumulator width (bits)", ylabel="error of the sums (%)",
)  # fmt: skip
axes.yaxis.set_major_formatter("{x:g}")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# With a scale for every 64 weights the integer sum ends after 64 products, whatever K is:

# %%
groups = {
    element: max(
        lq.emulate_gemm_report(
            x[:, k : k + 64], y[:, k : k + 64], array, a_bits=int(element[3:])
        ).guaranteed_acc_bits
        for name in dump
        for x, y in [codes(dump[name], f"{element}/g64")]
        for k in range(0, x.shape[1], 64)
    )
    for element in ("int4", "int8")
}
groups

# %% [markdown]
# ## Conclusion

# %%
below = errors.loc[safe - 2]
Markdown(f"""
- W8A8 without groups needs **{widths["by the weights"].max()} bits for any input** to these layers,
  {widths["measured"].max()} for the tokens measured; the formats alone ask for
  {widths["by the formats"].max()}.
- Two bits too few ({safe - 2}) leave the sums of `{hardest}` with an error of {below["wrap"]:.2f} % by
  wrapping and of {below["saturate"]:.2f} % by saturating.
- With groups of 64, **{groups["int4"]} bits are proved enough for W4A4** and {groups["int8"]} for
  W8A8, however long K is: do not pay for 32-bit integer accumulators there; pay for the adder that
  combines the groups.
""")
