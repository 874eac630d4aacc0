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
# # Design your own accelerator
#
# You have a floor plan, a power budget and an opinion. A machine is a handful of numbers; everything
# else is taken over from a shipped one and marked as assumed. Ours has AIE2's size and clock, four
# times its DRAM bandwidth, and a mode for 4-bit weights *and* activations that AIE2 lacks.

# %%
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown

import hwmodels
from loraq_sim.reporting.labels import part_colors

aie2 = hwmodels.load_accelerator("aie2")
mine = hwmodels.sketch(
    "my_npu", rows=4, columns=4, clock="1 GHz", modes=["int8", "int4x8", "int4"], dram="68 GB/s"
)
mine

# %% [markdown]
# `hwmodels.sketch_text(mine)` is its file, with a meaning for every key, and a typo in it is an error
# with a line. Now a denoising step of PixArt-Σ: where the time of all GEMMs goes that a split is for.

# %%
SPLITS = {
    "W4A4": {"main": "W4A4"},
    "W4A4+W8A8r64": {"main": "W4A4", "branch": "W8A8", "rank": 64},
    "W4A8+W8A8r64": {"main": "W4A8", "branch": "W8A8", "rank": 64},
    "W8A8": {"main": "W8A8"},
}
model = hwmodels.load_model("pixart-sigma", 512)
times = {
    hw.name: 1e3 * pd.DataFrame({name: model.latency_parts(hw, **split)
                                 for name, split in SPLITS.items()}).T
    for hw in (aie2, mine)
}  # fmt: skip
figure, panels = plt.subplots(1, 2, figsize=(10, 3), sharex=True, sharey=True, layout="constrained")
for axes, (name, table) in zip(panels, times.items(), strict=True):
    table.plot.barh(stacked=True, ax=axes, color=part_colors(table), width=0.7, legend=False)
    axes.set(title=name, xlabel="latency of a step (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(right=1.05 * max(table.sum(axis=1).max() for table in times.values()))
axes.invert_yaxis()
figure.legend(*axes.get_legend_handles_labels(), ncols=8, frameon=False, fontsize=8,
              loc="outside lower center")  # fmt: skip
plt.show()

# %% [markdown]
# More columns, a faster clock or more bandwidth? One knob at a time, everything else as it is:

# %%
KNOBS = {
    "clock": "units.clock_hz",
    "columns": "units.columns",
    "DRAM bandwidth": "memories.dram.bandwidth_bytes_per_s",
    "scaling of group sums": "vector.combine_elements_per_cycle",
}
SPLIT = "W4A4+W8A8r64"
facts = {fact["key"]: fact["value"] for fact in hwmodels.describe(mine)}
knobs = pd.DataFrame(index=pd.Index([0.5, 1, 2, 4], name="times the value"))
for name, key in KNOBS.items():
    changed = [
        hwmodels.with_overrides(mine, {key: type(facts[key])(facts[key] * f)}) for f in knobs.index
    ]
    knobs[name] = [1e3 * sum(model.latency_parts(hw, **SPLITS[SPLIT]).values()) for hw in changed]
knobs.round(1)

# %% [markdown]
# ## Conclusion

# %%
total = {name: table.sum(axis=1) for name, table in times.items()}
gain = knobs.loc[1] / knobs.loc[2]
largest = times["my_npu"].loc[SPLIT].idxmax()
assumed = len(hwmodels.assumed_keys(mine))
Markdown(f"""
- Against AIE2 the sketch is **{total["aie2"]["W4A4"] / total["my_npu"]["W4A4"]:.2f} times** as fast in
  W4A4 and {total["aie2"]["W8A8"] / total["my_npu"]["W8A8"]:.2f} times in W8A8.
- In {SPLIT} the largest part of its time is **{largest}**; the branch costs
  {total["my_npu"][SPLIT] / total["my_npu"]["W4A4"] - 1:.0%} over plain W4A4.
- Doubling the **{gain.idxmax()}** helps most ({gain.max():.2f} times as fast), doubling the
  {gain.idxmin()} least ({gain.min():.2f}).
- {assumed} of its numbers are assumed; a verdict on it names those that its latency rests on. Save
  `hwmodels.sketch_text(mine)` as `my_npu.yaml`, and `lq.sweep(..., hw="my_npu.yaml")` adds the
  error to the picture.
""")
