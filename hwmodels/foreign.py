"""Hardware files of other tools as a starting machine: Timeloop, ZigZag and their kin.

Those tools describe a tree of memories over an array of multipliers. What that says of a machine
here becomes a sketch with its energies; what has no counterpart is listed, all else is assumed.
Nothing in a file is run: tags are data, and of expressions only sums and products are worked out.

    ZigZag       ``operational_array`` and ``memories``; bits, bits a cycle, pJ an access
    Stream       ``cores``: files of such arrays and memories, and which of them is off the chip
    Timeloop     ``architecture``: ``nodes`` (0.4) or ``subtree`` and ``local`` (0.2, 0.3); words
    Accelergy    ``flattened_architecture``: components without a tree
    AccelForge   ``arch``: ``nodes``; bits, J a bit, s a bit or bits a second
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError, printable, quantity_text, worked_out
from hwmodels.loader import (
    file_beside,
    foreign_content,
    items_of,
    leaves_of,
    list_of,
    named_place,
    value_at,
    word_at,
)
from hwmodels.overrides import with_overrides
from hwmodels.sketching import near_square, sketch, sourced

__all__ = ["ForeignMachine", "read_foreign"]

_MOST_UNITS = 2**24
_LEAST_L1 = 1024
_NOT_TAKEN = "not taken"
_OFF_CHIP = ("offchip_core_id", "graph.offchip_core_id", "bus.offchip_core_id")
_MAC = r"mac|compute|multiplier"
_RATES = ("shared_bandwidth", "read_bandwidth", "bandwidth")
_DEPTHS = ("depth", "memory_depth", "entries", "sizeKB")
_IS_DRAM = re.compile(r"dram|hbm|ddr|main_?mem|off_?chip|backing", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ForeignMachine:
    """A machine read from another tool's file, and what became of each key of the file.

    Attributes
    ----------
    dialect : str
        ``ZigZag``, ``Stream``, ``Timeloop``, ``Accelergy`` or ``AccelForge``.
    machine : Accelerator
        A sketch; what the file does not say is assumed.
    keys : tuple of dict
        ``key`` and ``value`` of the file, and what it ``becomes``.
    """

    dialect: str
    machine: Accelerator
    keys: tuple[dict[str, Any], ...]


@dataclass(kw_only=True)
class _Memory:
    """A memory of the tree. Rates are of one instance; the `_key`s say where a number stands."""

    name: str
    instances: int = 1
    is_dram: bool = False
    size_bits: float = 0.0
    size_key: str = ""
    bits_per_cycle: float = 0.0
    bits_per_s: float = 0.0
    rate_key: str = ""
    pj_per_bit: float = 0.0
    energy_key: str = ""


@dataclass(kw_only=True)
class _Tree:
    """What a file says, in one form for all dialects; memories from the outermost inwards."""

    path: Path
    dialect: str
    name: str | None = None
    memories: list[_Memory] = field(default_factory=list)
    rows: int = 1
    columns: int = 1
    macs_per_unit: int = 1
    bits: tuple[int, int] = (8, 8)
    is_float: bool = False
    clock_hz: float = 0.0
    node_nm: int = 0
    pj_per_mac: float = 0.0
    mac_key: str = ""
    taken: dict[str, str] = field(default_factory=dict)

    def number(self, block: Any, *names: str) -> float:
        """The first of `names` in `block` that is a size; 0.0 where none is (infinite, a word)."""
        for name in names:
            found = worked_out(block.get(name)) if isinstance(block, Mapping) else None
            if found is not None and found < 0:
                raise AcceleratorError(f"{self.path}: {name} must not be negative, got {found:g}")
            if found and math.isfinite(found):
                return found
        return 0.0

    def whole(self, place: str, value: Any) -> int:
        """The count that `value` is."""
        found = worked_out(value)
        if found is None or not 1 <= found <= _MOST_UNITS or found != int(found):
            shown = printable(str(value), 40)
            raise AcceleratorError(
                f"{self.path}: {place} must be a whole number from 1 to {_MOST_UNITS}, got {shown}"
            )
        return int(found)


def read_foreign(path: str | Path, name: str | None = None, **given: Any) -> ForeignMachine:
    """The machine that a hardware file of ZigZag, Stream, Timeloop, Accelergy or AccelForge says.

    Parameters
    ----------
    path : str or path-like
        The YAML file.
    name : str, optional
        What to call the machine. Default: as in the file, else as the file.
    **given
        Arguments of `hwmodels.sketch` that stand over what the file says, such as ``clock``, which
        files of ZigZag do not have.

    Raises
    ------
    AcceleratorError
        If the file is none of these, is damaged, or describes no array.
    """
    path = Path(path)
    content = foreign_content(path)
    readers = {
        **{"operational_array": _zigzag, "cores": _stream, "flattened_architecture": _accelergy},
        **{"architecture": _timeloop, "arch": _accelforge},
    }
    found = [key for key in readers if isinstance(content, Mapping) and key in content]
    if not found:
        raise AcceleratorError(
            f"{path}: no hardware file: want operational_array (ZigZag), cores (Stream), "
            "architecture (Timeloop), flattened_architecture (Accelergy) or arch (AccelForge) at "
            "the top"
        )
    tree = readers[found[0]](path, content)
    return _as_machine(tree, content, name, given)


def _zigzag(path: Path, content: Mapping[str, Any]) -> _Tree:
    tree = _Tree(path=path, dialect="ZigZag")
    tree.name = content["name"] if isinstance(content.get("name"), str) else None
    place = "operational_array"
    array: Any = content[place]
    if not isinstance(array, Mapping) or not list_of(array.get("sizes")):
        raise AcceleratorError(f"{path}: {place}.sizes must be a list of sizes")
    sizes = [tree.whole(f"{place}.sizes", size) for size in array["sizes"]]
    names = list_of(array.get("dimensions"))
    tree.rows, tree.columns = sizes[0], sizes[1] if len(sizes) > 1 else 1
    tree.macs_per_unit = math.prod(sizes[2:])
    inside = f" of {tree.macs_per_unit} MACs" if tree.macs_per_unit > 1 else ""
    tree.taken[f"{place}.sizes"] = f"{tree.rows} x {tree.columns} units{inside}"
    tree.taken[f"{place}.dimensions"] = "names of the sizes"
    if len(bits := list_of(array.get("input_precision"))) == 2:
        tree.bits = (tree.whole(f"{place}.input_precision", bits[0]), tree.whole(place, bits[1]))
        tree.taken[f"{place}.input_precision"] = "bits of the MAC mode"
    tree.pj_per_mac, tree.mac_key = tree.number(array, "unit_energy"), f"{place}.unit_energy"
    memories = content.get("memories")
    for name, found in (memories if isinstance(memories, Mapping) else {}).items():
        memory = _Memory(name=str(name), size_key=f"memories.{name}.size")
        served = list_of(found.get("served_dimensions")) if isinstance(found, Mapping) else []
        tree.taken[f"memories.{name}.served_dimensions"] = "how many there are of it"
        left = [s for dim, s in zip(names, sizes, strict=False) if dim not in served]
        memory.instances = math.prod(left)
        memory.size_bits = tree.number(found, "size")
        ports = list_of(found.get("ports")) if isinstance(found, Mapping) else []
        wide = [tree.number(p, "bandwidth_max") for p in ports if word_at(p, "type") != "write"]
        memory.bits_per_cycle = max([tree.number(found, "r_bw"), *wide])
        memory.rate_key = f"memories.{name}.{'ports' if any(wide) else 'r_bw'}"
        memory.pj_per_bit = tree.number(found, "r_cost") / (memory.bits_per_cycle or math.inf)
        memory.energy_key = f"memories.{name}.r_cost"
        tree.memories.insert(0, memory)
    shared = [memory for memory in tree.memories if memory.instances == 1]
    named = [memory for memory in shared if _IS_DRAM.search(memory.name)]
    for memory in named[:1] or (shared[:1] if len(shared) > 1 else []):
        memory.is_dram = True
    return tree


def _stream(path: Path, content: dict[str, Any]) -> _Tree:
    """Cores, each a file of ZigZag: the kind with most MACs is the array, a core of it a unit."""
    listed = content["cores"]
    named = items_of(listed) or [(str(i), ref) for i, ref in enumerate(list_of(listed))]
    refs = {number: str(ref) for number, ref in named}
    kinds = {ref: file_beside(path, ref) for ref in sorted(set(refs.values()))}
    content["cores"] = {Path(ref).stem: core for ref, core in kinds.items()}
    graph = content.get("graph", content.get("bus", content))
    far = refs.get(str(value_at(graph, "offchip_core_id") or 0))
    macs = {}
    for ref, core in kinds.items():
        sizes = list_of(value_at(core.get("operational_array"), "sizes"))
        macs[ref] = math.prod(int(worked_out(size) or 0) for size in sizes) if sizes else 0
    count = Counter(refs.values())
    array = max(macs, key=lambda ref: macs[ref] * count[ref], default="")
    if not macs.get(array):
        raise AcceleratorError(f"{path}: no core has an operational_array with sizes of MACs")
    tree, here, n_units = _zigzag(path, kinds[array]), f"cores.{Path(array).stem}.", count[array]
    tree.dialect, tree.name, tree.mac_key = (
        "Stream",
        str(content.get("name", path.stem)),
        here + tree.mac_key,
    )
    tree.taken = {here + key: told for key, told in tree.taken.items()}
    for memory in tree.memories:
        memory.is_dram, memory.instances = False, memory.instances * n_units
        for key in ("size_key", "rate_key", "energy_key"):
            setattr(memory, key, here + getattr(memory, key))
    tree.taken |= dict.fromkeys(_OFF_CHIP, "which core is DRAM")
    if n_units > 1:
        places = items_of(content.get("core_coordinates"))
        at = {n: list_of(place) for n, place in places if refs.get(n) == array}
        columns, rows = (len({str(place[i : i + 1]) for place in at.values()}) for i in (0, 1))
        is_grid = rows * columns == n_units
        tree.taken |= {f"core_coordinates.{n}": "rows and columns" for n in at if is_grid}
        tree.rows, tree.columns = (rows, columns) if is_grid else near_square(n_units)
        tree.macs_per_unit = macs[array]
        told = f"{tree.rows} x {tree.columns} units{'' if is_grid else ': assumed'}"
        tree.taken[f"{here}operational_array.sizes"] = f"{told}, of {macs[array]} MACs"
    for ref in (ref for ref in kinds if ref == far or not macs[ref]):
        many, place = 1 if ref == far else count[ref], f"cores.{Path(ref).stem}"
        for name, found in [*items_of(kinds[ref].get("memories")), ("", kinds[ref].get("memory"))]:
            where = f"{place}.memories.{name}" if name else f"{place}.memory"
            ports = [tree.number(p, "bandwidth_max") for p in list_of(value_at(found, "ports"))]
            rate = max([tree.number(found, "r_bw", "bandwidth_max"), *ports])
            memory = _Memory(name=name, is_dram=ref == far, energy_key=f"{where}.r_cost")
            memory.size_bits = many * tree.number(found, "size", "capacity")
            memory.bits_per_cycle = many * rate
            memory.pj_per_bit = tree.number(found, "r_cost") / (rate or math.inf)
            memory.size_key = f"{where}.{'size' if name else 'capacity'}"
            told = "ports" if any(ports) else "r_bw" if name else "bandwidth_max"
            memory.rate_key = f"{where}.{told}"
            if many > 1:
                tree.taken |= dict.fromkeys((memory.size_key, memory.rate_key), f"{many} together")
            tree.memories.insert(0, memory)
    return tree


def _accelergy(path: Path, content: Mapping[str, Any]) -> _Tree:
    """Components without a tree; how many there are stands in their names, ``PE[0..167].mac``."""
    parts = value_at(content["flattened_architecture"], "components")
    named = items_of(parts) or [(str(value_at(one, "name")), one) for one in list_of(parts)]
    nodes = []
    for name, node in named:
        about = value_at(node, "attributes")
        spans = re.findall(r"\[(\d{1,7})\.\.(\d{1,7})\]", name)
        many = math.prod(max(1, int(b) - int(a) + 1) for a, b in spans)
        is_mac = bool(re.search(_MAC, kind := word_at(node, "class")))
        if isinstance(about, Mapping) and (is_mac or set(about) & set(_DEPTHS)):
            inside = {"attributes": {**about, "instances": many}, "class": kind, "name": name}
            nodes.append((is_mac, many, inside))
    ordered = [node for *_, node in sorted(nodes, key=lambda one: one[:2])]
    tree = _timeloop(path, {"architecture": {"nodes": ordered}})
    tree.dialect = "Accelergy"
    for memory in tree.memories:
        memory.size_key, memory.rate_key = (_flat(k) for k in (memory.size_key, memory.rate_key))
    tree.taken = {_flat(key): told for key, told in tree.taken.items()}
    return tree


def _flat(key: str) -> str:
    return key and f"flattened_architecture.components.{key.removeprefix('architecture.')}"


def _timeloop(path: Path, content: Mapping[str, Any]) -> _Tree:
    tree = _Tree(path=path, dialect="Timeloop")
    meshes: list[tuple[str, int, int]] = []
    for place, node, named in _timeloop_nodes(content["architecture"], "architecture", 0):
        about = node.get("attributes")
        about = about if isinstance(about, Mapping) else {}
        _timeloop_globals(tree, place, about)
        mesh: Any = node.get("spatial") if isinstance(node.get("spatial"), Mapping) else about
        x, y = (tree.whole(f"{place}.{s}", mesh.get(s, 1)) for s in ("meshX", "meshY"))
        many = max(tree.whole(f"{place}.instances", about.get("instances", 1)), named, x * y)
        bits = next((about[k] for k in ("datawidth", "word-bits", "word_bits") if k in about), 8)
        kind = word_at(node, "class")
        if re.search(_MAC, kind):
            tree.bits = (tree.whole(f"{place}.datawidth", bits),) * 2
            tree.is_float = "fp" in kind or "float" in kind
            tree.taken[f"{place}.attributes.datawidth"] = "bits of the MAC mode"
            _lay_out(tree, meshes, many, place)
            return tree
        if kind:
            memory = _timeloop_memory(tree, place, node, about, worked_out(bits) or 8.0)
            memory.instances = math.prod(x * y for _, x, y in meshes) * many
            tree.memories.append(memory)
        elif many > 1:
            meshes.append((place, *((x, y) if x * y == many else (many, 1))))
    raise AcceleratorError(f"{path}: architecture has no node whose class is intmac, mac or fpmac")


def _timeloop_globals(tree: _Tree, place: str, about: Mapping[str, Any]) -> None:
    if seconds := tree.number(about, "global_cycle_seconds"):
        tree.clock_hz = 1 / seconds
        tree.taken[f"{place}.attributes.global_cycle_seconds"] = "units.clock_hz"
    if node := re.fullmatch(r"([1-9]\d{0,2}) ?nm", str(about.get("technology", "")).strip()):
        tree.node_nm = int(node[1])
        tree.taken[f"{place}.attributes.technology"] = "energy.node_nm"


def _timeloop_memory(
    tree: _Tree, place: str, node: Mapping[str, Any], about: Mapping[str, Any], word_bits: float
) -> _Memory:
    """Rows of `width` bits; bandwidths are in words a cycle."""
    memory = _Memory(name=str(node.get("name", "")), is_dram="dram" in word_at(node, "class"))
    depth = tree.number(about, "depth", "memory_depth", "entries")
    width = tree.number(about, "width", "memory_width")
    memory.size_bits = depth * width or tree.number(about, "sizeKB") * 8192
    memory.bits_per_cycle = word_bits * tree.number(about, *_RATES)
    for key in about:
        if re.fullmatch(r"(memory_)?depth|entries|sizeKB", key) and memory.size_bits:
            memory.size_key = memory.size_key or f"{place}.attributes.{key}"
        if key in ("width", "memory_width") and depth:
            tree.taken[f"{place}.attributes.{key}"] = "bits of a row"
        if key in ("datawidth", "word-bits", "word_bits"):
            tree.taken[f"{place}.attributes.{key}"] = "bits of a word"
        if key in _RATES:
            memory.rate_key = memory.rate_key or f"{place}.attributes.{key}"
    return memory


def _timeloop_nodes(
    block: Any, place: str, depth: int
) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """(key path, node, how many by its name) from the outside inwards."""
    inner = [n for key in ("nodes", "local", "subtree") for n in list_of(value_at(block, key))]
    for node in inner if depth < 50 else []:
        if isinstance(node, Mapping):
            where, many = named_place(place, node)
            if "name" in node:
                yield where, node, many
            yield from _timeloop_nodes(node, where, depth + 1)


def _lay_out(tree: _Tree, meshes: list[tuple[str, int, int]], n_macs: int, place: str) -> None:
    """Units of meshes: X is columns, Y rows; a mere count as near a square as it goes."""
    tree.rows = math.prod(y for _, _, y in meshes)
    tree.columns = math.prod(x for _, x, _ in meshes) if meshes else n_macs
    tree.macs_per_unit = n_macs if meshes else 1
    told = "units.rows and units.columns"
    if tree.rows == 1 and (total := tree.columns) > 1:
        tree.rows, tree.columns = near_square(total)
        told = f"{total} units, laid out as {tree.rows} x {tree.columns}: assumed"
    for where, _, _ in meshes or [(place, 1, 1)]:
        tree.taken[where] = told


def _accelforge(path: Path, content: Mapping[str, Any]) -> _Tree:
    tree = _Tree(path=path, dialect="AccelForge")
    fanouts: list[int] = []
    compute: tuple[str, Mapping[str, Any], int] | None = None
    for node in list_of(value_at(content["arch"], "nodes")):
        if not isinstance(node, Mapping):
            continue
        place, _ = named_place("arch", node)
        spatial = [one for one in list_of(node.get("spatial")) if isinstance(one, Mapping)]
        own = [tree.whole(f"{place}.fanout", one["fanout"]) for one in spatial if "fanout" in one]
        fanouts += own
        if own:
            tree.taken[f"{place}.spatial"] = "units.rows and units.columns"
        actions = {
            one["name"]: one
            for one in list_of(node.get("actions"))
            if isinstance(one, Mapping) and isinstance(one.get("name"), str)
        }
        if word_at(node, "!") == "compute":
            # Scalar units may stand further out than the array.
            if compute is None or len(fanouts) >= compute[2]:
                compute = f"{place}.actions.compute", actions.get("compute", {}), len(fanouts)
        elif word_at(node, "!") == "memory":
            read = actions.get("read", {})
            bits = tree.number(read, "bits_per_action") or 1.0
            seconds = tree.number(read, "latency")
            memory = _Memory(name=place, instances=math.prod(fanouts), is_dram=not tree.memories)
            memory.size_bits, memory.size_key = tree.number(node, "size"), f"{place}.size"
            memory.pj_per_bit = tree.number(read, "energy") * 1e12 / bits
            memory.bits_per_s = bits / seconds if seconds else tree.number(read, "throughput")
            memory.rate_key = f"{place}.actions.read.{'latency' if seconds else 'throughput'}"
            memory.energy_key = f"{place}.actions.read.energy"
            tree.memories.append(memory)
    if compute is None:
        raise AcceleratorError(f"{path}: arch.nodes has no !Compute")
    # Clusters of arrays stand outside: more rows.
    sizes = [1, 1, *fanouts[: compute[2]]]
    tree.rows, tree.columns = math.prod(sizes[:-1]), sizes[-1]
    place, action, _ = compute
    tree.pj_per_mac, tree.mac_key = tree.number(action, "energy") * 1e12, f"{place}.energy"
    seconds = tree.number(action, "latency")
    tree.clock_hz = 1 / seconds if seconds else tree.number(action, "throughput")
    if tree.clock_hz:
        tree.taken[f"{place}.{'latency' if seconds else 'throughput'}"] = "units.clock_hz"
    return tree


def _as_machine(
    tree: _Tree, content: Any, name: str | None, given: Mapping[str, Any]
) -> ForeignMachine:
    called = re.sub(r"[^a-z0-9_.-]+", "_", (name or tree.name or tree.path.stem).lower())
    is_systolic = tree.macs_per_unit == 1
    arguments: dict[str, Any] = {"organization": "systolic" if is_systolic else "array"}
    arguments |= {"rows": tree.rows, "columns": tree.columns, "modes": _mode(tree, is_systolic)}
    arguments |= {"clock": tree.clock_hz} if tree.clock_hz else {}
    arguments |= {"node": tree.node_nm} if tree.node_nm else {}
    asked = {key: value for key, value in given.items() if value is not None}
    base = sketch(called.strip("_.-")[:60] or "my_npu", **{**arguments, **asked})
    changes = _changes(tree, base, asked)
    machine = sourced(
        with_overrides(base, changes) if changes else base, tree.path.name, tree.dialect, changes
    )
    keys = tuple(
        {"key": key, "value": value, "becomes": _becomes(tree, key)}
        for key, value in leaves_of(content)
    )
    return ForeignMachine(dialect=tree.dialect, machine=machine, keys=keys)


def _mode(tree: _Tree, is_systolic: bool) -> str:
    low, high = sorted(tree.bits)
    name = f"int{high}" if low == high else f"int{low}x{high}"
    if tree.is_float:
        name = "fp8" if high <= 8 else "bf16"
    return name if is_systolic else f"{name}={tree.macs_per_unit}"


def _changes(tree: _Tree, base: Accelerator, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of memories and MACs that a sketch has no argument for, by key path."""
    changes: dict[str, Any] = {}
    clock = base.units.clock_hz
    is_known = tree.clock_hz or "clock" in asked
    at = "" if is_known else f" at the assumed {quantity_text('clock_hz', clock)}"

    def put(key: str, value: float, of: str, note: str = "") -> None:
        if value and of:
            changes[key] = int(value) if value == int(value) else value
            told = f"{tree.taken[of]}; {key}" if of in tree.taken else key
            tree.taken[of] = f"{told}{note}"

    shared = [m for m in tree.memories if m.instances == 1 and not m.is_dram and m.size_bits]
    l2 = max(shared, key=lambda m: m.size_bits, default=None)
    for memory in tree.memories:
        if memory.is_dram and "dram" not in asked:
            rate = memory.bits_per_s or memory.bits_per_cycle * clock
            note = at if memory.bits_per_cycle else ""
            put("memories.dram.bandwidth_bytes_per_s", rate / 8, memory.rate_key, note)
        if memory.is_dram:
            put("energy.dram_pj_per_byte", memory.pj_per_bit * 8, memory.energy_key)
        elif memory is l2:
            if "sram" not in asked:
                put("memories.l2.capacity_bytes", memory.size_bits // 8, memory.size_key)
            rate = memory.bits_per_cycle or memory.bits_per_s / clock
            put("memories.l2.bandwidth_bytes_per_cycle", rate / 8, memory.rate_key)
            put("energy.l2_pj_per_byte", memory.pj_per_bit * 8, memory.energy_key)
        elif memory in shared and l2:
            tree.taken[memory.size_key] = f"{_NOT_TAKEN}: {l2.name}, the largest shared one, is L2"
    inner = [m for m in tree.memories if m.instances > 1 and m.size_bits]
    if inner and "l1" not in asked:
        units = 1 if base.units.organization == "systolic" else base.units.count
        total = sum(m.size_bits * m.instances for m in inner) // (8 * units)
        note = ", of the array together" if units == 1 else ""
        for memory in inner if total >= _LEAST_L1 else []:
            put("memories.l1.capacity_bytes", total, memory.size_key, note)
            changes["memories.l1.reserved_bytes"] = 0
        for memory in inner if total < _LEAST_L1 else []:
            told = f"{_NOT_TAKEN}: {total:.0f} B hold no tile; L1 is assumed"
            tree.taken[memory.size_key] = told
        largest = max(inner, key=lambda m: m.size_bits * m.instances)
        put("energy.l1_pj_per_byte", largest.pj_per_bit * 8, largest.energy_key)
    if "modes" not in asked:
        mode = f"modes.{base.modes[0].name}.energy_pj_per_mac"
        put(mode, tree.pj_per_mac, tree.mac_key)
    return changes


def _becomes(tree: _Tree, key: str) -> str:
    """What a key became: what is said of it, or of the block that it stands in."""
    parts = key.split(".")
    blocks = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = next((block for block in blocks if block in tree.taken), None)
    rest = key[len(found or "") :]
    is_of_it = found == key or re.search(r"mesh|instances|fanout|bandwidth_max", rest)
    return tree.taken[found] if found and is_of_it else _NOT_TAKEN
