"""The numbers of an accelerator by key path: as a table, idle ones, and copies with some changed.

A path is what `hw show` prints: ``memories.l2.capacity_bytes``, ``modes[0].macs_per_cycle``; modes
also go by name (``modes.int8.macs_per_cycle``), ``mac_array`` stands for ``units``, and the end of
a path will do where it is unique (``clock_hz``). Every change, a variant of the file among them,
passes the rules of the file; a broken one is told with its key path, rule and value.

What a kernel family sets has the path ``kernels.NAME.KEY``. A change of KEY itself is meant for all
kernels: it replaces what the families set.

The energies of integer modes hold for the array that the file's data path describes. Where a change
describes another, they move by what synthesis finds between the two (`hwmodels.cost`), as they do
for a case that brings its own array; an energy that the same change states stays as stated.
"""

import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from hwmodels.blocks import ARRAY_FIELDS
from hwmodels.description import Accelerator, Block, Mode, Strict
from hwmodels.errors import AcceleratorError, nearest, quantity, unit_of, written_units
from hwmodels.modes import unreachable_modes
from hwmodels.synthesis import moved_energy, node_names, synthesized_array

__all__ = [
    "KeyPath",
    "apply_variant",
    "assumed_keys",
    "describe",
    "dotted",
    "explain_rule",
    "idle_keys",
    "keys_of",
    "overview",
    "parse_value",
    "problems_of",
    "unknown_assumptions",
    "with_overrides",
]

KeyPath = tuple[str | int, ...]
_ABOUT = {"source", "confidence", "uncertainty_percent"}
_FIXED = {"name", "title", "aliases", "kernels", "variants", "transforms", "assumed"}
_IDENTITY = {"name", "kind", "activation_bits", "weight_bits"}  # What a mode is: never assumed.
ASSUMED = "assumed"
"""Confidence in a value that the file lists under this key."""
_STEP = re.compile(r"[^.\[\]]+")


def with_overrides(hw: Accelerator, changes: Mapping[str, Any], *, name: str = "") -> Accelerator:
    """A copy of `hw` with the values at some key paths replaced, under `name` if given.

    Raises
    ------
    AcceleratorError
        If a key does not exist or a value breaks the rules of the file.
    """

    # A variant is called machine@variant, which no file may be.
    content = hw.model_dump() | {"name": hw.name.partition("@")[0]}
    paths = keys_of(hw)
    said = set()
    for key, value in changes.items():
        path = _resolve(key, paths)
        said.add(path)
        *parents, last = paths[path]
        place: Any = content
        for step in parents:
            place = place[step]
        if place[last] == value and type(place[last]) is type(value):
            continue  # What is said already stays as it is, in the families too.
        place[last] = value
        for family in content["kernels"]:
            if path in family["set"]:
                family["set"][path] = value
    if hw.assumed:
        content["assumed"] = tuple(path for path in assumed_keys(hw) if path not in said)
    try:
        changed = Accelerator.model_validate(content)
    except ValidationError as error:
        told = [explain_rule(problem) for problem in problems_of(error)]
        raise AcceleratorError(f"{hw.name}: {'; '.join(told)}") from None
    update: dict[str, Any] = {"name": name or hw.name}
    if changed.array is None:
        update["modes"] = _moved_modes(hw, changed, said)
    return changed.model_copy(update=update)


def _moved_modes(hw: Accelerator, changed: Accelerator, said: Collection[str]) -> tuple[Mode, ...]:
    """Modes of `changed` with energies of its array, but for those that were `said`."""
    arrays = [
        tuple(getattr(machine.datapath, field) for field in ARRAY_FIELDS)
        for machine in (hw, changed)
    ]
    node = changed.energy.node_nm
    if arrays[0] == arrays[1] or node not in node_names():
        return changed.modes
    modes = []
    for mode in changed.modes:
        if mode.kind == "int" and f"modes.{mode.name}.energy_pj_per_mac" not in said:
            before, after = (
                synthesized_array(
                    machine.datapath,
                    a_bits=mode.activation_bits,
                    w_bits=mode.weight_bits,
                    node_nm=int(node),
                ).energy_pj_per_mac
                for machine in (hw, changed)
            )
            energy = moved_energy(mode.energy_pj_per_mac, before, after)
            mode = mode.model_copy(update={"energy_pj_per_mac": energy})
        modes.append(mode)
    return tuple(modes)


def apply_variant(hw: Accelerator, name: str) -> Accelerator:
    """The variant `name` of `hw`, named ``hw@name``.

    Raises
    ------
    AcceleratorError
        If `hw` has no such variant or its changes break a rule.
    """
    for variant in hw.variants:
        if variant.name == name:
            return with_overrides(hw, variant.set, name=f"{hw.name}@{name}")
    known = [variant.name for variant in hw.variants]
    hint = nearest(name, known) if known else "it has none"
    raise AcceleratorError(f"unknown variant {name!r:.60} of {hw.name}; {hint}")


def keys_of(hw: Accelerator) -> dict[str, KeyPath]:
    """Every key path that can be changed, with its steps into the dumped file."""
    found: dict[str, KeyPath] = {}
    for field in type(hw).model_fields:
        if field not in _FIXED:
            _collect(found, field, (field,), getattr(hw, field))
    for index, family in enumerate(hw.kernels):
        for key in family.set:
            found[f"kernels.{family.name}.{key}"] = ("kernels", index, "set", key)
    return found


def assumed_keys(hw: Accelerator) -> tuple[str, ...]:
    """The key paths whose values the file calls assumed, each by itself."""
    blocks = tuple(f"{name}." for name in hw.assumed)
    named = [key for key in keys_of(hw) if key in hw.assumed or key.startswith(blocks)]
    return tuple(key for key in named if key.rpartition(".")[2] not in _IDENTITY)


def unknown_assumptions(hw: Accelerator) -> list[str]:
    """What is wrong with the names that the file calls assumed."""
    paths = keys_of(hw)
    known = {path.rpartition(".")[0] for path in paths} | {p.partition(".")[0] for p in paths}
    return [
        f"assumed: {name!r:.80} is no key and no block of the file; {nearest(name, near)}"
        for name in hw.assumed
        if name not in paths and name not in known
        for near in [difflib.get_close_matches(name, [*paths, *known], n=4, cutoff=0.3)]
    ]


def parse_value(text: str, key: str = "") -> int | float | str | bool:
    """A value as the command line gives it: whole number, number, true or false, or a word.

    Where the unit of `key` is written too (``1.5 GHz`` for ``clock_hz``), the number in that unit.
    """
    try:
        number = float(text)
    except ValueError:
        read = quantity(key, text)
        return {"true": True, "false": False}.get(text.lower(), text) if read == text else read
    whole = number == number and abs(number) < 2**63 and number == int(number)
    return int(number) if whole else number


def _collect(found: dict[str, KeyPath], path: str, steps: KeyPath, value: Any) -> None:
    if isinstance(value, Strict):
        for field in type(value).model_fields:
            if field not in _ABOUT:
                _collect(found, f"{path}.{field}", (*steps, field), getattr(value, field))
    elif isinstance(value, tuple) and value and isinstance(value[0], Strict):
        # A list of named blocks; lists inside the dumped content stay tuples of dicts.
        for index, item in enumerate(value):
            _collect(found, f"{path}.{item.name}", (*steps, index), item)
    else:
        found[path] = steps


def _resolve(key: str, paths: Mapping[str, KeyPath]) -> str:
    """The full path that `key` means."""
    text = re.sub(r"^mac_array\b", "units", key.strip())
    steps = tuple(int(s) if re.fullmatch("[0-9]{1,6}", s) else s for s in _STEP.findall(text))
    if text in paths:
        return text
    for path, known in paths.items():
        if known == steps:
            return path
    ending = [
        path for path in paths if path.endswith(f".{text}") and not path.startswith("kernels.")
    ]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise AcceleratorError(
            f"key {key!r:.80} is not unique; write one of {', '.join(ending[:6])} in full"
        )
    short = key.rpartition(".")[2]
    alike = [path for path in paths if path.endswith(f".{short}")] or list(paths)
    hint = nearest(key, alike if len(alike) < 8 else _near_paths(key, paths))
    raise AcceleratorError(f"unknown key {key!r:.80} of an accelerator file; {hint}")


def _near_paths(key: str, paths: Mapping[str, KeyPath]) -> list[str]:

    return difflib.get_close_matches(key, list(paths), n=4, cutoff=0.3) or list(paths)[:4]


def problems_of(error: ValidationError) -> list[Mapping[str, Any]]:
    """Each broken rule once, misspelt keys first, and without the keys that they were to be."""
    problems = error.errors(include_url=False, include_context=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    meant: set[KeyPath] = set()
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            *parents, key = problem["loc"]
            near = difflib.get_close_matches(str(key)[:100], _keys_at(tuple(parents)), n=1)
            meant.update((*parents, name) for name in near)
    found: dict[KeyPath, Mapping[str, Any]] = {}
    for problem in problems:
        where = tuple(problem["loc"])
        if problem["type"] == "missing" and where in meant:
            continue
        # Kinds that a value may be are each refused, below the place of the value.
        place = next((known for known in found if where[: len(known)] == known), where)
        found.setdefault(place, problem)
    return list(found.values())


def explain_rule(problem: Mapping[str, Any]) -> str:
    """One pydantic problem in words: key path, rule, value, nearest valid name."""
    where = tuple(problem["loc"])
    key = dotted(where) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r:.80}; {nearest(where[-1], _keys_at(where[:-1]))}"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    if problem["type"] == "string_pattern_mismatch" and isinstance(problem["input"], str):
        rule = "small letters, digits, '_', '.' and '-', 40 at most"
        return f"{key}: got {problem['input']!r:.60}; a name is made of {rule}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(problem["input"], dict | tuple) or problem["type"] == "value_error":
        return f"{key}: {message}"
    if problem["type"] == "literal_error":
        valid = [str(v) for v in _literals_at(where)]
        return f"{key}: got {problem['input']!r:.60}; {nearest(problem['input'], valid)}"
    hint = written_units(key) if isinstance(problem["input"], str) else ""
    hint = f"; write a number in {unit_of(key)}, or one of {hint} behind it" if hint else ""
    return f"{key}: {message}, got {problem['input']!r:.60}{hint}"


def dotted(where: KeyPath) -> str:
    """A key path as people write it: ``modes[0].macs_per_cycle``."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _annotation_at(where: KeyPath) -> Any:
    """Type of the field at a key path, with optional and tuple wrappers removed."""
    kind: Any = Accelerator
    for part in where:
        if isinstance(part, int):
            continue
        if not (isinstance(kind, type) and issubclass(kind, Strict)):
            return None
        known = {field.alias or name: field for name, field in kind.model_fields.items()}
        if part not in known:
            return None
        kind = _unwrap(known[part].annotation)
    return kind


def _unwrap(kind: Any) -> Any:
    while typing.get_origin(kind) in (tuple, typing.Union, types.UnionType, typing.Annotated):
        kind = typing.get_args(kind)[0]
    return kind


def _keys_at(where: KeyPath) -> list[str]:
    kind = _annotation_at(where)
    return list(kind.model_fields) if hasattr(kind, "model_fields") else []


def _literals_at(where: KeyPath) -> tuple[Any, ...]:
    kind = _annotation_at(where)
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


_TILED = (
    *("modes.*.instruction_*", "kernel.load_bytes_per_cycle", "kernel.block_overhead_cycles"),
    *("kernel.partial_cycles_per_64_bytes", "kernel.tile_*", "kernel.accumulator_capacity_bytes"),
    *(
        "kernel.split_k_max",
        "kernel.fused_rate_fraction",
        "memories.l1.reserved_bytes",
        "memories.l1.input_buffers",
    ),
    *("memories.l1.output_buffers", "memories.l1.fill_bytes_per_cycle"),
    "memories.l1.drain_bytes_per_cycle",
)


def describe(hw: Accelerator) -> list[dict[str, Any]]:
    """Rows of key, value, unit, source and confidence, in the order of the file.

    Keys are paths as the file has them (`memories.l2.capacity_bytes`, `modes[0].macs_per_cycle`).
    """
    rows: list[dict[str, Any]] = []
    for field in type(hw).model_fields:
        if field not in _FIXED:
            _add(rows, field, getattr(hw, field))
    rows.append(_row("transforms", hw.transforms, hw.vector))
    for family in hw.kernels:
        for key, value in family.set.items():
            rows.append(_row(f"kernels.{family.name}.{key}", value, family))
    for variant in hw.variants:
        for key, value in variant.set.items():
            rows.append(_row(f"variant {variant.name}: {key}", value, variant))
    assumed = set(assumed_keys(hw))
    names = {f"modes[{index}].": f"modes.{mode.name}." for index, mode in enumerate(hw.modes)}
    for row in rows:
        number = row["key"].partition(".")[0] + "."
        if row["key"].replace(number, names.get(number, number), 1) in assumed:
            row["confidence"] = ASSUMED
    return rows


def _legible(value: float) -> float:
    """To six digits: a size given in MB is no round number of MiB."""
    return float(f"{value:.6g}")


def overview(
    hw: Accelerator,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """What an architect looks for first: rates per MAC mode, memories, kernel families.

    Rates are of the whole machine in TOPS (2 operations a MAC): the peak, and what compiled kernels
    keep up. A family says which rows stand behind it and how far it is off on them.
    """
    units, memory = hw.units, hw.memories
    assumed = set(assumed_keys(hw))

    def sure(path: str, block: Block) -> str:
        return ASSUMED if path in assumed else block.confidence

    tops = 2e-12 * units.count * units.clock_hz
    rates: list[dict[str, Any]] = [
        {
            "mode": mode.name,
            "activations": mode.activation_bits,
            "weights": mode.weight_bits,
            "kind": mode.kind,
            "macs_per_cycle_per_unit": mode.macs_per_cycle,
            "peak_tops": tops * mode.macs_per_cycle,
            "sustained_tops": tops * mode.sustained_macs_per_cycle,
            "confidence": sure(f"modes.{mode.name}.macs_per_cycle", mode),
        }
        for mode in hw.modes
    ]
    l2_bytes_per_s = memory.l2.bandwidth_bytes_per_cycle * units.clock_hz
    memories: list[dict[str, Any]] = [
        {"what": "units", "value": f"{units.rows} x {units.columns}",
         "from": sure("units.rows", units)},
        {"what": "clock (GHz)", "value": _legible(units.clock_hz / 1e9),
         "from": sure("units.clock_hz", units)},
        {"what": "L1 of a unit (KiB)", "value": _legible(memory.l1.capacity_bytes / 1024),
         "from": sure("memories.l1.capacity_bytes", memory.l1)},
        {"what": "L2 (MiB)", "value": _legible(memory.l2.capacity_bytes / 2**20),
         "from": sure("memories.l2.capacity_bytes", memory.l2)},
        {"what": "L2 (GB/s)", "value": _legible(l2_bytes_per_s / 1e9),
         "from": sure("memories.l2.bandwidth_bytes_per_cycle", memory.l2)},
        {"what": "DRAM (GB/s)", "value": _legible(memory.dram.bandwidth_bytes_per_s / 1e9),
         "from": sure("memories.dram.bandwidth_bytes_per_s", memory.dram)},
        {"what": "dispatch (us)", "value": _legible(hw.dispatch.launch_s * 1e6),
         "from": sure("dispatch.launch_s", hw.dispatch)},
    ]  # fmt: skip
    if hw.energy.tdp_w is not None:
        memories.append({"what": "TDP (W)", "value": hw.energy.tdp_w, "from": "vendor"})
    families: list[dict[str, Any]] = [
        {
            "kernel": family.name,
            "title": family.title,
            "serves": ", ".join(family.serves),
            "rows": family.rows,
            "modes": ", ".join(family.measured_modes or family.modes) or "all",
            "m": _span(family.measured_m),
            "n": _span(family.measured_n),
            "k": _span(family.measured_k),
            "mean_error": family.mean_error,
            "worst_error": family.worst_error,
        }
        for family in hw.kernels
    ]
    return rates, memories, families


def _span(ends: tuple[int, int] | None) -> str:
    return "" if ends is None else f"{ends[0]}-{ends[1]}" if ends[0] < ends[1] else str(ends[0])


def idle_keys(hw: Accelerator) -> dict[str, str]:
    """Keys of `hw` whose value changes no cost and no emulated result, with the reason.

    Keys are those of `with_overrides`: ``modes.int8.accumulator_bits``.
    """
    reasons = {
        "modes.*.accumulator_bits": "for the reader: the emulator takes datapath.acc_bits",
        "energy.tdp_w": "for the reader: the power that a GEMM implies is checked against it",
        "energy.node_nm": "for the reader: says at which node the energies hold; none is rescaled",
    }
    if hw.units.organization == "systolic":
        closed = "not used: a systolic array has a closed form in place of tiles and blocks"
        reasons |= dict.fromkeys(_TILED, closed)
    else:
        if hw.units.organization == "array":
            reasons["kernel.split_k_max"] = "used for a grid only"
        reasons["vector.add_elements_per_cycle"] = "used for a systolic array only"
    if hw.units.organization != "grid":
        reasons["units.power_fraction"] = "used for a grid only"
    kernel = hw.kernel
    if not (kernel.block_overhead_cycles or kernel.partial_cycles_per_64_bytes):
        reasons.setdefault(
            "kernel.tile_k_max", "no effect: slices along K cost nothing, so the shortest is best"
        )
    if kernel.partials == "l1":
        reasons["kernel.accumulator_capacity_bytes"] = "not used: partial sums stay in L1"
    if hw.memories.l1.output_buffers == 2:
        reasons["memories.l1.drain_bytes_per_cycle"] = "not used: two buffers hide the drain"
    if hw.datapath.overflow == "wrap" and hw.datapath.tree_bits is None:
        wraps = "recorded only: sums that wrap are the same in any order"
        reasons |= dict.fromkeys(("datapath.products_per_add", "datapath.accumulators"), wraps)
    for family in hw.kernels:
        if family.attention is not None:
            reasons[f"kernels.{family.name}.*"] = "of attention: layers do not run in it"
    for name, why in unreachable_modes(hw).items():
        reasons[f"modes.{name}.*"] = f"mode {name} is reached by no split: {why}"
    return {
        key: why
        for key in keys_of(hw)
        for pattern, why in reasons.items()
        if fnmatchcase(key, pattern)
    }


def _add(rows: list[dict[str, Any]], path: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, Block):
        for field in type(value).model_fields:
            item = getattr(value, field)
            if isinstance(item, Block):
                # A block inside a block has a source of its own.
                _add(rows, f"{path}.{field}", item)
            elif field not in _ABOUT and item not in (None, ()):
                rows.append(_row(f"{path}.{field}", item, value))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _add(rows, f"{path}[{index}]", item)
    elif isinstance(value, Strict):
        for field in type(value).model_fields:
            _add(rows, f"{path}.{field}", getattr(value, field))


def _row(key: str, value: object, block: Block) -> dict[str, Any]:
    if isinstance(value, tuple):
        value = ", ".join(str(item) for item in value) or "none"
    return {
        "key": key,
        "value": value,
        "unit": unit_of(key),
        "source": block.source,
        "confidence": block.confidence,
    }
