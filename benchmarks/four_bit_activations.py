"""Output error of W4A4 and W4A8 layers on unseen rows, emulated, ours and rebuilt methods.

    python benchmarks/four_bit_activations.py    # prints tables, writes four_bit_activations.md
    python benchmarks/four_bit_activations.py "auto, ~" "u auto, ~"    # these columns anew
    python benchmarks/four_bit_activations.py terrain loraq    # a column, in layers of one model

Every other activation row of a layer calibrates, the others evaluate, on the data path of `aie2`.
All branches have the bytes of a 16-bit one (rank 32; 4 for tiny_pixart, which is 128 wide); GPTQ
and round to nearest have none. Layers: examples/minilm.pt, examples/tiny_pixart.pt, one synthetic
of solver_quality.py, and a diffusion U-Net where runs/terrain.npz lies (terrain_layers.py; rank 4:
it is 64 to 128 wide). Layers that are not here keep what the table says of them.

What was rebuilt, and what not: `svdquant_published` is SVDQuant with its whole grid of smoothing
and 100 iterations. H-SVDQuant is SVDQuant of the weight and inputs turned by a block Hadamard
matrix. QuaRot-like is GPTQ of them, without QuaRot's fusing of rotations into other layers.
DiRotQ-like keeps the leading principal directions of the inputs in 16 bits and rounds the weight
by GPTQ (method `quad` without a rotation); DiRotQ turns the whole input into their basis, here they
are taken out of it. Its choice of ranks, its handling of time steps and its kernels are not
rebuilt. QUAD and ResQ are the methods of `loraq_sim.solvers.residual`, LRC that of
`loraq_sim.solvers.gptq`, which say what is left out; all three on rotated inputs. Columns that
begin with u give a baseline the grid with zero points, though it was published without, so that
what is left of a gain is not the grid's.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import dataclasses
import sys
from pathlib import Path

import numpy as np
import solver_quality

import loraq_sim as lq
from loraq_sim.evaluate import evaluate_case, solve_case
from loraq_sim.settings import CaseSettings
from loraq_sim.solvers.problem import SharedStages

ROOT = Path(__file__).parent.parent
TERRAIN = ROOT / "runs" / "terrain.npz"
TABLE = Path(__file__).parent / "four_bit_activations.md"
FOUR_BIT_P = {"feedback_p_format": "int4"}
# Column: split without its size, and settings. What is data-free sees no activations.
METHODS = {
    "rtn": ("W4A4", {"method": "rtn"}),
    "QuaRot-like": ("W4A4", {"method": "gptq", "rotate": "hadamard"}),
    "svdquant": ("W4A4+W16A16", {"method": "svdquant"}),
    "published": ("W4A4+W16A16", {"method": "svdquant_published"}),
    "H-SVDQuant": ("W4A4+W16A16", {"method": "svdquant", "rotate": "hadamard"}),
    "DiRotQ-like": ("W4A4~W16A16", {"method": "quad"}),
    "LRC": ("W4A4+W16A16", {"method": "lrc", "rotate": "hadamard"}),
    "QUAD": ("W4A4~W16A16", {"method": "quad", "rotate": "hadamard"}),
    "ResQ": ("W4A4~W8A8", {"method": "resq", "rotate": "hadamard"}),
    "u published": ("W4A4u+W16A16", {"method": "svdquant_published"}),
    "u LRC": ("W4A4u+W16A16", {"method": "lrc", "rotate": "hadamard"}),
    "u QUAD": ("W4A4u~W16A16", {"method": "quad", "rotate": "hadamard"}),
    "u ResQ": ("W4A4u~W8A8", {"method": "resq", "rotate": "hadamard"}),
    "loraq": ("W4A4+W8A8", {}),
    "data-free": ("W4A4+W8A8", {"condition": "auto"}),
    "auto": ("W4A4+W8A8", {"condition": "auto"}),
    "auto, finish": ("W4A4+W8A8", {"condition": "auto", "finish": "data"}),
    "auto, ~": ("W4A4~W8A8", {"condition": "auto"}),
    "u data-free": ("W4A4u+W8A8", {"condition": "auto"}),
    "u data-free, W4A8": ("W4A4u+W4A8", {"condition": "auto"}),
    "u auto": ("W4A4u+W8A8", {"condition": "auto"}),
    "u auto, finish": ("W4A4u+W8A8", {"condition": "auto", "finish": "data"}),
    "u auto, W16A16": ("W4A4u+W16A16", {"condition": "auto"}),
    "u auto, W6A6": ("W4A4u+W6A6", {"condition": "auto"}),
    "u auto, W4A8": ("W4A4u+W4A8", {"condition": "auto"}),
    "u auto, ~": ("W4A4u~W8A8", {"condition": "auto"}),
    "u auto, ~, seed 1": ("W4A4u~W8A8", {"condition": "auto", "seed": 1}),
    "u auto, ~, finish": ("W4A4u~W8A8", {"condition": "auto", "finish": "data"}),
    "a auto, ~, finish": ("W4A4a~W8A8", {"condition": "auto", "finish": "data"}),
    "u auto, ~P4": ("W4A4u~W8A8", {"condition": "auto", "datapath": FOUR_BIT_P}),
    "u auto, ~W6A6": ("W4A4u~W6A6", {"condition": "auto"}),
    "u auto, ~W4A8": ("W4A4u~W4A8", {"condition": "auto"}),
    "u auto, ~W4A8, finish": ("W4A4u~W4A8", {"condition": "auto", "finish": "data"}),
    "u auto, W4A8, finish": ("W4A4u+W4A8", {"condition": "auto", "finish": "data"}),
    "A8 published": ("W4A8+W16A16", {"method": "svdquant_published"}),
    "A8 loraq": ("W4A8+W8A8", {}),
    "A8 loraq, W16A16": ("W4A8+W16A16", {}),
    "A8 finish": ("W4A8+W8A8", {"finish": "data"}),
    "A8 auto, finish": ("W4A8+W8A8", {"condition": "auto", "finish": "data"}),
}


def short_name(name):
    """Of a layer, as the table has it."""
    return name.replace("encoder.layer.", "").replace("transformer_blocks.", "")


def written():
    """Errors by layer and column as the table holds them."""
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLE.read_text().splitlines()
        if line.startswith("| ")
    ]
    return {
        row[0]: {c: float(v) / 100 for c, v in zip(table[0][1:], row[1:], strict=True) if v}
        for row in table[1:]
    }


FAMILIES = ("minilm", "tiny_pixart", "synthetic", "terrain")


def layers():
    """Layer to calibrate on, the same with other rows, and the rank of the 16-bit branch."""
    for file, rank, every in (("minilm", 32, 2), ("tiny_pixart", 4, 3)):
        dump = lq.read_layer_dump(str(ROOT / "examples" / f"{file}.pt"))
        for name in list(dump)[::every]:
            yield file, dump[name], rank
    # The grid of the published method takes minutes on larger ones.
    weight, x = solver_quality.synthetic("self_v", tokens=512)
    yield "synthetic", lq.Layer(name="self_v", weight=weight, activations=x), 32
    if TERRAIN.exists():
        dump = lq.read_layer_dump(str(TERRAIN))
        for name in dump:
            # Patches of 3 x 3 neighbors, or single pixels.
            kind = "resblock_conv" if dump[name].k % 9 == 0 else "conv1x1"
            yield "terrain", dataclasses.replace(dump[name], kind=kind), 4


def measured(layer, rank, columns):
    """Relative output errors on the rows left out, by column."""
    seen, unseen = (dataclasses.replace(layer, activations=layer.activations[i::2]) for i in (0, 1))
    # Columns of one layer have stages of the solver in common.
    errors, shared = {}, SharedStages()
    for column in columns:
        split, options = METHODS[column]
        text = split
        if "W16" in split:
            # All of the rank carries directions of the inputs where the split has a residual input.
            text += f"r{rank}" + (f"f{rank}" if "~" in split else "")
        elif "+" in split or "~" in split:
            text += f"@fp16r{rank}"
        settings = CaseSettings.of(text, **options)
        known = dataclasses.replace(seen, activations=None) if "data-free" in column else seen
        solution = solve_case(known, settings, shared=shared)
        row = evaluate_case(unseen, settings, "aie2", solution=solution)
        errors[column] = row["output_error"]
    return errors


def mean(rows, column):
    """Geometric mean in percent, as text; nothing where a row lacks the column."""
    if not all(column in row for row in rows):
        return ""
    return f"{100 * np.exp(np.mean([np.log(row[column]) for row in rows])):.2f}"


def main():
    """Measure, print and write the table; what is not measured anew stays as it is there."""
    families = [word for word in sys.argv[1:] if word in FAMILIES] or FAMILIES
    chosen = [word for word in sys.argv[1:] if word not in FAMILIES]
    if unknown := [column for column in chosen if column not in METHODS]:
        sys.exit(f"unknown column {unknown[0]!r}; there are {', '.join(METHODS)}")
    rows = {tuple(name.split(" ", 1)): row for name, row in written().items() if "**" not in name}
    for family, layer, rank in layers():
        if family not in families:
            continue
        found = measured(layer, rank, chosen or METHODS)
        row = rows[family, short_name(layer.name)] = rows.get((family, short_name(layer.name)), {})
        row |= found
        print(family, layer.name, *(f"{k}={100 * v:.2f}" for k, v in found.items()), flush=True)
    write(rows)


def write(rows):
    """The table of errors by (family, layer) and column."""
    columns = [c for c in METHODS if any(c in row for row in rows.values())]
    lines = [
        "# Output error with activations of four and eight bits",
        "",
        "`python benchmarks/four_bit_activations.py`: percent, on rows that did not calibrate, "
        "through the emulated data path of `aie2`; W4A4 unless a column says A8. The script says "
        "what each method is and what of it was not rebuilt. `data-free` has no activations to "
        "choose by; `~` is the residual input.",
        "",
        "| layer | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for (family, name), row in rows.items():
        cells = " | ".join(f"{100 * row[c]:.2f}" if c in row else "" for c in columns)
        lines.append(f"| {family} {name} | {cells}")
        lines[-1] += " |"
    for family in dict.fromkeys(key[0] for key in rows):
        members = [row for key, row in rows.items() if key[0] == family]
        means = [mean(members, column) for column in columns]
        lines.append(f"| **{family}, geometric mean** | " + " | ".join(means))
        lines[-1] += " |"
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
