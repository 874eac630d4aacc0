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
# # Why the low-rank branch works
#
# Sixteen levels are too few for a weight matrix, and yet a 4-bit matrix plus two thin ones is
# enough. The usual explanation is that the branch "absorbs the outliers". That is half of it. This
# notebook takes one trained layer apart and looks for the other half: what the branch does to the
# *range* that the 4-bit grid must span, what it does to the *error* the grid leaves behind, and why
# a branch in 8 bits beats one in 16 at the same number of bytes.
#
# $$ W \;\approx\; Q_4(W - LR) + L R, \qquad L \in \mathbb{R}^{N \times r},\;
#    R \in \mathbb{R}^{r \times K} $$

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

import loraq_sim as lq

HERE = Path.cwd()
EXAMPLES = next(p / "examples" for p in (HERE, *HERE.parents) if (p / "examples").is_dir())
GRAY, BLUE, ORANGE, GREEN = "#8C8C8C", "#0072B2", "#D55E00", "#009E73"
GROUP = 64
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9}
)
dump = lq.read_layer_dump(EXAMPLES / "minilm.pt")
layer = dump["encoder.layer.2.attention.self.query"]
weight = layer.weight.astype(np.float32)

# %% [markdown]
# ## Three ways to spend the same bytes
#
# The same 4-bit format for the main branch and the same budget for the branch: the bytes of 16-bit
# factors of rank 32. `svdquant` takes the 32 leading singular directions in 16 bits; `loraq` stores
# its factors in 8 bits, gets about twice the rank, and optimizes the branch against what rounding
# leaves, without any data. `rtn` rounds and has no branch at all.

# %%
BUDGET = "fp16@32"
plain = lq.solve(weight, method="rtn", main=f"int4/g{GROUP}", preset="fast")
svdquant = lq.solve(
    weight, method="svdquant", main=f"int4/g{GROUP}", branch="fp16", budget=BUDGET, preset="fast"
)
loraq = lq.solve(
    weight, method="loraq", main=f"int4/g{GROUP}", branch=f"int8/g{GROUP}", budget=BUDGET, seed=0
)
solutions = {"rtn": plain, "svdquant": svdquant, "loraq": loraq}
display(loraq)

# %% [markdown]
# ## First half: the range gets flatter
#
# A group of 64 weights shares one scale, and its largest member sets it. The ratio of the largest
# to the root mean square says how much of the grid is spent on a single weight: 64 normal values
# have more than 64 uniform ones, and uniform is what an even grid would like best. Here is that
# ratio for every group, before and after the branch has taken its share, and the step of the grid
# that follows from it.


# %%
def group_ranges(matrix):
    """Largest magnitude and root mean square of every group along K."""
    groups = np.abs(matrix.reshape(matrix.shape[0], -1, GROUP))
    return groups.max(axis=2).ravel(), np.sqrt((groups**2).mean(axis=2)).ravel()


def branch_of(solution):
    """L R as stored, zero without a branch."""
    if solution.left is None:
        return np.zeros_like(weight)
    return solution.left.dequantize() @ solution.right.dequantize()


amax, rms = {}, {}
for name, solution in solutions.items():
    amax[name], rms[name] = group_ranges(weight - branch_of(solution))
looks = {"rtn": (GRAY, "W, no branch"), "svdquant": (ORANGE, "W - LR, svdquant"),
         "loraq": (BLUE, "W - LR, loraq")}  # fmt: skip
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for name, (color, label) in looks.items():
    look = {"color": color, "label": label, "histtype": "step", "linewidth": 1.6}
    left.hist(amax[name] / weight.std(), bins=60, **look)
    right.hist(amax[name] / rms[name], bins=60, **look)
left.set(xlabel="largest weight of a group / std of W", ylabel="groups")
right.set(xlabel="largest weight of a group / its root mean square")
left.legend(frameon=False)
plt.show()

# %%
diagnoses = {name: solution.diagnose(weight) for name, solution in solutions.items()}
flat = pd.DataFrame(
    {
        name: {
            "rank": solutions[name].rank,
            "size of W - LR": d.residual_norm,
            "amax / rms before": d.amax_over_rms_before,
            "amax / rms after": d.amax_over_rms_after,
            "mean step of the grid": amax[name].mean() / 7 / weight.std(),
            "weight error": solutions[name].weight_error,
        }
        for name, d in diagnoses.items()
    }
).T
display(flat.style.format("{:.3f}").format("{:.0f}", subset=["rank"]))

# %% [markdown]
# Two different things happen. Taking the leading singular directions makes what is left *smaller*,
# and leaves its *shape* alone: groups of normal values stay groups of normal values. Optimizing the
# branch against the rounding changes the shape as well. It has rank enough to pull the extremes of
# every group inward, until the remainder is about as flat as a uniform distribution, or flatter:
# weights crowd where the grid has its levels. A flat group wastes no level on a rare spike.
#
# ## Second half: the spectrum of the error
#
# Rounding noise is nearly white: its singular values fall off as slowly as those of random numbers,
# and no low rank removes much of it. A branch that is fitted to the error *after* rounding would
# therefore be wasted. The gain has to come from before: from shaping $W - LR$ so that rounding
# hurts less everywhere, which pushes the whole curve down.

# %%
spectra = {"W": (np.linalg.svd(weight, compute_uv=False), "#000000")}
for name, (color, _) in looks.items():
    error = weight - solutions[name].reconstruct()
    spectra[f"error of {name}"] = (np.linalg.svd(error, compute_uv=False), color)
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for label, (values, color) in spectra.items():
    axes.plot(np.arange(1, len(values) + 1), values, color=color, label=label)
axes.axvline(svdquant.rank, color=ORANGE, linestyle=":", linewidth=1)
axes.axvline(loraq.rank, color=BLUE, linestyle=":", linewidth=1)
axes.set(yscale="log", xlabel="index (dotted: the ranks)", ylabel="singular value")
axes.set_ylim(bottom=np.percentile(spectra["error of loraq"][0], 3))
axes.legend(frameon=False)
plt.show()
remaining = pd.DataFrame({name: d.left_to_win for name, d in diagnoses.items()})
remaining.index.name = "rank of one more branch, unquantized"
display(remaining.style.format("{:.1%}").set_caption("share of the squared error it would remove"))

# %% [markdown]
# ## How the optimization gets there
#
# Every solution carries its trace: the error of what could be stored after each round of fitting
# the branch and rounding what it leaves. Presets differ in how long they go on.

# %%
efforts = {
    preset: lq.solve(
        weight, main=f"int4/g{GROUP}", branch=f"int8/g{GROUP}", budget=BUDGET, preset=preset
    )
    for preset in ("fast", "balanced")
}
figure, axes = plt.subplots(figsize=(7.5, 3.0), layout="constrained")
for (preset, solution), color in zip(efforts.items(), (GREEN, BLUE), strict=True):
    errors = [100 * entry.weight_error for entry in solution.trace]
    axes.plot(range(len(errors)), errors, color=color, marker=".", label=f"loraq, {preset}")
for solution, color in ((plain, GRAY), (svdquant, ORANGE)):
    axes.axhline(100 * solution.weight_error, color=color, linestyle="--", label=solution.method)
axes.set(xlabel="iteration", ylabel="weight error (%)", ylim=(0, None))
axes.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
# ## Is one layer an accident?
#
# The comparison at equal bytes for four layers, with one more contestant that separates the two
# effects: `loraq` with a 16-bit branch has the optimization, but not the rank.

# %%
CONTESTANTS = {
    "svdquant, fp16 branch": {"method": "svdquant", "branch": "fp16"},
    "loraq, fp16 branch": {"method": "loraq", "branch": "fp16"},
    "loraq, int8 branch": {"method": "loraq", "branch": f"int8/g{GROUP}"},
}
names = [n for n in dump if min(dump[n].weight.shape) == 384 and "attention" in n][:3]
results = pd.DataFrame(
    [
        {
            "layer": name.removeprefix("encoder.layer."),
            "contestant": contestant,
            "error": found.weight_error,
            "rank": found.rank,
            "bits": found.bits_per_weight,
        }
        for name in names
        for contestant, options in CONTESTANTS.items()
        for found in [
            lq.solve(
                dump[name].weight, main=f"int4/g{GROUP}", budget=BUDGET, preset="fast", **options
            )
        ]
    ]
)
errors = results.pivot(index="layer", columns="contestant", values="error")[list(CONTESTANTS)]
axes = (100 * errors).plot.barh(
    color=[ORANGE, "#56B4E9", BLUE], figsize=(8, 3.2), width=0.75, xlabel="weight error (%)"
)
axes.invert_yaxis()
axes.set_ylabel("")
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Conclusion

# %%
ratio = (errors["loraq, int8 branch"] / errors["svdquant, fp16 branch"]).mean()
by_optimizing = (errors["loraq, fp16 branch"] / errors["svdquant, fp16 branch"]).mean()
by_rank = (errors["loraq, int8 branch"] / errors["loraq, fp16 branch"]).mean()
bits = results.groupby("contestant")["bits"].mean()
shape = {n: d.amax_over_rms_after / d.amax_over_rms_before - 1 for n, d in diagnoses.items()}
finer = 1 - flat["mean step of the grid"] / flat["mean step of the grid"]["rtn"]
# The largest of 64 uniform magnitudes is 64/65 of the range, their root mean square 1/sqrt(3).
uniform = GROUP / (GROUP + 1) * np.sqrt(3)
noise = diagnoses["loraq"].branch_noise
display(
    Markdown(
        f"""
- At the bytes of a 16-bit rank-32 branch, `loraq` stores rank {loraq.rank} in 8 bits and leaves
  **{ratio:.2f} of SVDQuant's weight error** in the mean of {len(errors)} layers
  ({bits["loraq, int8 branch"]:.2f} against {bits["svdquant, fp16 branch"]:.2f} bits per weight).
- Of that, optimizing at the same 16-bit rank brings a factor of **{by_optimizing:.2f}**, and the
  larger rank of 8-bit factors another **{by_rank:.2f}**.
- **Smaller and flatter:** the mean step of the 4-bit grid shrinks by {finer["loraq"]:.0%} with
  `loraq` ({finer["svdquant"]:.0%} with SVDQuant), and the ratio of the largest weight of a group to
  its root mean square changes by {shape["loraq"]:+.0%} ({shape["svdquant"]:+.0%}), to
  {diagnoses["loraq"].amax_over_rms_after:.2f}, where uniform values have {uniform:.2f}.
- Rounding the factors to 8 bits disturbs the branch by {noise:.2%} of the weight, far below the
  {loraq.weight_error:.1%} that the 4-bit grid leaves: 16-bit factors are bytes spent on the wrong
  side.
- An unquantized branch of 32 more ranks would still remove
  {diagnoses["loraq"].left_to_win[32]:.0%} of what `loraq` leaves and
  {diagnoses["svdquant"].left_to_win[32]:.0%} of what SVDQuant leaves.
"""
    )
)
