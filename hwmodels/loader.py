"""Read an accelerator file: safe YAML in, a checked `Accelerator` out, errors with file and line.

YAML is composed to nodes (which carry lines) and turned into plain values here, so no tag can
construct an object. Aliases are refused: a few hundred bytes of them expand to gigabytes. So are
control characters, which a terminal would obey, and numbers that no machine has.
"""

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hwmodels.description import Accelerator, Mode
from hwmodels.errors import (
    UNSAFE_CHARACTER,
    AcceleratorError,
    nearest,
    printable,
    read_text,
    worked_out,
)
from hwmodels.families import machine_under, missing_modes
from hwmodels.modes import unreachable_modes
from hwmodels.overrides import (
    KeyPath,
    apply_variant,
    dotted,
    explain_rule,
    keys_of,
    problems_of,
    unknown_assumptions,
)

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["implausible", "list_accelerators", "load_accelerator"]

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "accelerators"
MAX_FILE_BYTES = 64 * 1024
"""Ten times the longest shipped file; the YAML reader takes about a second for 30 KiB."""
MAX_NESTING = 20
MOST_NODES = 5000
MAX_INTEGER = 2**63
_SCALARS = {"null", "bool", "int", "float", "str"}
_TAG = "tag:yaml.org,2002:"
_Lines = dict[KeyPath, int]


def list_accelerators() -> list[str]:
    """Names of the accelerators that ship with the package, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_accelerator(name_or_path: str | Path, variant: str | None = None) -> Accelerator:
    """The accelerator of that shipped name, alias or YAML file, or one of its variants.

    ``"aie2@emulated_int4"`` is short for the variant ``emulated_int4`` of ``aie2``.

    Raises
    ------
    AcceleratorError
        If no such accelerator or file exists, or the file breaks a rule. The message names file,
        line, key path, rule and value, and the nearest valid name.
    """
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml"))
    if "@" in text and not is_path and variant is None:
        text, variant = text.split("@", 1)
    hw = _read(Path(name_or_path)) if is_path else _shipped(text)
    return hw if variant is None else _variant(hw, variant)


def _variant(hw: Accelerator, name: str) -> Accelerator:
    key = ("variant", name)
    if key not in hw._cache:
        hw._cache[key] = apply_variant(hw, name)
    variant: Accelerator = hw._cache[key]
    return variant


def _shipped(text: str) -> Accelerator:
    name = text.lower()
    # The file's own name first: aliases stand in the files, and reading all of them takes a second.
    if name in list_accelerators():
        return _read_shipped(name)
    names = _shipped_names()
    if name in names:
        return _read_shipped(names[name])
    raise AcceleratorError(
        f"unknown accelerator {text!r:.100}; {nearest(text, names)}; or give a path to a .yaml file"
    )


@lru_cache(maxsize=1)
def _shipped_names() -> dict[str, str]:
    names = {name: name for name in list_accelerators()}
    for name in list(names):
        names.update(dict.fromkeys(_read_shipped(name).aliases, name))
    return names


@lru_cache(maxsize=64)
def _read_shipped(name: str) -> Accelerator:
    return _read(SHIPPED / f"{name}.yaml")


def _read(path: Path) -> Accelerator:
    text = read_text(path, "accelerator file", MAX_FILE_BYTES)
    lines: _Lines = {}
    content = _compose(path, text, lines)
    if not isinstance(content, dict):
        raise AcceleratorError(f"{path}:1: an accelerator file must be a mapping of keys to values")

    _refuse_two_energies(path, content, lines)
    try:
        hw = Accelerator.model_validate(content)
    except ValidationError as error:
        raise AcceleratorError(_explain(path, error, lines)) from None
    if wrong := _wrong_changes(hw, lines):
        raise AcceleratorError(_listed(path, wrong))
    for index, family in enumerate(hw.kernels):
        line = lines[("kernels", index)]
        if missing := missing_modes(hw, family):
            logger.warning(
                "%s:%d: kernels.%s speaks of modes that %s has not: %s",
                path, line, family.name, hw.name, ", ".join(missing),
            )  # fmt: skip
    for name, why in unreachable_modes(hw).items():
        index = [mode.name for mode in hw.modes].index(name)
        logger.warning(
            "%s:%d: mode %s is reached by no split: %s", path, lines[("modes", index)], name, why
        )
    for key, text in implausible(hw):
        logger.warning("%s:%d: %s", path, _line_of(key, hw, lines), text)
    return hw


_SLOW_HZ, _FAST_HZ = 2e7, 6e9
_FEW_MACS, _MANY_MACS = 1, 2e4  # For a byte from DRAM, in the fastest mode: 16 to 2,400 as shipped.
_MOST_W = 2000.0


def implausible(hw: Accelerator) -> list[tuple[str, str]]:
    """(key path, sentence) of what is possible by the rules of a file, but hardly meant.

    Clocks of few MHz or many GHz; memories that are slower, or cost more, than those behind them;
    MACs of wider operands that are faster, or cost less, than those of narrower ones; a balance of
    MACs and DRAM, or a power, that no machine has.
    """
    clock, memory, found = hw.units.clock_hz, hw.memories, []
    if not _SLOW_HZ <= clock <= _FAST_HZ:
        found.append(("units.clock_hz", f"a clock of {clock / 1e6:,g} MHz is unusual"))
    dram = memory.dram.sustained_bytes_per_s
    shared = memory.l2.bandwidth_bytes_per_cycle * clock
    channels = 2 if memory.l1.fill_channels == "separate" else 1
    filled = channels * memory.l1.fill_bytes_per_cycle * clock * hw.units.vector_units
    key = "memories.dram.bandwidth_bytes_per_s"
    if dram > shared:
        found.append((key, f"DRAM ({_rate(dram)}) is faster than L2 ({_rate(shared)})"))
    if hw.units.organization != "systolic" and dram > filled:
        text = f"DRAM ({_rate(dram)}) is faster than all units can fill their L1 ({_rate(filled)})"
        found.append((key, text))
    energy = hw.energy
    if not energy.l1_pj_per_byte <= energy.l2_pj_per_byte <= energy.dram_pj_per_byte:
        text = (
            "a byte of a larger memory takes less energy than one of a smaller: L1, L2, DRAM are "
        )
        costs = (energy.l1_pj_per_byte, energy.l2_pj_per_byte, energy.dram_pj_per_byte)
        found.append(("energy", text + ", ".join(f"{cost:g} pJ" for cost in costs)))
    peak = max(mode.macs_per_cycle for mode in hw.modes) * clock * hw.units.count
    if not _FEW_MACS <= peak / dram <= _MANY_MACS:
        text = f"{peak / dram:,.3g} MACs at peak for each byte from DRAM are unusual"
        found.append((key, f"{text} ({2e-12 * peak:,.3g} TOPS, {_rate(dram)})"))
    return found + [item for mode in hw.modes for item in _odd_mode(hw, mode)]


def _odd_mode(hw: Accelerator, mode: Mode) -> list[tuple[str, str]]:
    key, found = f"modes.{mode.name}", []
    energy = mode.energy_pj_per_mac or 0.0
    power_w = energy * 1e-12 * mode.macs_per_cycle * hw.units.clock_hz * hw.units.count
    if power_w > _MOST_W:
        found.append((f"{key}.energy_pj_per_mac", f"its MACs at peak take {power_w:,.0f} W"))
    for other in hw.modes:
        widths = mode.activation_bits, mode.weight_bits
        narrow = other.activation_bits, other.weight_bits
        is_wider = widths[0] >= narrow[0] and widths[1] >= narrow[1] and widths != narrow
        if mode.kind != other.kind or not is_wider:
            continue
        if mode.macs_per_cycle > other.macs_per_cycle:
            text = f"it is wider and yet faster than {other.name}"
            found.append((f"{key}.macs_per_cycle", text))
        if energy < (other.energy_pj_per_mac or 0.0):
            text = f"it is wider and yet takes less energy than {other.name}"
            found.append((f"{key}.energy_pj_per_mac", text))
    return [(where, f"mode {mode.name}: {text}") for where, text in found]


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:,.3g} GB/s"


def _line_of(key: str, hw: Accelerator, lines: _Lines) -> int:
    where = keys_of(hw).get(key, (key,))
    return next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), 1)


def _refuse_two_energies(path: Path, content: dict[str, Any], lines: _Lines) -> None:
    """With an array from synthesis, an integer mode that also states its energy says two things."""
    modes = content.get("modes")
    if not isinstance(content.get("array"), dict) or not isinstance(modes, tuple):
        return
    for index, mode in enumerate(modes):
        if isinstance(mode, dict) and mode.get("kind") == "int" and "energy_pj_per_mac" in mode:
            line = lines[("modes", index, "energy_pj_per_mac")]
            name = f"modes.{mode.get('name', index)!s:.40}"
            raise AcceleratorError(
                f"{path}:{line}: {name}.energy_pj_per_mac comes from synthesis, as `array` says; "
                "leave one of the two out"
            )


def _wrong_changes(hw: Accelerator, lines: _Lines) -> list[tuple[int, str]]:
    """What is wrong, by line, with values that variants and families set, and with `assumed`."""
    line = lines.get(("assumed",), 1)
    wrong = [(line, problem) for problem in unknown_assumptions(hw)]
    for index, variant in enumerate(hw.variants):
        try:
            apply_variant(hw, variant.name)
        except AcceleratorError as error:
            wrong.append((lines[("variants", index)], f"variant {variant.name!r}: {error}"))
    for index, family in enumerate(hw.kernels):
        try:
            machine_under(hw, family)
        except AcceleratorError as error:
            wrong.append((lines[("kernels", index)], f"kernels.{family.name}: {error}"))
    return wrong


def _compose(path: Path, text: str, lines: _Lines) -> Any:
    return composed(path, text, lambda node: _to_value(path, node, (), lines, set()))


def composed(path: Path, text: str, of: Callable[[Any], Any]) -> Any:
    """What `of` makes of the nodes of a YAML text; None of an empty one.

    Nothing in it is built or run: nodes are tags and texts.

    Raises
    ------
    AcceleratorError
        If the text is no YAML, or `of` raises it; with file and line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    _refuse_deep(path, text)
    try:
        with warnings.catch_warnings():
            # Of anchors that are there twice: aliases are refused below, with their line.
            warnings.simplefilter("ignore")
            node = YAML(typ="safe", pure=True).compose(text)
        return None if node is None else of(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = printable(str(error.problem))
        raise AcceleratorError(f"{path}:{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise AcceleratorError(f"{path}: nested too deeply for an accelerator file") from None
    except AcceleratorError:
        raise
    except Exception as error:
        # ruamel.yaml raises half a dozen other types too, such as OverflowError for "\\UFFFFFFFF".
        what = "" if isinstance(error, YAMLError) else f"{type(error).__name__}: "
        problem = printable((str(error).splitlines() or [""])[0])
        raise AcceleratorError(f"{path}: not valid YAML: {what}{problem}") from None


class PlainValues:
    """Plain values of YAML nodes; a tag becomes the key ``!`` of its mapping."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def of(self, node: Any) -> Any:
        """The value of a node. Aliases are written out, up to `MOST_NODES` nodes."""
        self.count += 1
        where = f"{self.path}:{node.start_mark.line + 1}"
        if self.count > MOST_NODES:
            raise AcceleratorError(f"{where}: more than {MOST_NODES} values, with aliases")
        tag = str(node.tag)
        if isinstance(node.value, str):
            if UNSAFE_CHARACTER.search(node.value):
                raise AcceleratorError(f"{where}: control character in a text")
            number = worked_out(node.value) if tag.endswith((":int", ":float")) else None
            is_whole = tag.endswith(":int") and number is not None and math.isfinite(number)
            return int(number or 0) if is_whole else node.value if number is None else number
        if not all(isinstance(item, tuple) for item in node.value):
            return [self.of(item) for item in node.value]
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, value = key_node.value, self.of(value_node)
            if not isinstance(key, str) or not key.isprintable():
                raise AcceleratorError(f"{where}: keys must be plain names")
            if key in found:
                raise AcceleratorError(f"{where}: duplicate key {printable(key, 60)!r}; keep one")
            if key == "<<":
                several = value if isinstance(value, list) else [value]
                merged = {k: v for one in several if isinstance(one, dict) for k, v in one.items()}
            else:
                found[key] = value
        own = {} if tag.startswith("tag:yaml.org") else {"!": printable(tag.lstrip("!"), 40)}
        return {**merged, **own, **found}


def items_of(value: Any) -> list[tuple[str, Any]]:
    """Keys and values of a mapping; nothing of anything else."""
    return list(value.items()) if isinstance(value, Mapping) else []


def list_of(value: Any) -> list[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def named_place(place: str, node: Mapping[str, Any]) -> tuple[str, int]:
    """Key path of a node, and how many ``PE[0..167]`` are."""
    name = str(node.get("name", ""))
    found = re.fullmatch(r"(.*?)\[(\d{1,7})\.\.(\d{1,7})\]", name)
    label, many = (found[1], int(found[3]) - int(found[2]) + 1) if found else (name, 1)
    return f"{place}.{printable(label, 60)}" if name else place, max(1, many)


def leaves_of(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(key path, value) of all that a file says; nodes of lists go by their names."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key != "!" and not (key == "name" and place):
                is_level = key in ("nodes", "subtree", "local") and isinstance(value, list)
                yield from leaves_of(value, place if is_level else f"{place}.{key}".lstrip("."))
    elif any(isinstance(item, Mapping) for item in list_of(content)):
        for index, item in enumerate(content):
            is_node = isinstance(item, Mapping)
            where = named_place(place, item)[0] if is_node else f"{place}[{index}]"
            yield from leaves_of(item, where)
    else:
        yield printable(place, 200), printable(str(content), 60)


def foreign_content(path: Path) -> Any:
    """Plain values of another tool's YAML file; of a template, where to find what it makes."""
    text = read_text(path, "hardware file", MAX_FILE_BYTES)
    if template := re.search(r"\{\{|\{%", text):
        line = text.count("\n", 0, template.start()) + 1
        raise AcceleratorError(
            f"{path}:{line}: a Jinja template, as CiMLoop and Timeloop have them; read what their "
            "run makes of it, parsed-processed-input.yaml"
        )
    return composed(path, text, PlainValues(path).of)


def file_beside(path: Path, ref: str) -> Any:
    """What the file of a core says: beside `path` or in a folder there, nowhere else."""
    folder = path.parent.resolve()
    for place in (folder / ref, folder / "cores" / ref):
        if place.is_file() and folder in place.resolve().parents:
            core = foreign_content(place)
            return core if isinstance(core, Mapping) else {}
    raise AcceleratorError(f"{path}: core {printable(ref, 60)!r} is no file in its folder")


def value_at(block: Any, key: str) -> Any:
    """What a mapping has at `key`; None of anything else."""
    return block.get(key) if isinstance(block, Mapping) else None


def word_at(node: Any, key: str) -> str:
    """Its text there in small letters, or an empty one."""
    return str(node.get(key, "")).lower() if isinstance(node, Mapping) else ""


def _refuse_deep(path: Path, text: str) -> None:
    """Refuse brackets nested beyond `MAX_NESTING`: the YAML reader takes minutes for thousands."""
    depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        depth += sum(line.count(c) for c in "[{") - sum(line.count(c) for c in "]}")
        if depth > MAX_NESTING or line.count("[") + line.count("{") > 10 * MAX_NESTING:
            raise AcceleratorError(f"{path}:{number}: nested too deeply for an accelerator file")


def _to_value(path: Path, node: Any, where: KeyPath, lines: _Lines, seen: set[int]) -> Any:
    """Plain Python value of a YAML node; `lines` gets the 1-based line of every key path."""
    line = node.start_mark.line + 1
    lines.setdefault(where, line)
    if id(node) in seen:
        raise AcceleratorError(
            f"{path}:{line}: aliases (&name, *name) are not allowed; write the value again"
        )
    seen.add(id(node))
    kind = str(node.tag).removeprefix(_TAG)
    if kind == "map":
        return _to_mapping(path, node, where, lines, seen)
    if kind == "seq":
        items = enumerate(node.value)
        return tuple(_to_value(path, item, (*where, i), lines, seen) for i, item in items)
    if kind in _SCALARS:
        return _to_scalar(path, node, kind, line)
    raise AcceleratorError(
        f"{path}:{line}: YAML tag {printable(str(node.tag), 80)} is not allowed; use plain values"
    )


def _to_mapping(
    path: Path, node: Any, where: KeyPath, lines: _Lines, seen: set[int]
) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key, str) or key == "<<" or not key.isprintable():
            raise AcceleratorError(f"{path}:{line}: keys must be plain names, not {key!r:.60}")
        if key in mapping:
            shown = printable(dotted((*where, key)), 80)
            raise AcceleratorError(f"{path}:{line}: duplicate key {shown!r}; keep one")
        lines[(*where, key)] = line
        mapping[key] = _to_value(path, value_node, (*where, key), lines, seen)
    return mapping


def _to_scalar(path: Path, node: Any, kind: str, line: int) -> Any:
    text = node.value
    try:
        if kind == "int":
            value = int(text.replace("_", ""), 0)
            # Python refuses to print integers of thousands of digits, so none may get further.
            if abs(value) >= MAX_INTEGER:
                raise AcceleratorError(f"{path}:{line}: {text:.40} is no size of a machine")
            return value
        if kind == "float":
            return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:
        if isinstance(error, AcceleratorError):
            raise
        raise AcceleratorError(f"{path}:{line}: {text!r:.60} is not a number") from None
    if found := UNSAFE_CHARACTER.search(text):
        raise AcceleratorError(f"{path}:{line}: control character {found[0]!r} in a text")
    if kind == "bool":
        return text.lower() == "true"
    return None if kind == "null" else text


_MOST_TOLD = 12


def _explain(path: Path, error: "ValidationError", lines: _Lines) -> str:
    """All broken rules, each with its line, on one line."""
    told = []
    for problem in problems_of(error):
        known = tuple(problem["loc"])
        while known not in lines and known:
            known = known[:-1]
        told.append((lines.get(known, 1), explain_rule(problem)))
    return _listed(path, told)


def _listed(path: Path, told: list[tuple[int, str]]) -> str:
    """Problems by line: the first as ``file:line: problem``, the others after it."""
    (line, first), *others = told
    more = "".join(f"; line {number}: {text}" for number, text in others[: _MOST_TOLD - 1])
    n_left = len(told) - _MOST_TOLD
    return f"{path}:{line}: {first}{more}{f'; and {n_left} more problems' * (n_left > 0)}"
