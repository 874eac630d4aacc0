"""Markdown made from the code: what a page shows by ``<!-- generated: NAME -->``.

`SITE` has what takes its place on the built site, where that is not what the repository shows.
"""

import re
from collections.abc import Callable
from pathlib import Path

from generated_api import api, api_more, module_text
from generated_commands import command_pages, output_fields
from generated_schema import accelerator_schema
from generated_validation import (
    accuracy_by_device,
    attention_rows,
    branch_rows,
    golden_counts,
    measured_rows_table,
)
from ladder import ladder_table
from markdown_table import table

__all__ = ["GENERATED", "SITE"]

_ROOT = Path(__file__).resolve().parents[2]


def _formats() -> str:
    from loraq_sim.formats import ELEMENTS, parse_format

    rows = []
    for element in ELEMENTS.values():
        text = element.name
        if element.block is None and not element.is_plain_float:
            text = f"{element.name}/g64"
        fmt = parse_format(text)
        bits = 8 * fmt.storage_bytes((64, 4608)) / (64 * 4608)
        rows.append(
            (
                f"`{element.name}`",
                element.bits,
                _codes(element),
                _block(element),
                f"`{text}`",
                f"{bits:.3f}".rstrip("0").rstrip("."),
            )
        )
    heads = ("element", "bits", "codes", "brings along", "example", "stored bits per element")
    return table(heads, rows)


def _codes(element) -> str:
    if element.is_plain_float:
        return "floats, no scale"
    if element.minifloat is not None:
        import ml_dtypes

        return f"{element.minifloat}, up to {float(ml_dtypes.finfo(element.minifloat).max):g}"
    zero = ", zero point" if element.has_zero_point else ""
    step = f", step 2^-{element.fraction_bits}" if element.fraction_bits else ""
    return f"{element.lo} to {element.hi}{step}{zero}"


def _block(element) -> str:
    if element.block is None:
        return "-"
    group, scale = element.block
    per_tensor = " and one fp32 per tensor" if scale == "e4m3" else ""
    return f"groups of {group}, {scale}{per_tensor}"


def _scales() -> str:
    from loraq_sim.formats import SCALES

    rows = [
        (
            f"`{s.name}`",
            s.nbytes,
            "4 (fp32)" if s.name == "e4m3" else "-",
            f"{s.smallest:.3g}",
            f"{s.largest:.3g}",
        )
        for s in SCALES.values()
    ]
    return table(("scale", "bytes", "bytes per tensor", "smallest", "largest"), rows)


def _scale_rules() -> str:
    from loraq_sim.quantizers.quantize import RULES

    return ", ".join(f"`{rule}`" for rule in RULES)


def _rounding_ties() -> str:
    """What each mode makes of halves, by the emulator itself."""
    import numpy as np

    from loraq_sim import srs
    from loraq_sim.formats import Rounding, rounding_code

    halves = np.array([5, 7, -5, -7, 3, -3], dtype=np.int32)
    quarters = np.array([9, -9], dtype=np.int32)  # 2.25 and -2.25
    rows = []
    for mode in Rounding:
        ties = srs(halves, 1, out_bits=8, rounding=mode.value)
        rest = srs(quarters, 2, out_bits=8, rounding=mode.value)
        codes = [_code(rounding_code, mode, generation) for generation in ("aie-ml", "aie1")]
        rows.append((f"`{mode.value}`", *map(int, ties), *map(int, rest), *codes))
    heads = (
        *("mode", "2.5", "3.5", "-2.5", "-3.5", "1.5", "-1.5", "2.25", "-2.25"),
        *("code AIE-ML", "code AIE1"),
    )
    return table(heads, rows)


def _code(rounding_code: Callable, mode: str, generation: str) -> str:
    from loraq_sim.errors import InputError

    try:
        return str(rounding_code(mode, generation))
    except InputError:
        return "-"


def _rounding_constants() -> str:
    """The constants of each mode, named by their values at one shift that tells them apart."""
    from loraq_sim.formats import Rounding
    from loraq_sim.kernels.shift_round import rounding_constants

    shift = 8
    full, half = 2**shift - 1, 2 ** (shift - 1)
    names = {0: "0", 1: "1", -1: "-1", full: "f", -full: "-f", half: "h", half - 1: "h - 1"}
    rows = [
        (f"`{mode.value}`", *(f"${names[c]}$" for c in rounding_constants(mode.value, shift)))
        for mode in Rounding
    ]
    return table(("mode", "$c_0$", "$c_1$", "$c_2$"), rows)


def _array_presets() -> str:
    from loraq_sim.emulator.presets import array_preset, list_array_presets

    presets = [array_preset(name) for name in list_array_presets()]
    rows = [
        (
            f"`{p.name}`",
            str(p.array),
            p.operands,
            p.zero_point,
            f"{p.requantize}, {p.rounding}, {p.saturation}",
            p.source,
            p.confidence,
        )
        for p in presets
    ]
    head = ("preset", "array", "operands", "zero points", "requantization", "source", "confidence")
    return table(head, rows)


def _runtimes() -> str:
    from loraq_sim.emulator.runtimes import list_runtimes, runtime_of

    rows = []
    for name in list_runtimes():
        runtime = runtime_of(name)
        after = {"initial": "initial value", "after": "after the sums"}[runtime.zero_correction]
        checked = runtime.checked or "not run here: from its source"
        row = (f"`{name}`", f"`{runtime.rule}`", runtime.scales, runtime.bias, after, checked)
        rows.append((*row, runtime.source))
    head = ("runtime", "rule", "multiplier", "bias", "operands' zero points", "compared with")
    return table((*head, "source"), rows)


def _methods() -> str:
    from loraq_sim.solvers import METHODS
    from loraq_sim.solvers.baselines import round_to_nearest
    from loraq_sim.solvers.solve import NEED_ACTIVATIONS

    rows = []
    for name, run in METHODS.items():
        first = (run or round_to_nearest).__doc__.partition("\n")[0]
        data = "yes" if name in NEED_ACTIVATIONS else "no"
        rows.append((f"`{name}`", first, data))
    return table(("method", "what it does", "needs activations"), rows)


def _efforts() -> str:
    import dataclasses

    from loraq_sim.solvers.problem import EFFORTS

    fields = [field.name for field in dataclasses.fields(next(iter(EFFORTS.values())))]
    rows = [
        (f"`{name}`", *(getattr(effort, field) or "-" for field in fields))
        for name, effort in EFFORTS.items()
    ]
    return table(("preset", *(field.replace("_", " ") for field in fields)), rows)


def _accelerators() -> str:
    import hwmodels

    rows = []
    for name in hwmodels.list_accelerators():
        hw = hwmodels.load_accelerator(name)
        modes = ", ".join(f"{m.name} {m.macs_per_cycle:g}" for m in hw.modes)
        dram = hw.memories.dram.bandwidth_bytes_per_s / 1e9
        rows.append(
            (
                f"`{name}`",
                hw.title,
                hw.units.count,
                f"{hw.units.clock_hz / 1e9:.3g}",
                modes,
                f"{dram:,.0f}",
            )
        )
    heads = ("name", "machine", "units", "GHz", "MACs per cycle and unit by mode", "DRAM GB/s")
    return table(heads, rows)


def _row_columns() -> str:
    from loraq_sim.results.rows import COLUMNS

    rows = [(f"`{c.name}`", c.sql_type, c.unit or "-", c.meaning) for c in COLUMNS]
    return table(("column", "type", "unit", "meaning"), rows)


def _glossary() -> str:
    from loraq_sim.results.wording import glossary

    return table(("word", "meaning"), [(f"**{word}**", text) for word, text in glossary().items()])


def _plan_keys() -> str:
    from loraq_sim.settings import DATAPATH_KEYS, OVERRIDE_KEYS
    from loraq_sim.sweeps.plan_file import PLAN_KEYS

    inner = {
        "datapath": ", ".join(f"`{key}`" for key in DATAPATH_KEYS),
        "override": ", ".join(f"`{key}`" for key in ("layers", *OVERRIDE_KEYS)),
    }
    rows = [(f"`{key}`", kind, inner.get(key, "-")) for key, kind in PLAN_KEYS.items()]
    return table(("key", "holds", "keys inside"), rows)


def _benchmark(name: str) -> str:
    """A page of `benchmarks/`, its title taken off (the page around it has one)."""
    text = (_ROOT / "benchmarks" / f"{name}.md").read_text(encoding="utf-8")
    lines = text.strip().splitlines()
    return "\n".join(lines[1:] if lines[0].startswith("# ") else lines)


def _other_benchmarks(placed: str) -> str:
    """Every other page of `benchmarks/` as a section."""
    parts = []
    for path in sorted((_ROOT / "benchmarks").glob("*.md")):
        if path.stem in placed.split():
            continue
        first = path.read_text(encoding="utf-8").strip().splitlines()[0]
        title = first.strip("#* ") or path.stem
        parts += [f"## {title}", re.sub(r"^#", "##", _benchmark(path.stem), flags=re.MULTILINE)]
    return "\n\n".join(parts)


def _benchmark_link(argument: str) -> str:
    """Where the tables are in the repository, from a page in a folder so many levels down."""
    name, _, levels = argument.partition(" ")
    path = _ROOT / "benchmarks" / f"{name}.md"
    return f"The tables are in [{_title(path)}]({'../' * int(levels or 2)}benchmarks/{name}.md)."


def _benchmark_tables(argument: str) -> str:
    """The tables of one section of a page of `benchmarks/`."""
    name, section = argument.split()
    body = _benchmark(name).split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    tables = [p for p in body.strip().split("\n\n") if p.startswith("|")]
    return "\n\n".join(tables)


def _other_benchmark_links(placed: str) -> str:
    found = sorted((_ROOT / "benchmarks").glob("*.md"))
    return "\n".join(
        f"- [{_title(path)}](../benchmarks/{path.name})"
        for path in found
        if path.stem not in placed.split()
    )


def _title(path: Path) -> str:
    first = path.read_text(encoding="utf-8").strip().splitlines()[0]
    return first.strip("#* ") if first.startswith("#") else path.stem.replace("_", " ")


def _file(argument: str) -> str:
    """A file of the repository, or what of it a name defines, as a block of code."""
    name, *more = argument.split()
    text = (_ROOT / name).read_text(encoding="utf-8")
    options = dict(option.split("=", 1) for option in more)
    if "object" in options:
        text = _definition(text, options["object"])
    if "start" in options:
        text = text[text.index(options["start"]) :]
    if "entry" in options:
        text = re.search(rf"@\w+{{{options['entry']},.*?\n}}", text, re.DOTALL)[0]
    language = {"py": "python", "bib": "bibtex"}.get(name.rpartition(".")[2], "toml")
    return f"```{language}\n{text.strip()}\n```"


def _definition(text: str, name: str) -> str:
    lines = text.splitlines()
    head = re.compile(rf"(?:def |class )?{name}\b.*(?:[:({{\[]|=.*)$")
    start = next(i for i, line in enumerate(lines) if head.match(line))
    ends = (i for i, line in enumerate(lines) if i > start and re.match(r"[^\s)}\]]", line))
    return "\n".join(lines[start : next(ends, len(lines))])


def _references() -> str:
    """Every entry of references.bib: who, what, when, where to read it."""
    text = (_ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
    told = []
    for entry in re.findall(r"@\w+\{(.*?)\n\}", text, re.DOTALL):
        fields = dict(re.findall(r"(\w+) = \{(.*?)\}(?:,|$)", entry, re.MULTILINE))
        plain = {key: re.sub(r"[{}]|\\['`^\"]", "", value) for key, value in fields.items()}
        names = [name.split(",")[0] for name in plain.get("author", "").split(" and ")]
        who = names[0] + (" et al." if len(names) > 2 else f" and {names[1]}" if names[1:] else "")
        title = f"[{plain['title']}]({plain['url']})" if "url" in plain else plain["title"]
        where = plain.get("booktitle") or plain.get("journal") or plain.get("publisher", "")
        said = ", ".join(part for part in (where, plain.get("year", "")) if part)
        told.append(f"- {who}: {title}. {said}.")
    return "\n".join(sorted(told, key=str.lower))


GENERATED: dict[str, Callable[..., str]] = {
    "formats": _formats,
    "scales": _scales,
    "scale_rules": _scale_rules,
    "rounding_ties": _rounding_ties,
    "rounding_constants": _rounding_constants,
    "array_presets": _array_presets,
    "runtimes": _runtimes,
    "methods": _methods,
    "efforts": _efforts,
    "accelerators": _accelerators,
    "row_columns": _row_columns,
    "plan_keys": _plan_keys,
    "glossary": _glossary,
    "benchmark": _benchmark_link,
    "benchmark_tables": _benchmark_tables,
    "other_benchmarks": _other_benchmark_links,
    "api": api,
    "api_more": api_more,
    "module": module_text,
    "file": _file,
    "references": _references,
    "output_fields": output_fields,
    "ladder": ladder_table,
    "commands": command_pages,
    "accelerator_schema": accelerator_schema,
    "accuracy_by_device": accuracy_by_device,
    "attention_rows": attention_rows,
    "measured_rows": measured_rows_table,
    "branch_rows": branch_rows,
    "golden_counts": golden_counts,
}
SITE: dict[str, Callable[..., str]] = {
    "benchmark": lambda argument: _benchmark(argument.split()[0]),
    "other_benchmarks": _other_benchmarks,
}
