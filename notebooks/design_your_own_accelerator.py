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
# You have a floor plan, a power budget and an opinion. Here they become one YAML file, and the file
# becomes latency, energy and a name for the bottleneck on the layers of PixArt-Σ. We start from a
# machine that exists (AMD's XDNA1 NPU, `aie2`), give it a native 4 x 4 bit MAC mode that it lacks,
# and find out what that mode is worth before a single gate is drawn.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from ruamel.yaml import YAML

import hwmodels
from loraq_sim.reporting.labels import part_colors

SCRATCH = tempfile.TemporaryDirectory()
FOLDER = Path(SCRATCH.name)
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9}
)

# %% [markdown]
# ## The machine we start from
#
# Every number of a description has a source and a confidence. This is the short form;
# `hwmodels.describe(hw)` has all of it.

# %%
aie2 = hwmodels.load_accelerator("aie2")
display(aie2)

# %% [markdown]
# ## A new machine is a YAML file
#
# We write the description out, add a mode for 4-bit weights *and* 4-bit activations at twice the
# int8 x int4 rate, and say where the numbers come from, because the loader insists.

# %%
yaml = YAML()
yaml.default_flow_style = False
yaml.representer.ignore_aliases = lambda _: True
content = aie2.model_dump(mode="json", exclude_none=True)
content |= {"name": "my_npu", "title": "XDNA1 with a native int4 x int4 mode", "aliases": []}
content["variants"] = []
(eight_by_four,) = [mode for mode in content["modes"] if mode["name"] == "int8xint4"]
int4 = eight_by_four | {
    "name": "int4",
    "activation_bits": 4,
    "macs_per_cycle": 2 * eight_by_four["macs_per_cycle"],
    "instruction_k": 2 * eight_by_four["instruction_k"],
    "energy_pj_per_mac": eight_by_four["energy_pj_per_mac"] / 2,
    "source": "This notebook: twice the int8 x int4 rate at half its energy, a wish",
    "confidence": "estimate",
}
content["modes"] = [int4, *content["modes"]]


def written(name, description):
    """The description as a file."""
    path = FOLDER / name
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(description, file)
    return path


mine = hwmodels.load_accelerator(written("my_npu.yaml", content))
display(mine)

# %% [markdown]
# The loader reads with care. A typo, a missing source or a value of the wrong kind is an error with
# a line in it, never a silent default:

# %%
mistakes = {
    "a misspelled key": lambda d: d["units"].update(clock_mhz=1000),
    "no source": lambda d: d["dispatch"].pop("source"),
    "a negative rate": lambda d: d["memories"]["dram"].update(bandwidth_bytes_per_s=-1.0),
    "two modes of one name": lambda d: d["modes"].append(d["modes"][0]),
}
answers = []
for what, spoil in mistakes.items():
    broken = YAML(typ="safe").load((FOLDER / "my_npu.yaml").read_text(encoding="utf-8"))
    spoil(broken)
    try:
        hwmodels.load_accelerator(written("broken.yaml", broken))
        answers.append({"mistake": what, "answer": "accepted"})
    except hwmodels.AcceleratorError as error:
        answers.append({"mistake": what, "answer": str(error).replace(f"{FOLDER}/", "")})
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(answers))

# %% [markdown]
# ## The workload: one denoising step of PixArt-Σ
#
# `load_model` lists every GEMM of a step: sizes, calls, and what stays in 16 bits. Layers marked
# `split` run as 4-bit main branch plus low-rank branch.

# %%
model = hwmodels.load_model("pixart-sigma", 512)
entries = pd.DataFrame(
    [{key: getattr(e, key) for key in ("kind", "m", "n", "k", "calls", "precision")}
     | {"share of MACs": e.macs / sum(x.macs for x in model.entries)}
     for e in model.entries if e.op == "gemm"]
)  # fmt: skip
display(entries.sort_values("share of MACs", ascending=False).head(8).style.format(
    {"share of MACs": "{:.1%}"}).hide())  # fmt: skip
SPLITS = {
    "W4A4": {"main": "W4A4"},
    "W4A4+W8A8r64": {"main": "W4A4", "branch": "W8A8", "rank": 64},
    "W4A8": {"main": "W4A8"},
    "W4A8+W8A8r64": {"main": "W4A8", "branch": "W8A8", "rank": 64},
    "W8A8": {"main": "W8A8"},
}


def step_cost(hw, split):
    """Latency, energy and bound of all layers of a step that the split applies to."""
    total = {"latency_s": 0.0, "energy_j": 0.0, "dram_bytes": 0}
    busy = {}
    for entry in model.entries:
        if entry.precision != "split" or entry.op != "gemm":
            continue
        work = hwmodels.GemmWorkload(m=entry.m, n=entry.n, k=entry.k, **SPLITS[split])
        cost = hwmodels.estimate_cost(work, hw)
        for key in total:
            total[key] += entry.calls * getattr(cost, key)
        for part, seconds in cost.parts["latency_s"].items():
            busy[part] = busy.get(part, 0.0) + entry.calls * seconds
    return total | {"parts": busy}


costs = {(hw.name, split): step_cost(hw, split) for hw in (aie2, mine) for split in SPLITS}
summary = pd.DataFrame(costs).T.drop(columns="parts").astype(float)
display(
    summary.assign(
        latency_ms=1e3 * summary["latency_s"],
        energy_mj=1e3 * summary["energy_j"],
        dram_gib=summary["dram_bytes"] / 2**30,
    )[["latency_ms", "energy_mj", "dram_gib"]].style.format("{:.1f}")
)

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True, layout="constrained")
parts = list(dict.fromkeys(p for c in costs.values() for p, s in c["parts"].items() if s))
colors = part_colors(parts)
for axes, hw in zip(panels, (aie2, mine), strict=True):
    start = np.zeros(len(SPLITS))
    for part in parts:
        widths = [1e3 * costs[hw.name, split]["parts"].get(part, 0.0) for split in SPLITS]
        axes.barh(list(SPLITS), widths, left=start, color=colors[part], label=part, height=0.7)
        start += widths
    axes.invert_yaxis()
    axes.set(xlabel="latency of the layers of a step (ms)", title=hw.name)
figure.legend(*panels[0].get_legend_handles_labels(), ncols=len(parts), frameon=False,
              loc="outside lower center", fontsize=8)  # fmt: skip
plt.show()

# %% [markdown]
# A MAC mode is only as fast as what feeds it and what it has to be combined with: look at which
# colors shrink from left to right and which do not.
#
# ## Turn the knobs
#
# More columns, a faster clock or more bandwidth? `with_overrides` makes a machine per setting.
# First one knob at a time, everything else as in the file.

# %%
KNOBS = {
    "clock_hz": ("clock", "units.clock_hz"),
    "columns": ("columns", "units.columns"),
    "bandwidth": ("DRAM bandwidth", "memories.dram.bandwidth_bytes_per_s"),
    "combine": ("scaling of group sums", "vector.combine_elements_per_cycle"),
}
SPLIT = "W4A4+W8A8r64"
facts = {fact["key"]: fact["value"] for fact in hwmodels.describe(mine)}
factors = [0.5, 1, 2, 4]
curves = {}
for name, (_, key) in KNOBS.items():
    curves[name] = [
        step_cost(hwmodels.with_overrides(mine, {key: type(facts[key])(facts[key] * f)}), SPLIT)
        for f in factors
    ]
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
for (name, points), marker in zip(curves.items(), "osD^", strict=True):
    label = KNOBS[name][0]
    left.plot(factors, [1e3 * p["latency_s"] for p in points], marker=marker, label=label)
    right.plot(factors, [1e3 * p["energy_j"] for p in points], marker=marker, label=label)
for axes, what in ((left, "latency (ms)"), (right, "energy (mJ)")):
    axes.set(xscale="log", xlabel="times the value of the file", ylabel=f"{what} of {SPLIT}")
    axes.set_xticks(factors, [f"x {f:g}" for f in factors])
    axes.minorticks_off()
left.legend(frameon=False)
plt.show()

# %% [markdown]
# Then two at once. Where the lines of equal latency run parallel to an axis, that axis is money
# thrown away.

# %%
columns = [2, 4, 6, 8, 12, 16]
bandwidths = [8.5e9, 17e9, 34e9, 68e9, 136e9]
grid = np.array(
    [
        [
            step_cost(
                hwmodels.with_overrides(
                    mine,
                    {"units.columns": c, "memories.dram.bandwidth_bytes_per_s": b},
                ),
                SPLIT,
            )["latency_s"]
            for c in columns
        ]
        for b in bandwidths
    ]
)
figure, axes = plt.subplots(figsize=(6.8, 3.6), layout="constrained")
image = axes.imshow(1e3 * grid, cmap="cividis_r", norm="log", aspect="auto", origin="lower")
for (row, column), latency in np.ndenumerate(1e3 * grid):
    is_dark = latency > np.sqrt(grid.min() * grid.max()) * 1e3
    axes.text(column, row, f"{latency:.0f}", ha="center", va="center",
              color="white" if is_dark else "black")  # fmt: skip
axes.set_xticks(range(len(columns)), columns)
axes.set_yticks(range(len(bandwidths)), [f"{b / 1e9:g}" for b in bandwidths])
axes.set(xlabel="columns of the array", ylabel="DRAM bandwidth (GB/s)")
axes.set_title(f"latency of a step in {SPLIT} (ms)", loc="left", fontsize=9)
plt.show()

# %% [markdown]
# ## Conclusion

# %%
speedup = {s: costs["aie2", s]["latency_s"] / costs["my_npu", s]["latency_s"] for s in SPLITS}
saved = 1 - costs["my_npu", "W4A4"]["energy_j"] / costs["aie2", "W4A4"]["energy_j"]
base = curves["clock_hz"][factors.index(1)]["latency_s"]
gains = {KNOBS[n][0]: base / p[factors.index(2)]["latency_s"] for n, p in curves.items()}
knob = max(gains, key=gains.get)
idle = min(gains, key=gains.get)
parts_now = costs["my_npu", SPLIT]["parts"]
largest = max(parts_now, key=parts_now.get)
branch = costs["my_npu", SPLIT]["latency_s"] / costs["my_npu", "W4A4"]["latency_s"] - 1
refused = sum(answer["answer"] != "accepted" for answer in answers)
display(
    Markdown(
        f"""
- A native int4 mode of twice the rate makes W4A4 **{speedup["W4A4"]:.2f} times** as fast (not 2),
  saves {saved:.0%} of its energy, and changes W8A8 by a factor of {speedup["W8A8"]:.2f}.
- In {SPLIT} the largest part of the time on the new machine is **{largest}**
  ({parts_now[largest] / sum(parts_now.values()):.0%}); the branch itself costs {branch:.0%} over
  plain W4A4.
- Doubling the **{knob}** helps most ({gains[knob]:.2f} times as fast), doubling the {idle} least
  ({gains[idle]:.2f}). Going from {columns[0]} to {columns[-1]} columns gains a factor of
  {grid[0, 0] / grid[0, -1]:.1f} at {bandwidths[0] / 1e9:g} GB/s and of
  {grid[-1, 0] / grid[-1, -1]:.1f} at {bandwidths[-1] / 1e9:g} GB/s.
- {refused} of {len(answers)} spoiled files were refused with a reason. Save the YAML, and
  `loraq-sim sweep --hw my_npu.yaml` adds the error to the picture.
"""
    )
)
SCRATCH.cleanup()
