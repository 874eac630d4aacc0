"""What each part of a W4A4 layer with a residual input is worth, one change at a time.

    python benchmarks/residual_ablations.py            # prints, writes residual_ablations.md
    python benchmarks/residual_ablations.py formats    # this block anew

Layers: two of examples/minilm.pt at the bytes of a 16-bit rank-32 branch, three of
examples/tiny_pixart.pt at those of rank 4. Every other activation row calibrates, the others
evaluate, on the data path of `aie2`. Preset fast: what is compared is the same everywhere. Cells
are geometric means in percent.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np

import loraq_sim as lq
from loraq_sim.evaluate import evaluate_case, solve_case
from loraq_sim.settings import CaseSettings
from loraq_sim.solvers.problem import SharedStages
from loraq_sim.split import rank_for_budget
from loraq_sim.time_steps import evaluate_steps

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "residual_ablations.md"
NAMES = {
    "minilm": ("encoder.layer.2.attention.self.key", "encoder.layer.2.output.dense"),
    "tiny_pixart": (
        *("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"),
        "transformer_blocks.3.ff.net.0.proj",
    ),
}
BUDGETS = {"minilm": "fp16r32", "tiny_pixart": "fp16r4"}
AUTO = {"condition": "auto"}
TURNED = {"rotate": "hadamard"}

# Block: rows of a label, a split ({b} the budget) and settings.
BLOCKS = {
    "gains": [
        ("loraq, symmetric inputs", "W4A4+W8A8@{b}", {}),
        ("+ signed scales", "W4A4s+W8A8@{b}", {}),
        ("+ zero points", "W4A4u+W8A8@{b}", {}),
        ("+ rotation", "W4A4+W8A8@{b}", TURNED),
        ("+ smoothing (rms)", "W4A4+W8A8@{b}", {"condition": "rms"}),
        ("+ residual input", "W4A4~W8A8@{b}", {}),
        ("+ finish with data", "W4A4+W8A8@{b}", {"finish": "data"}),
        ("rotation, smoothing chosen", "W4A4+W8A8@{b}", AUTO),
        ("the same, grid chosen", "W4A4a+W8A8@{b}", AUTO),
        ("the same, residual input", "W4A4a~W8A8@{b}", AUTO),
        ("the same, finish: all", "W4A4a~W8A8@{b}", AUTO | {"finish": "data"}),
        ("all but the residual input", "W4A4a+W8A8@{b}", AUTO | {"finish": "data"}),
        ("all but rotation and smoothing", "W4A4u~W8A8@{b}", {"finish": "data"}),
        ("all but the grid", "W4A4~W8A8@{b}", AUTO | {"finish": "data"}),
    ],
    "branch": [
        (f"{joint} {branch}", f"W4A4u{joint}{branch}@{{b}}", AUTO)
        for branch in ("W16A16", "W8A8", "W6A6", "W4A8")
        for joint in "+~"
    ],
    "P_f bits": [
        (f"P_f int{bits}", "W4A4u~W8A8@{b}", AUTO | {"datapath": {"feedback_p_format": p}})
        for bits, p in ((8, "branch"), (6, "int6"), (4, "int4"), (3, "int3"))
    ],
    "formats": [
        (f"{family} {joint}", f"W4A4{joint}W8A8@{{b}}", AUTO | {"family": family})
        for family in ("int", "mxint", "mxfp", "nvfp")
        for joint in "+~"
    ],
}
SHARES = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
TOKENS = (16, 32, 64, 128, 256)
STEPS = ("all", "first", "last")


def layers():
    """Family, layer."""
    for family, names in NAMES.items():
        dump = lq.read_layer_dump(str(ROOT / "examples" / f"{family}.pt"))
        for name in names:
            yield family, dump[name]


def error(layer, split, options, shared, tokens=None):
    """Relative output error on the rows that did not calibrate."""
    seen, unseen = (layer.activations[i::2] for i in (0, 1))
    if tokens is not None:
        seen = seen[np.arange(tokens) * len(seen) // tokens]
    settings = CaseSettings.of(split, preset="fast", **options)
    known = dataclasses.replace(layer, activations=seen)
    solution = solve_case(known, settings, shared=shared)
    rest = dataclasses.replace(layer, activations=unseen)
    return evaluate_case(rest, settings, "aie2", solution=solution)["output_error"], solution


def table(title, rows):
    """Rows of (label, {family: errors}) as lines; geometric means."""
    families = list(dict.fromkeys(f for _, cells in rows for f in cells))
    lines = [f"## {title}", "", "| | " + " | ".join(families) + " |"]
    lines.append("|---" * (len(families) + 1) + "|")
    for label, cells in rows:
        means = [100 * np.exp(np.mean(np.log(cells[f]))) if f in cells else None for f in families]
        shown = " | ".join("" if mean is None else f"{mean:.2f}" for mean in means)
        lines.append(f"| {label} | {shown} |")
        print(title, label, shown, flush=True)
    return lines


def block(rows):
    """Errors of labeled splits by family."""
    found = [(label, {}) for label, *_ in rows]
    for family, layer in layers():
        shared = SharedStages()
        for (_, split, options), (_, cells) in zip(rows, found, strict=True):
            text = split.format(b=BUDGETS[family])
            cells.setdefault(family, []).append(error(layer, text, options, shared)[0])
    return found


def part(share, rank):
    """Components of a rank."""
    return round(share * rank)


def by_share():
    """Errors by the share of the rank that a residual input takes, rank as of equal bytes."""
    found = [(f"{share:.3g} of the rank", {}) for share in SHARES]
    for family, layer in layers():
        shared = SharedStages()
        budget = BUDGETS[family].replace("r", "@")
        for share, (_, cells) in zip(SHARES, found, strict=True):
            rank = rank_for_budget(
                layer.n, layer.k, lq.parse_format("int8/g64"), budget, partial(part, share)
            )
            spent = part(share, rank)
            split = f"W4A4u~W8A8r{rank}f{spent}" if spent else f"W4A4u+W8A8r{rank}"
            cells.setdefault(family, []).append(error(layer, split, TURNED, shared)[0])
    return found


def by_tokens():
    """Errors by the number of calibration rows."""
    found = [(f"{count} rows", {}) for count in TOKENS]
    for family, layer in layers():
        shared = SharedStages()
        for count, (_, cells) in zip(TOKENS, found, strict=True):
            # Half of the rows evaluate.
            if count > len(layer.activations) // 2:
                continue
            text = f"W4A4u~W8A8@{BUDGETS[family]}"
            cells.setdefault(family, []).append(error(layer, text, AUTO, shared, count)[0])
    return found


def by_steps():
    """Errors over all time steps by the steps that calibrate, with and without."""
    dump = lq.read_layer_dump(str(ROOT / "examples" / "tiny_pixart.pt"))
    found = []
    for joint in "+~":
        for steps in STEPS:
            errors = [
                evaluate_steps(
                    dump, name, f"W4A4u{joint}W8A8@fp16r4", "aie2", calibrate_on=steps,
                    preset="fast", condition="auto",
                ).case["output_error"]
                for name in NAMES["tiny_pixart"]
            ]  # fmt: skip
            found.append((f"{joint}, calibrated on {steps} steps", {"tiny_pixart": errors}))
    return found


MADE = {name: lambda rows=rows: block(rows) for name, rows in BLOCKS.items()}
MADE |= {"share": by_share, "calibration": by_tokens, "time steps": by_steps}
TITLES = {
    "gains": "Each gain alone, together, and left out (W8A8 branch)",
    "branch": "Branches of equal bytes, zero points, without (+) and with (~)",
    "P_f bits": "Bits of P_f",
    "formats": "Element families, without (+) and with (~)",
    "share": "Share of the rank, Hadamard rotation, zero points",
    "calibration": "Rows that calibrate (half of the dump's rows evaluate)",
    "time steps": "Time steps that calibrate; errors on all steps",
}


def main():
    """Measure the blocks asked for, keep the others as they stand."""
    if unknown := [name for name in sys.argv[1:] if name not in MADE]:
        sys.exit(f"unknown block {unknown[0]!r}; there are {', '.join(MADE)}")
    known = TABLE.read_text().split("\n## ")[1:] if TABLE.exists() else []
    old = {text.split("\n", 1)[0]: "## " + text.rstrip("\n") for text in known}
    parts = []
    for name, make in MADE.items():
        title = TITLES[name]
        if sys.argv[1:] and name not in sys.argv[1:] and title in old:
            parts.append(old[title])
        elif not sys.argv[1:] or name in sys.argv[1:]:
            parts.append("\n".join(table(title, make())))
    head = (
        "# Ablations of the residual input\n\n`python benchmarks/residual_ablations.py`: output "
        "error in percent, W4A4, on rows that did not calibrate, through the emulated data path of "
        "`aie2`, preset fast; geometric means over two layers of MiniLM (bytes of a 16-bit rank-32 "
        "branch) and three of tiny_pixart (rank 4).\n"
    )
    TABLE.write_text(head + "\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
