"""``loraq-sim solve``: split the weights of a dump and report error and bytes per layer.

Each layer's settings are put together from recipe, flags and overrides. Where they disagree, an
``--override`` wins over a flag that was given, that over the recipe, and the recipe over the
defaults of the flags.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from loraq_sim.cli.options import (
    Condition,
    Device,
    Family,
    Finish,
    Force,
    Group,
    LayerDumpFile,
    Layers,
    Lora,
    Methods,
    NoProgress,
    OutFormat,
    OutputFormat,
    Preset,
    Quiet,
    Rotate,
    Seed,
    Smooth,
    Splits,
    SynthesizeInputs,
    Tokens,
    is_given,
    listed,
)
from loraq_sim.cli.output import (
    case_failure,
    end_with,
    note,
    one_line_failures,
    open_dump,
    print_tables,
    tracked,
)
from loraq_sim.cli.solve_compare import (
    Compare,
    SharedSolver,
    ShareInputs,
    Sharing,
    compare_rows,
    print_comparison,
)
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing
from loraq_sim.reporting.tables import result_table
from loraq_sim.settings import (
    SIXTEEN_BIT_KINDS,
    Override,
    parse_override,
    settings_of,
    settings_with,
    skipped,
)
from loraq_sim.solvers.problem import find_device
from loraq_sim.split import parse_split

if TYPE_CHECKING:
    from loraq_sim.recipe import Recipe

__all__ = [
    "EXAMPLES",
    "solve_command",
]


_DEFAULT_SPLIT = "W4A4+W8A8@fp16r32"
_DEFAULT_METHOD = "loraq"
_TRANSFORMS = ("rotation", "smooth", "condition", "finish")
# A setting and its column in result rows, where they differ.
_COLUMN_OF = {"rotate": "rotation", "group": "group_size"}
_SCALARS = ("family", "group", "preset", "seed", "smooth", "rotate", "condition", "finish")


@dataclass(frozen=True, kw_only=True)
class SolveSettings:
    """What was asked for; `explicit` names the scalar settings that were given as flags."""

    values: Mapping[str, Any]
    explicit: frozenset[str]
    recipe: "Recipe | None"
    overrides: tuple[Override, ...]
    skip: tuple[str, ...]

    @classmethod
    def checked(
        cls,
        values: Mapping[str, Any],
        *,
        is_given: Callable[[str], bool],
        recipe: Path | None,
        overrides: tuple[Override, ...],
        skip: tuple[str, ...],
        has_layers: bool,
    ) -> Self:
        """Check splits and read the recipe; `values` has splits, methods and the scalars."""

        for text in values["splits"]:
            parse_split(text, family=values["family"], group=values["group"])
        if recipe is not None and values["splits"]:
            raise InputError(
                "--recipe names the splits; leave out --split (--override can change single layers)"
            )
        read = None
        if recipe is not None:
            from loraq_sim.recipe import read_recipe

            read = read_recipe(recipe)
        by_default = () if has_layers or read else SIXTEEN_BIT_KINDS
        return cls(
            values=values,
            explicit=frozenset(name for name in _SCALARS if is_given(name)),
            recipe=read,
            overrides=overrides,
            skip=() if skip == ("none",) else skip or by_default,
        )

    @property
    def n_variants(self) -> int:
        """How many times each layer is solved."""
        return max(1, len(self.values["splits"])) * max(1, len(self.values["methods"]))

    def cases(self, dump: Any, source: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Settings of every solve with the layer's name, and notes on what is left out.

        Raises
        ------
        InputError
            If no layer is left.
        """
        kinds = {name: _kind(dump, name) for name in dump}
        cases = {name: self._layer_cases(name, kind) for name, kind in kinds.items()}
        kept = [name for name in cases if cases[name]]
        notes = []
        if len(kept) < len(dump):
            why = "--skip none: none" if self.recipe is None else "the recipe leaves them"
            notes.append(f"{len(dump) - len(kept)} of {len(dump)} layers stay at 16 bits ({why})")
        unused = [] if self.recipe is None else self.recipe.unused(kinds)
        if not kept:
            if unused:
                raise InputError(f"{source}: no layer matches the recipe, such as {unused[0]!r}")
            raise InputError(f"{source}: every layer is skipped; give --skip none or --layers")
        if unused:
            notes.append(
                f"{len(unused)} entries of the recipe match no layer here, such as {unused[0]!r}"
            )
        return [case for name in kept for case in cases[name]], notes

    def _layer_cases(self, name: str, kind: str) -> list[dict[str, Any]]:
        if skipped(name, kind, self.skip):
            return []
        scalars = {key: self.values[key] for key in _SCALARS}
        if self.recipe is None:
            stated: dict[str, Any] = scalars
            splits = self.values["splits"] or (_DEFAULT_SPLIT,)
        else:
            found = self.recipe.settings(name, kind)
            if found is None:
                return []
            stated = scalars | found | {key: scalars[key] for key in self.explicit}
            splits = (stated["split"],)
        methods = self.values["methods"] or (stated.get("method", _DEFAULT_METHOD),)
        own = settings_of(name, kind, self.overrides)
        return [
            {"layer": name} | settings_with(stated | {"split": split, "method": method}, own)
            for split in splits
            for method in methods
        ]


def _kind(dump: Any, name: str) -> str:
    try:
        return dump.info(name).kind
    except InputError:
        # A layer that cannot be described gets a failed row when it is solved.
        return ""


EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim solve --layer-dump examples/minilm.pt --split W4A4+W8A8@fp16r32\n\n"
    "loraq-sim solve --layer-dump examples/minilm.pt --layers '*query' "
    "--compare rtn,lqer,svdquant,loraq --split W4A4+W8A8@fp16r32\n\n"
    "loraq-sim solve --layer-dump examples/tiny_pixart.pt --split W4A4+W8A8r8 "
    "--override 'ffn_*:rank=16' --save runs/tiny_pixart_w4.safetensors\n\n"
    "loraq-sim solve --layer-dump examples/tiny_pixart.pt --recipe examples/recipe_tiny_pixart.toml"
)
_SHOWN = (
    *("layer", "n", "k", "split", "method", "rank", "weight_bytes", "bits_per_weight"),
    *("weight_error", "output_error", "gain_over_rtn", "gain_over_svdquant", "seconds"),
)


@one_line_failures
def solve_command(
    context: typer.Context,
    layer_dump: LayerDumpFile,
    layers: Layers = None,
    splits: Splits = None,
    method: Methods = None,
    compare: Compare = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="Split and settings of each layer from a file (such as allocate writes); --method "
            "and the like replace what it says, --override too.",
            show_default=False,
        ),
    ] = None,
    preset: Preset = "balanced",
    family: Family = "int",
    group: Group = 64,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN:KEY=VALUE",
            help="Settings of layers by name or kind: rank, budget, split, method, preset; "
            "repeatable, the last one wins.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Layers to leave at 16 bits, by name or kind; 'none' for no layer. Default, "
            "without --layers and --recipe: the kinds SVDQuant leaves.",
            show_default=False,
        ),
    ] = None,
    smooth: Smooth = None,
    rotate: Rotate = None,
    condition: Condition = None,
    finish: Finish = None,
    share_inputs: ShareInputs = Sharing.OWN,
    tokens: Tokens = None,
    synthesize_inputs: SynthesizeInputs = False,
    lora: Lora = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            help="Write the quantized layers as safetensors (one split and method).",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    seed: Seed = 0,
    device: Device = "cpu",
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Solve the weights of a dump: bytes, error, and gain over RTN and SVDQuant at equal bytes.

    The output error is that of the stored weight alone: full-precision activations, no emulation
    (see `emulate` for that).
    """

    device = find_device(device).name
    given = {
        "family": family, "group": group, "preset": preset, "seed": seed,
        "smooth": smooth, "rotate": rotate, "condition": condition, "finish": finish,
        "splits": listed(splits), "methods": listed(method),
    }  # fmt: skip
    settings = SolveSettings.checked(
        given,
        is_given=lambda name: is_given(context, name),
        recipe=recipe,
        overrides=tuple(parse_override(text) for text in override or ()),
        skip=listed(skip),
        has_layers=bool(layers),
    )
    _check_outputs(settings, listed(compare), listed(method), save, force)
    dump = open_dump(
        layer_dump, synthesize_inputs=synthesize_inputs, tokens=tokens, quiet=quiet, lora=lora
    )
    if layers:
        dump = dump.select(listed(layers))
    cases, notes = settings.cases(dump, str(layer_dump))
    cases = [case | {"device": device} for case in cases]
    for text in filter(None, (dump.left_out, *notes)):
        note(text, quiet=quiet)
    silent = quiet or no_progress
    if compare:
        if share_inputs is not Sharing.OWN:
            raise InputError("--compare solves layer by layer: leave out --share-inputs")
        chosen = ("smooth", "rotate", "condition", "finish")
        if any(case.get(key) is not None for case in cases for key in chosen):
            raise InputError(
                "--compare runs methods as published: leave out --smooth, --rotate, --condition "
                "and --finish"
            )
        rows = compare_rows(dump, cases, listed(compare), tokens=tokens, quiet=silent)
        end_with(rows, lambda _: print_comparison(rows, output, title=str(layer_dump)))
        return
    solver = SharedSolver(dump, cases, share_inputs)
    rows, solutions = _solved(dump, cases, solver, tokens, silent)
    if save is not None and solutions:
        from loraq_sim.quantized_model import write_quantized_model

        meta = {"dump": layer_dump.name, "splits": {r["layer"]: r["split"] for r in rows}}
        for key in _TRANSFORMS:
            meta[key] = {r["layer"]: r[key] for r in rows if r.get(key) is not None}
        write_quantized_model(save, solutions, meta=meta, overwrite=force)
        note(f"wrote {save}", quiet=quiet)
    end_with(rows, lambda has_messages: _show(rows, has_messages, str(layer_dump), output))


def _check_outputs(
    settings: SolveSettings,
    compare: tuple[str, ...],
    methods: tuple[str, ...],
    save: Path | None,
    force: bool,
) -> None:
    if compare and (methods or save is not None):
        raise InputError(
            "--compare solves with the methods it names: leave out --method and --save"
        )
    if len(compare) == 1:
        raise InputError(f"--compare needs two methods or more, got {compare[0]}")
    if save is None:
        return
    if settings.n_variants > 1:
        raise InputError("--save needs one split and one method (--override may change them)")
    refuse_existing(save, overwrite=force)


def _solved(
    dump: Any,
    cases: list[dict[str, Any]],
    solver: SharedSolver,
    tokens: int | None,
    silent: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from loraq_sim.recipe import split_of
    from loraq_sim.solve_report import report_solution
    from loraq_sim.solvers.solution import transforms_in_words

    rows, solutions = [], {}
    for case in tracked(cases, "solving", quiet=silent):
        row = {_COLUMN_OF.get(key, key): value for key, value in case.items()}
        name, seed = case["layer"], case["seed"]
        try:
            split = split_of(case)
            row["split"] = split.text
            layer = dump[name]
            solution = solver.solve(layer, split, case)
            if case.get("condition") is not None:
                row["chosen"] = ", ".join(transforms_in_words(solution, split)) or "nothing"
            row |= report_solution(layer, solution, split, seed=seed, tokens=tokens)
            solutions[name] = solution
        except Exception as error:
            row |= {"status": "failed", "message": case_failure(error)}
        rows.append(row)
    return rows, solutions


def _show(
    rows: list[dict[str, Any]], has_messages: bool, source: str, output: OutputFormat
) -> None:
    from loraq_sim.solve_report import mean_rows

    columns = [*_SHOWN, "message"] if has_messages else list(_SHOWN)
    told = (*_TRANSFORMS, "chosen")
    used = [key for key in told if any(row.get(key) is not None for row in rows)]
    columns[columns.index("method") : columns.index("method")] = used
    tables = [result_table(rows, columns, title=f"{source}: stored weights")]
    n_layers = len({row["layer"] for row in rows})
    if len({(row["split"], row["method"]) for row in rows}) > 1 and n_layers > 1:
        tables.append(result_table(mean_rows(rows), title="Mean over layers"))
    print_tables(tables, output)
