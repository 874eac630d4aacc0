"""A machine of one's own from a handful of numbers: the rest as on the nearest shipped machine.

A sketch states what was given, takes all else over from a machine of its kind (`TEMPLATES`), and
lists what it took over under ``assumed``. Costs and rows call such numbers assumed, and results say
which of them they rest on (`hwmodels.rests_on`).

What is scaled with what was given:

    MACs of a mode    like the int8 mode, by 64 over the product of its widths, at most twice as
                      many; 16-bit floats half as many. One in each element of a systolic array
    energy of a MAC   like int8, by the product of the widths over 64
    L2 bandwidth      with the columns, for it feeds them; of a systolic array with its sides
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hwmodels.blocks import key_meanings
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError, nearest, printable, quantity, quantity_text
from hwmodels.loader import SHIPPED, list_accelerators, load_accelerator
from hwmodels.overrides import (
    assumed_keys,
    explain_rule,
    keys_of,
    parse_value,
    problems_of,
)

__all__ = ["TEMPLATES", "near_square", "shipped_text", "sketch", "sketch_text", "sourced"]

TEMPLATES = {"array": "aie2", "grid": "l40s", "systolic": "systolic"}
"""The machine that a sketch of each organization follows."""
_PLACES = {
    "rows": ("units", "rows"),
    "columns": ("units", "columns"),
    "clock": ("units", "clock_hz"),
    "l1": ("memories", "l1", "capacity_bytes"),
    "sram": ("memories", "l2", "capacity_bytes"),
    "dram": ("memories", "dram", "bandwidth_bytes_per_s"),
    "launch": ("dispatch", "launch_s"),
    "acc_bits": ("datapath", "acc_bits"),
    "products_per_add": ("datapath", "products_per_add"),
    "overflow": ("datapath", "overflow"),
    "node": ("energy", "node_nm"),
}
_ABOUT = ("source", "confidence", "uncertainty_percent")
_SUSTAINED = 0.8
_PANEL = 0.5
_LAUNCH_S = 20e-6
Given = str | int | float | None


def sketch(
    name: str = "my_npu",
    *,
    organization: str = "array",
    rows: Given = None,
    columns: Given = None,
    clock: Given = None,
    modes: str | Sequence[str] = ("int8",),
    sram: Given = None,
    dram: Given = None,
    l1: Given = None,
    launch: Given = None,
    acc_bits: Given = None,
    products_per_add: Given = None,
    overflow: str | None = None,
    node: Given = None,
) -> Accelerator:
    """A machine of which only a few numbers are known.

    Parameters
    ----------
    name : str
        What to call it.
    organization : str
        ``array``, ``grid`` or ``systolic``.
    rows, columns : int, optional
        Units.
    clock, sram, dram, l1, launch, node : str or number, optional
        Clock, L2 capacity, DRAM bandwidth, L1 of a unit, kernel start and process node: ``"1.2
        GHz"``, ``"2MB"``, ``"68 GB/s"``, or numbers in Hz, bytes, bytes a second, seconds and nm.
    modes : str or sequence of str
        MAC modes, such as ``int8``, ``int4x8`` (weights of 4 bits, activations of 8; ``w4a8`` says
        the same), ``bf16``, ``fp8``; with a rate of a unit ``int8=256``, in MACs a cycle.
    acc_bits, products_per_add, overflow : int, int, str, optional
        Accumulators: width, products of an add, and what a sum beyond the width does.

    Raises
    ------
    AcceleratorError
        With everything that is wrong.
    """
    given = {
        "rows": rows, "columns": columns, "clock": clock, "sram": sram, "dram": dram, "l1": l1,
        "launch": launch, "acc_bits": acc_bits, "products_per_add": products_per_add,
        "overflow": overflow, "node": node,
    }  # fmt: skip
    content, problems = _content(name, organization, modes, given)
    hw = None
    try:
        hw = Accelerator.model_validate(content)
    except ValidationError as error:
        problems += [_in_options(problem, given) for problem in problems_of(error)]
    if hw is None or problems:
        raise AcceleratorError("; ".join(problems))
    return hw


def _in_options(problem: Mapping[str, Any], given: Mapping[str, Given]) -> str:
    """A broken rule under the name of the argument that broke it."""
    text = explain_rule(problem)
    for name, place in _PLACES.items():
        if tuple(problem["loc"]) == place and given[name] is not None:
            return f"{name}: {text.partition(': ')[2]}"
    return text


def _content(
    name: str, organization: str, modes: str | Sequence[str], given: Mapping[str, Given]
) -> tuple[dict[str, Any], list[str]]:
    """The content of the file, and what is wrong with modes and organization."""
    problems = []
    if organization not in TEMPLATES:
        problems.append(
            f"organization: got {organization!r:.60}; {nearest(organization, TEMPLATES)}"
        )
        organization = "array"
    template = load_accelerator(TEMPLATES[organization])
    content = template.model_dump(
        exclude_none=True, exclude={"aliases", "kernels", "variants", "side_unit", "assumed"}
    )
    _forget_the_chip(content, organization)
    said: set[tuple[str | int, ...]] = set()
    for option, value in given.items():
        if value is not None:
            *parents, key = _PLACES[option]
            block: Any = content
            for step in parents:
                block = block[step]
            read = parse_value(value, key) if isinstance(value, str) else value
            is_whole = isinstance(read, float) and read.is_integer()
            block[key] = int(read) if is_whole else read
            said.add(_PLACES[option])
    texts = modes.split(",") if isinstance(modes, str) else [t for m in modes for t in m.split(",")]
    found, rates, wrong = _modes(template, [text.strip() for text in texts])
    content["modes"] = tuple(found)
    _scale(content, template)
    said |= {("modes", index, "macs_per_cycle") for index in rates}
    content |= {"name": name, "title": f"{name}, a sketch on the lines of {template.name}"}
    _say_sources(content, template.name, given, rates)
    content["assumed"] = tuple(_assumed(content, said))
    return content, [*problems, *wrong]


def _forget_the_chip(content: dict[str, Any], organization: str) -> None:
    """Take out what is known of the template alone, and put what such machines have on average."""
    memories = content["memories"]
    memories.pop("dma", None)
    memories["dram"].pop("stream_bytes_per_s", None)
    content["energy"].pop("tdp_w", None)
    if organization == "array":
        memories["dram"]["sustained_fraction"] = _SUSTAINED
        memories["l2"]["panel_fraction"] = _PANEL
        content["dispatch"]["launch_s"] = _LAUNCH_S


def _scale(content: dict[str, Any], template: Accelerator) -> None:
    """Give the memories of the units the ways that these units need."""
    units, memories = content["units"], content["memories"]
    sides = [units["rows"], units["columns"]]
    if not all(isinstance(side, int) and 0 < side < 2**20 for side in sides):
        return
    base = template.memories
    if template.units.organization == "systolic":
        share = sum(sides) / (template.units.rows + template.units.columns)
        memories["l1"]["fill_bytes_per_cycle"] = float(sides[0])
        memories["l1"]["drain_bytes_per_cycle"] = float(sides[1])
    elif template.units.organization == "array":
        share = sides[1] / template.units.columns
    else:
        share = sides[0] * sides[1] / template.units.count
    memories["l2"]["bandwidth_bytes_per_cycle"] = base.l2.bandwidth_bytes_per_cycle * share


_MODE = re.compile(
    r"(?:(?P<kind>int|bf|fp)?(?P<one>\d+)(?:x(?:int|fp)?(?P<two>\d+))?"
    r"|w(?P<w>\d+)a(?P<a>\d+)|a(?P<a2>\d+)w(?P<w2>\d+))"
)


def _modes(
    template: Accelerator, texts: Sequence[str]
) -> tuple[list[dict[str, Any]], set[int], list[str]]:
    """Modes as a file has them, indices of those with a given rate, and what is wrong."""
    parsed = []
    problems = []
    for text in filter(None, texts):
        try:
            parsed.append(_parsed_mode(text))
        except AcceleratorError as error:
            problems.append(str(error))
    base = next(mode for mode in template.modes if mode.name == "int8")
    int8 = next(
        (rate for _, kind, a, w, rate in parsed if rate and (kind, a, w) == ("int", 8, 8)), 0
    )
    found = [
        _mode(template, name, kind, a, w, rate, int8 or base.macs_per_cycle)
        for name, kind, a, w, rate in parsed
    ]
    rates = {index for index, (*_, rate) in enumerate(parsed) if rate}
    if not found and not problems:
        problems.append("modes: give at least one, such as int8 or int4x8")
    return found or [base.model_dump(exclude_none=True)], rates, problems


def _parsed_mode(text: str) -> tuple[str, str, int, int, int | None]:
    """Name, kind, bits of activations and weights, and rate if given."""
    name, equals, rate_text = (part.strip() for part in text.lower().partition("="))
    found = _MODE.fullmatch(name) if len(name) <= 20 else None
    if found is None:
        raise AcceleratorError(
            f"modes: {printable(text, 60)!r} is none; write int8, int4x8 (weights of 4 bits, "
            "activations of 8), w4a8, bf16 or fp8, and a rate of a unit as int8=256"
        )
    kind = "float" if found["kind"] in ("bf", "fp") else "int"
    if found["one"]:
        widths = sorted((int(found["one"]), int(found["two"] or found["one"])))
        # Weights are the narrower ones: what 4-bit weights are for.
        w_bits, a_bits = widths
    else:
        a_bits, w_bits = int(found["a"] or found["a2"]), int(found["w"] or found["w2"])
    rate = quantity("macs_per_cycle", rate_text)
    if isinstance(rate, str) and rate_text.isdecimal() and len(rate_text) < 12:
        rate = int(rate_text)
    if equals and not (isinstance(rate, int) and rate > 0):
        raise AcceleratorError(
            f"modes: the rate of {name} must be whole MACs a cycle of a unit, got "
            f"{printable(rate_text, 60)!r}"
        )
    return name, kind, a_bits, w_bits, rate if isinstance(rate, int) else None


def _mode(
    template: Accelerator, name: str, kind: str, a_bits: int, w_bits: int,
    given: int | None, int8_rate: int,
) -> dict[str, Any]:  # fmt: skip
    """One mode: the template's of these widths, or its int8 mode in these widths."""
    base = next(mode for mode in template.modes if mode.name == "int8")
    widths = kind, a_bits, w_bits
    same = next(
        (m for m in template.modes if (m.kind, m.activation_bits, m.weight_bits) == widths), None
    )
    like = same or base
    mode = like.model_dump(exclude_none=True)
    rate = like.macs_per_cycle / base.macs_per_cycle
    product = max(1, a_bits * w_bits)
    if same is None:
        mode |= {"kind": kind, "activation_bits": a_bits, "weight_bits": w_bits}
        is_systolic = template.units.organization == "systolic"
        rate = 1.0 if is_systolic else min(2.0, 64 / product)
        mode["energy_pj_per_mac"] = (base.energy_pj_per_mac or 0.0) * product / 64
        mode["accumulator_bits"] = 64 if kind == "int" and product > 128 else 32
    if kind == "float" and max(a_bits, w_bits) < 16:
        mode |= {"families": ("mxfp", "nvfp"), "scaled_families": ("mxfp", "nvfp")}
    mode["name"] = name
    mode["macs_per_cycle"] = given or max(1, round(rate * int8_rate))
    if same is None:
        # As many MACs more an instruction as a cycle; a systolic array has none but single ones.
        deeper = mode["macs_per_cycle"] / int8_rate
        mode["instruction_k"] = max(1, round(base.instruction_k * deeper))
    return mode


def _say_sources(
    content: dict[str, Any], template: str, given: Mapping[str, Given], rates: set[int]
) -> None:
    """Say in each block which of its numbers were given, and what the others follow."""
    blocks: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        ((name,), content[name])
        for name in ("units", "kernel", "vector", "dispatch", "datapath", "energy")
    ]
    blocks += [(("memories", name), content["memories"][name]) for name in ("l1", "l2", "dram")]
    blocks.append((("datapath", "float_overflow"), content["datapath"]["float_overflow"]))
    for place, block in blocks:
        said = [
            f"{_PLACES[name][-1]} as given ({value})"
            for name, value in given.items()
            if value is not None and _PLACES[name][:-1] == place
        ]
        rest = _REST.get(place, "")[: None if template == TEMPLATES["array"] else 0]
        block |= _about(said, f"as on {template}{rest}")
    for index, mode in enumerate(content["modes"]):
        said = [f"{mode['macs_per_cycle']} MACs a cycle as given"] if index in rates else []
        mode |= _about(said, f"as on {template} or scaled from it")
    for block in (*(block for _, block in blocks), *content["modes"]):
        block.pop("uncertainty_percent", None)


def _about(said: list[str], rest: str) -> dict[str, str]:
    """Source and confidence of a block: what is assumed in it is listed under ``assumed``."""
    if not said:
        return {"source": f"assumed, {rest}", "confidence": "estimate"}
    return {"source": "; ".join([*said, f"the rest assumed, {rest}"]), "confidence": "given"}


# What a sketch of an array does not take over from its template, and why.
_REST = {
    ("memories", "l2"): f", but {_PANEL:g} of it for panels as on tpu_v5e; ways grow with columns",
    ("memories", "dram"): f", but {_SUSTAINED:g} of the peak sustained as on aie_mlv2; no streams",
    ("dispatch",): ", but 20 us as on aie_mlv2: 2 us (tpu_v5e) to 130 us (aie2) are shipped",
}


def _assumed(content: dict[str, Any], said: set[tuple[str | int, ...]]) -> list[str]:
    """Keys that nobody gave, or their blocks where that holds for all in them."""
    try:
        hw = Accelerator.model_validate(content)
    except ValidationError:
        return []
    blocks: dict[str, list[str]] = {}
    for key, steps in keys_of(hw).items():
        if _is_there(content, steps) and "." in key:
            blocks.setdefault(key.rpartition(".")[0], []).append(key)
    stated = {key for key, steps in keys_of(hw).items() if steps in said}
    found: list[str] = []
    for block, keys in blocks.items():
        found += [block] if stated.isdisjoint(keys) else [key for key in keys if key not in stated]
    open_keys = set(assumed_keys(hw.model_copy(update={"assumed": tuple(found)})))
    return [
        name
        for name in found
        if (name in blocks or name in open_keys)
        and not any(name.startswith(f"{other}.") for other in found)
    ]


def _is_there(content: Any, steps: tuple[str | int, ...]) -> bool:
    for step in steps:
        if isinstance(content, dict) and step not in content:
            return False
        content = content[step]
    return True


def sketch_text(hw: Accelerator) -> str:
    """The file of a sketch: each key with what it means, and whether it is assumed."""
    assumed = set(assumed_keys(hw))
    n_assumed = len(assumed)
    lines = [
        f"# {hw.name}: a sketch. {n_assumed} values are assumed, those listed under `assumed`.",
        "# Write yours in their place, with its source, and take it out of `assumed`. Units may be",
        "# written (1.2 GHz, 2 MiB, 68 GB/s); MB is 1,000,000 bytes, MiB 1,048,576.",
    ]
    content = hw.model_dump(exclude_none=True, exclude={"aliases", "kernels", "variants"})
    content.pop("transforms", None)
    names = content.pop("assumed")
    head = {key: content.pop(key) for key in ("name", "title")}
    lines += [f"{key}: {_scalar(value)}" for key, value in head.items()]
    lines += ["assumed:", *(f"  - {name}" for name in names)]
    meanings = key_meanings()
    for key, value in content.items():
        lines += ["", f"{key}:"]
        _write(lines, value, _TITLES.get(key, key.title()), key, assumed, meanings)
    return "\n".join(lines) + "\n"


_TITLES = {"modes": "Mode", "l1": "L1", "l2": "L2", "float_overflow": "FloatOverflow"}


def _write(
    lines: list[str], content: Any, title: str, path: str, assumed: set[str],
    meanings: Mapping[str, Mapping[str, str]], depth: int = 1,
) -> None:  # fmt: skip
    """Lines of a block or of a list of blocks."""
    if isinstance(content, list | tuple):
        for item in content:
            start = len(lines)
            _write(lines, item, title, f"{path}.{item['name']}", assumed, meanings, depth + 1)
            lines[start] = f"{'  ' * depth}- {lines[start].strip()}"
        return
    indent = "  " * depth
    about = [key for key in _ABOUT if key in content]
    for key in [*(key for key in content if key not in about), *about]:
        value = content[key]
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:")
            inner = _TITLES.get(key, key.title())
            _write(lines, value, inner, f"{path}.{key}", assumed, meanings, depth + 1)
            continue
        text = f"{indent}{key}: {_scalar(value, key)}"
        if key not in (*_ABOUT, "name"):
            is_assumed = "assumed; " if f"{path}.{key}" in assumed else ""
            text += f"  # {is_assumed}{meanings.get(title, {}).get(key, '')}".rstrip()
        lines.append(text)


def _scalar(value: Any, key: str = "") -> str:
    """A value as YAML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return quantity_text(key, value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z][\w .;,()/-]*", text) else f'"{text}"'


def shipped_text(like: str, name: str) -> str:
    """The shipped file of the machine `like`, comments and all, under another name.

    Raises
    ------
    AcceleratorError
        If no machine of that name is shipped.
    """
    found = load_accelerator(like)
    if found.name not in list_accelerators():
        raise AcceleratorError(
            f"{like!r:.60} is no shipped machine; {nearest(like, list_accelerators())}"
        )
    text = (SHIPPED / f"{found.name}.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^name: .*$", f"name: {name}", text, count=1, flags=re.MULTILINE)
    return re.sub(r"^aliases: .*$", "aliases: []", text, count=1, flags=re.MULTILINE)


def sourced(machine: Accelerator, file: str, tool: str, changes: Mapping[str, Any]) -> Accelerator:
    """The machine with the file named as the source of what it says."""
    content = machine.model_dump()
    content["title"] = f"{machine.name}, from a file of {tool}"
    for key in changes:
        *steps, last = key.split(".")
        place: Any = content
        for step in steps:
            is_list = isinstance(place, list | tuple)
            place = next(m for m in place if m["name"] == step) if is_list else place[step]
        said = place["source"].removeprefix("assumed, ")
        place["source"] = f"{last} from {printable(file, 60)} ({tool}); {said}"
        place["confidence"] = "given"
    return Accelerator.model_validate(content)


def near_square(total: int) -> tuple[int, int]:
    """Rows and columns of so many units, as near a square as it goes."""
    rows = next(s for s in range(math.isqrt(total), 0, -1) if total % s == 0)
    return rows, total // rows
