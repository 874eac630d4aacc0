"""Options that several commands share: the same flag means the same everywhere."""

import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from loraq_sim.dumps.kinds import list_models
from loraq_sim.errors import InputError
from loraq_sim.metrics import AGGREGATES
from loraq_sim.settings import parse_array_grid
from loraq_sim.solvers import METHODS

__all__ = [
    "AccBits",
    "AccBitsGrid",
    "Accelerators",
    "AcceleratorsOrPlan",
    "AggregateName",
    "ArrayGrid",
    "ArrayPoints",
    "Accumulators",
    "AccumulatorsGrid",
    "Device",
    "Family",
    "Force",
    "Group",
    "Jobs",
    "LayerDumpFile",
    "LayerDumpOrPlan",
    "Layers",
    "Methods",
    "NoProgress",
    "OutFormat",
    "OutputFormat",
    "Overflow",
    "OverflowGrid",
    "PFormat",
    "ZeroPoint",
    "Preset",
    "ProductsPerAdd",
    "ProductsPerAddGrid",
    "Quiet",
    "Scheduler",
    "SchedulerOptions",
    "Rotate",
    "Resolution",
    "Rows",
    "RowsOfModel",
    "Seed",
    "SharedBy",
    "Smooth",
    "Splits",
    "Lora",
    "SynthesizeInputs",
    "Tokens",
    "KernelFamily",
    "Unfused",
    "datapath_overrides",
    "is_given",
    "key_values",
    "listed",
    "whole_numbers",
]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, in place of its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


class OutputFormat(enum.StrEnum):
    """How results are printed on stdout."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"


_LAYER_DUMP = typer.Option(
    "--layer-dump",
    metavar="FILE",
    help="Layer dump or checkpoint: .pt, .safetensors, .npz, .gguf, .onnx, or a folder.",
    show_default=False,
)


_HW = typer.Option(
    "--hw",
    metavar="NAME|FILE",
    help="Accelerator name or YAML file; repeat or separate by commas.",
    show_default=False,
)
LayerDumpFile = Annotated[Path, _LAYER_DUMP]
Accelerators = Annotated[list[str], _HW]
# Where a plan may name them instead.
LayerDumpOrPlan = Annotated[Path | None, _LAYER_DUMP]
AcceleratorsOrPlan = Annotated[list[str] | None, _HW]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="PATTERN",
        help="Glob over layer names or kinds; repeat or separate by commas. Default: all layers.",
        show_default=False,
    ),
]
Splits = Annotated[
    list[str] | None,
    typer.Option(
        "--split",
        metavar="SPLIT",
        help="Precision split such as W4A4+W8A8r16 or W4A4+W8A8@fp16r32; repeatable. A4s, A4u, A4g "
        "and A16i say how activations round (docs: Splits).",
        show_default=False,
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"Solver: {', '.join(METHODS)}; repeatable. Default: loraq.",
        show_default=False,
    ),
]
Preset = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="Solver effort: fast, balanced or best.")
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where the long loops of solving run: cpu, cuda or cuda:N.",
    ),
]
Family = Annotated[
    str, typer.Option("--family", metavar="NAME", help="Element family: int, mxint, mxfp or nvfp.")
]
Group = Annotated[
    int, typer.Option("--group", metavar="N", help="Elements per scale along K (and the rank).")
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        metavar="T",
        help="Activation rows used, spread evenly over the dump. Default: all rows.",
        show_default=False,
    ),
]
SynthesizeInputs = Annotated[
    bool,
    typer.Option(
        "--synthesize-inputs",
        help="Draw inputs (--tokens rows, else 256) for layers that have none, by their kind and "
        "on their weights; all that rests on them is called synthetic.",
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[=SCALE]", help="Adapter to merge first; repeatable."),
]
AggregateName = Annotated[
    str,
    typer.Option(
        "--aggregate",
        metavar="NAME",
        help=f"How output errors of layers become one: {', '.join(AGGREGATES)}.",
    ),
]
SharedBy = Annotated[
    int,
    typer.Option(
        "--shared-by",
        metavar="N",
        min=1,
        help="Layers that read one input and share R and X R^T; each is charged an even part.",
    ),
]
Smooth = Annotated[
    float | None,
    typer.Option(
        "--smooth",
        metavar="ALPHA",
        help="Smooth activations with this strength, 0 to 1 (by the layer's own inputs).",
        show_default=False,
    ),
]
Rotate = Annotated[
    str | None,
    typer.Option(
        "--rotate",
        metavar="NAME",
        help="Rotate the input channels by a block Hadamard matrix: hadamard, or hadamard:64 for "
        "blocks of 64.",
        show_default=False,
    ),
]
Condition = Annotated[
    str | None,
    typer.Option(
        "--condition",
        metavar="NAME",
        help="Choose smoothing and rotation, and the grid of A4a: auto (by the layer's own inputs, "
        "or a rule without any), or rms (smoothing in closed form). What --smooth and --rotate say "
        "stays.",
        show_default=False,
    ),
]
Finish = Annotated[
    str | None,
    typer.Option(
        "--finish",
        metavar="NAME",
        help="data: refine the codes on the layer's own inputs, where tokens left out gain by it.",
        show_default=False,
    ),
]
Rows = Annotated[
    list[str] | None,
    typer.Option(
        "--rows",
        metavar="M|PATTERN=M",
        help="Rows of one model call (samples x tokens, guidance included), for the cost: of all "
        "layers, or of those of a name or kind such as 'cross_*=600'; repeatable, the last one "
        "wins. Default: what the dump says.",
        show_default=False,
    ),
]
RowsOfModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Published model the layers are of, for the rows of one call where --rows does not "
        f"say them: {', '.join(list_models())}.",
        show_default=False,
    ),
]
Resolution = Annotated[
    int, typer.Option("--resolution", metavar="PX", help="Image side of --model: 512 or 1024.")
]
Batch = Annotated[
    int,
    typer.Option("--batch", metavar="N", min=1, help="Images of one call; multiplies the rows."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the solver.")]
OutFormat = Annotated[
    OutputFormat, typer.Option("--format", help="How results are printed on stdout.")
]
Force = Annotated[bool, typer.Option("--force", help="Do again, and replace, what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes on stderr.")]
NoProgress = Annotated[
    bool, typer.Option("--no-progress", help="No progress on stderr; notes and failures still.")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        metavar="N",
        min=0,
        help="Worker processes; 0 works in this one. Default: one per CPU; with --scheduler all "
        "there are, or one Slurm job.",
        show_default=False,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS|slurm",
        help="Run on a cluster: tcp:// or tls://host:port of a Dask scheduler that you trust, or "
        "Slurm jobs (extra \\[cluster]; --dry-run shows the job script).",
        show_default=False,
    ),
]
SchedulerOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--scheduler-option",
        metavar="KEY=VALUE",
        help="Of Slurm: cores, memory, queue, account, walltime, ... (an unknown key lists all); "
        "of TLS: tls_ca, tls_cert, tls_key; repeatable.",
        show_default=False,
    ),
]
KernelFamily = Annotated[
    str | None,
    typer.Option(
        "--kernel",
        metavar="NAME",
        help="Kernel family of the machine for every kernel (hw show lists them). Default: the one "
        "a layer would get.",
        show_default=False,
    ),
]
Unfused = Annotated[
    bool,
    typer.Option("--unfused", help="Cost the branch as kernels of its own, P through DRAM."),
]
AccBits = Annotated[
    int | None,
    typer.Option(
        "--acc-bits",
        metavar="N",
        help="Accumulator width, 8 to 64 bits. Default: the accelerator's.",
        show_default=False,
    ),
]
Overflow = Annotated[
    str | None,
    typer.Option(
        "--overflow",
        metavar="RULE",
        help="wrap, saturate or saturate_symmetric. Default: the accelerator's.",
        show_default=False,
    ),
]
ProductsPerAdd = Annotated[
    int | None,
    typer.Option(
        "--products-per-add",
        metavar="C",
        help="Products summed before each add, 1 to 64. Default: the accelerator's.",
        show_default=False,
    ),
]
Accumulators = Annotated[
    int | None,
    typer.Option(
        "--accumulators",
        metavar="P",
        help="Partial accumulators, 1 to 64. Default: the accelerator's.",
        show_default=False,
    ),
]
AccBitsGrid = Annotated[
    list[str] | None,
    typer.Option(
        "--acc-bits",
        metavar="N,...",
        help="Accumulator widths, 8 to 64 bits, each a case. Default: the accelerator's.",
        show_default=False,
    ),
]
OverflowGrid = Annotated[
    list[str] | None,
    typer.Option(
        "--overflow",
        metavar="RULE,...",
        help="wrap, saturate or saturate_symmetric, each a case. Default: the accelerator's.",
        show_default=False,
    ),
]
ProductsPerAddGrid = Annotated[
    list[str] | None,
    typer.Option(
        "--products-per-add",
        metavar="C,...",
        help="Products summed before each add, 1 to 64, each a case. Default: the accelerator's.",
        show_default=False,
    ),
]
AccumulatorsGrid = Annotated[
    list[str] | None,
    typer.Option(
        "--accumulators",
        metavar="P,...",
        help="Partial accumulators, 1 to 64, each a case. Default: the accelerator's.",
        show_default=False,
    ),
]
ArrayGrid = Annotated[
    list[str] | None,
    typer.Option(
        "--array",
        metavar="NAME,...",
        help="Array presets to emulate instead of the accelerator's own, each a case: aie2, imma, "
        "gemmini, ... (an unknown name lists them all).",
        show_default=False,
    ),
]
ArrayPoints = Annotated[
    str | None,
    typer.Option(
        "--array-grid",
        metavar="KEY=VALUE,...",
        help="Arrays, each emulated and priced from gates: acc_bits=14..32 with the keys "
        "products_per_add, overflow, accumulators, tree_bits, tree_overflow behind commas.",
        show_default=False,
    ),
]
PFormat = Annotated[
    str | None,
    typer.Option(
        "--p-format",
        metavar="FORMAT",
        help="Format of P: branch, fp16, bf16 or int2 to int8. Default: the accelerator's.",
        show_default=False,
    ),
]
ZeroPoint = Annotated[
    str | None,
    typer.Option(
        "--zero-point",
        metavar="PLACE",
        help="Where zero points are corrected: initial (the accumulator starts there) or after it. "
        "Default: the accelerator's.",
        show_default=False,
    ),
]

Captions = Annotated[
    Path | None,
    typer.Option(
        "--captions",
        metavar="FILE",
        help="Text embeddings (captions, tokens, channels) for a diffusers folder, as safetensors, "
        "the unconditional one last. Default: captions.safetensors of the folder, else random.",
        show_default=False,
    ),
]


def listed(values: Iterable[str] | None) -> tuple[str, ...]:
    """Values of a repeatable, comma-separated option, in order, without repeats."""
    parts = (part.strip() for value in values or () for part in value.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def sizes_of(flag: str, text: str) -> tuple[int, int, int]:
    """(M, N, K) of ``m=M,n=N,k=K`` in any order, or of ``MxKxN``, in which tools differ."""
    if "=" in text:
        pairs = [pair.partition("=") for pair in text.lower().replace(" ", "").split(",")]
        named = {name: size for name, _, size in pairs}
        m, n, k = (named.pop(name, "") for name in "mnk")
        sizes = [m, n, k, *named] if len(pairs) == 3 else []
    else:
        sizes = text.lower().split("x")
        if len(sizes) == 3:
            sizes = [sizes[0], sizes[2], sizes[1]]
    if len(sizes) != 3 or not all(s.isascii() and s.isdigit() and int(s) > 0 for s in sizes):
        raise InputError(
            f"{flag} must be MxKxN with positive integers, such as 4096x1152x4608, or name them, "
            f"such as m=4096,n=4608,k=1152; got {text!r}"
        )
    rows, columns, depth = map(int, sizes)
    return rows, columns, depth


def listed_shapes(flag: str, values: Iterable[str] | None) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) by text of a repeatable option: one named shape, or bare ones between commas."""
    texts = [
        text for value in values or () for text in ([value] if "=" in value else listed([value]))
    ]
    return {text: sizes_of(flag, text) for text in texts}


def whole_numbers(flag: str, values: Iterable[str] | None) -> tuple[int, ...] | None:
    """Integers of a repeatable, comma-separated option, None if it was not given."""
    texts = listed(values)
    for text in texts:
        if not (text.isascii() and text.isdigit()):
            raise InputError(f"{flag} must be whole numbers such as 16,20,24, got {text!r}")
    return tuple(map(int, texts)) or None


def key_values(flag: str, values: Iterable[str] | None) -> dict[str, str]:
    """Keys and values of a repeatable ``KEY=VALUE`` option."""
    pairs = {}
    for text in values or ():
        key, equals, value = (part.strip() for part in text.partition("="))
        if not key or not equals:
            raise InputError(f"{flag} must look like KEY=VALUE, got {text!r}")
        pairs[key] = value
    return pairs


def datapath_overrides(array_grid: str | None = None, **settings: Any) -> dict[str, Any]:
    """The data path settings that were given, those of a grid of arrays among them.

    Raises
    ------
    InputError
        If the grid is none, or has a setting that was given beside it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    grid = {} if array_grid is None else parse_array_grid(array_grid)
    for name in grid.keys() & given.keys():
        flag = f"--{name.replace('_', '-')}"
        raise InputError(f"{name} stands in --array-grid and in {flag}; leave one out")
    return given | grid
