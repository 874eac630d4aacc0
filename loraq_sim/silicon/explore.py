"""A chip on paper: array, SRAM and split chosen together under one area budget.

A design is a systolic array of rows x columns elements, each of which sums c products of the
split's main precision in a tree and adds them to an accumulator; multipliers of the branch's
precision stand beside them, one for `per_branch` and at least one an element, and those of
attention in 8 bits where neither of the two is that. Below each column are an fp32 lane, a
shift-round-saturate and a group sum. What the array leaves of the area is SRAM. Area and energy of
the array come from synthesis, SRAM from published bit cells (`hwmodels.chip_area` says what is left
out); energies of memories and lanes, clock and latencies are assumed.

**Search.** Error depends on the split and the accumulator alone. Nothing wider than the width that
holds every sum of the layers has less error, and everything wider is larger, so no wider one is
tried. Narrower ones are, with both overflow rules, and stay where no other array of the split with
their adder tree has less area and less error. Each array that stays is laid out with several shares
of SRAM and several shapes; the cost model gives latency and energy of what one denoising step runs
(`StepWork`): linear layers in the split, attention in 8-bit integers, the rest on the lanes. What
no other design beats in error, latency and energy is the front.

Errors are those of layers of a dump, or of a few layers drawn with the statistics of the model's;
what 8 bits cost attention is not among them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import hwmodels
from hwmodels.inventory import InventoryEntry, ProductCost
from hwmodels.operands import parse_operands
from loraq_sim.dumps.synthesize import synthesize_layers
from loraq_sim.emulator.mac_array import MacArray, checked_int
from loraq_sim.errors import InputError, counted, unknown_name
from loraq_sim.evaluate import evaluate_case, solve_case
from loraq_sim.layers import Layer
from loraq_sim.machine import cost_split
from loraq_sim.results.choice import WORST_ERROR
from loraq_sim.results.front import knee_of, mark_front
from loraq_sim.results.totals import model_totals
from loraq_sim.settings import CaseSettings
from loraq_sim.split import PrecisionSplit

__all__ = [
    *("ATTENTION", "Design", "Explored", "PER_BRANCH", "StepWork", "check_chip", "drawn_layers"),
    *("explore", "model_work", "paper_content", "paper_machine"),
]

_OBJECTIVES = ("output_error", "latency_s", "energy_j")
_PRODUCTS = (1, 8)
_SRAM_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_ROWS = (8, 16, 32, 64, 128, 256)
_WIDE = 48
_NARROWER = (1, 2)
_LEAST_BITS = 8
# Multipliers of the main branch for one of the side branch or of attention.
PER_BRANCH = 8
ATTENTION = ("int8", "none")  # How attention runs: in 8-bit integers, or it is not looked at.
_BUFFER_BYTES = 16384
_LEAST_SRAM = 32768
_ROW_BYTES = 1024
_SAMPLE = ("self_q", "attn_q", "qkv", "ffn_up", "ffn_down")
# Of the error without overflow: beyond it a narrower accumulator is no offer.
_MOST_ERROR = 1.5
_SAID = "chip on paper of `loraq-sim explore`; see its page for what is assumed"


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a chip on paper is made of: rows x columns elements, each with its tree and accumulator.

    `per_branch`: multipliers of the main branch for one beside them; `attention`: of `ATTENTION`.
    """

    split: PrecisionSplit
    rows: int
    columns: int
    products_per_add: int
    acc_bits: int
    overflow: str
    sram_bytes: int
    node_nm: int
    clock_hz: float
    dram_bytes_per_s: float
    per_branch: int = PER_BRANCH
    attention: str = "none"

    @property
    def beside(self) -> int:
        """Multipliers an element has beside those of the main branch, of each other mode."""
        return max(1, self.products_per_add // self.per_branch)


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a denoising step runs: calls of linear layers by (M, N, K), and of everything else.

    `told`: which of the step's MACs these are, and what is left out.
    """

    shapes: Mapping[tuple[int, int, int], int]
    others: tuple[InventoryEntry, ...] = ()
    told: str = "linear layers of a step"

    @property
    def least_bits(self) -> int:
        """Accumulator bits that hold queries times keys of 8 bits, as long as a head is."""
        heads = [entry.k for entry in self.others if entry.op.endswith("attention")]
        return max([_LEAST_BITS, *((k << 14).bit_length() + 1 for k in heads)])


@dataclass(frozen=True, kw_only=True)
class Explored:
    """What a search found: `front` by error, `knee` among it, designs looked at, remarks."""

    front: list[dict[str, Any]]
    knee: dict[str, Any]
    n_designs: int
    notes: tuple[str, ...]


def paper_machine(design: Design, name: str = "paper") -> "hwmodels.Accelerator":
    """The accelerator of a design."""
    content = paper_content(design, name)
    return hwmodels.Accelerator.model_validate(content | {"modes": tuple(content["modes"])})


def paper_content(design: Design, name: str = "paper") -> dict[str, Any]:
    """The accelerator file of a design, as plain values."""
    count, about = design.products_per_add, {"source": _SAID, "confidence": "estimate"}
    node = hwmodels.load_node(design.node_nm)
    # Energies of memories and lanes are those of 7 nm (Jouppi et al., ISCA 2021), moved to the node
    # as the energy of a product moves.
    moved = node.multiply_pj / hwmodels.load_node(7).multiply_pj
    main, branch = design.split.costed
    modes = [_mode(main, design, count)]
    more = [] if branch is None else [branch]
    more += ["W8A8"] if design.attention == "int8" else []
    for precision in more:
        beside = _mode(precision, design, design.beside)
        modes += [beside] if beside["name"] not in {mode["name"] for mode in modes} else []
    streamed = design.rows * count + 2 * design.columns
    return {
        "name": name,
        "title": f"{design.rows} x {design.columns} elements of {counted(count, 'product')}, "
        f"{design.split}",
        "array": {"from": "synthesis", "node_nm": design.node_nm},
        "units": {
            **{"organization": "systolic", "rows": design.rows, "columns": design.columns},
            **{"clock_hz": float(design.clock_hz), "dataflow": "weight_stationary", **about},
        },
        "modes": modes,
        "kernel": {
            # Weights stay for a block of rows of X; a row of X serves all columns.
            **{"register_block_m": _rows_of_x(design), "register_block_n": design.columns},
            **{"load_bytes_per_cycle": float(streamed), "block_overhead_cycles": 0.0},
            **{"partial_cycles_per_64_bytes": 0.0, "tile_overhead_cycles": 0.0},
            # Partial sums travel through the array and stay beside it.
            **{"partials": "registers", "accumulator_capacity_bytes": 2**20},
            **{"tile_m_max_rows": _rows_of_x(design)},
            **{"tile_n_max_columns": design.columns, "tile_k_step": 16, "tile_k_max": 512},
            **about,
        },
        "vector": {
            **{"scope": "column", "combine_elements_per_cycle": 1.0, "combine_overlaps_mac": True},
            **{"quantize_elements_per_cycle": 1.0, "unpack_elements_per_cycle": 1.0, **about},
        },
        "memories": {
            "l1": {
                **{"capacity_bytes": _BUFFER_BYTES, "reserved_bytes": 0, "input_buffers": 2},
                **{"output_buffers": 2, "fill_channels": "separate"},
                **{"fill_bytes_per_cycle": float(streamed)},
                **{"drain_bytes_per_cycle": float(2 * design.columns), **about},
            },
            "l2": {
                **{"capacity_bytes": design.sram_bytes, "panel_fraction": 0.5},
                **{"bandwidth_bytes_per_cycle": float(streamed), **about},
            },
            "dram": {
                **{"bandwidth_bytes_per_s": float(design.dram_bytes_per_s)},
                **{"sustained_fraction": 0.85, "latency_s": 1e-6, **about},
            },
        },
        "dispatch": {"launch_s": 1e-6, **about},
        "datapath": {
            **{"acc_bits": design.acc_bits, "overflow": design.overflow},
            **{"products_per_add": count, "accumulators": 1, "combine": "fp32"},
            **{"rounding": "conv_even", "saturation": "saturate", "p_format": "branch"},
            **{"out_format": "fp16", **about},
        },
        "energy": {
            **{"node_nm": float(design.node_nm), "l1_pj_per_byte": round(1.15 * moved, 4)},
            **{"l2_pj_per_byte": round(1.6 * moved, 4), "dram_pj_per_byte": 163.0},
            **{"combine_pj_per_element": round(1.7 * moved, 4)},
            **{"quantize_pj_per_element": round(0.3 * moved, 4)},
            **{"unpack_pj_per_element": round(0.1 * moved, 4), "static_w": 0.1, **about},
        },
    }


def _rows_of_x(design: Design) -> int:
    """Rows of X that pass while weights stay: a power of two up to 256, a quarter of the SRAM."""
    most = max(1, min(256, design.sram_bytes // (4 * _ROW_BYTES)))
    return int(2 ** math.floor(math.log2(most)))


def _mode(precision: str, design: Design, count: int) -> dict[str, Any]:
    w, a = parse_operands(precision)
    if w.is_float or a.is_float:
        raise InputError(
            f"{precision} multiplies 16-bit floats, whose gates nobody has synthesized; name "
            "integers of 2 to 8 bits, such as W8A8"
        )
    mode: dict[str, Any] = {
        "name": f"int{a.bits}xint{w.bits}" if a.bits != w.bits else f"int{a.bits}",
        **{"kind": "int", "activation_bits": a.bits, "weight_bits": w.bits},
        **{"accumulator_bits": design.acc_bits, "macs_per_cycle": count},
        **{"instruction_m": 1, "instruction_k": 1, "instruction_n": 1},
        **{"source": _SAID, "confidence": "estimate"},
    }
    signs = (("activations", a), ("weights", w))
    unsigned = tuple(which for which, operand in signs if operand.is_unsigned)
    return mode | ({"unsigned": unsigned} if unsigned else {})


def check_chip(area_mm2: float, node_nm: int) -> None:
    """Raise for an area or a node that no chip here can have."""
    if not 0 < area_mm2 <= 1000:
        raise InputError(f"the area must be above 0 and at most 1000 mm2, got {area_mm2:g}")
    hwmodels.load_node(node_nm)


def drawn_layers(model: str, *, tokens: int, resolution: int = 1024) -> list[Layer]:
    """A few layers of a model, drawn: of a block in its middle, the kinds that differ most."""
    dump = synthesize_layers(model, tokens=tokens, resolution=resolution)
    by_kind: dict[str, list[str]] = {}
    for name in dump:
        by_kind.setdefault(dump.info(name).kind, []).append(name)
    kinds = [kind for kind in _SAMPLE if kind in by_kind] or list(by_kind)[:3]
    return [dump[by_kind[kind][len(by_kind[kind]) // 2]] for kind in kinds[:3]]


def model_work(model: str, *, resolution: int = 1024, attention: str = "int8") -> StepWork:
    """A step of a published model: linear layers, and with attention all that no layer is."""
    if attention not in ATTENTION:
        raise InputError(unknown_name("attention", attention, ATTENTION))
    inventory = hwmodels.load_model(model, resolution)
    shapes: dict[tuple[int, int, int], int] = {}
    others = []
    for entry in inventory.entries:
        calls = entry.calls * inventory.guidance_calls
        if entry.op == "gemm" and entry.precision == "split":
            shape = (entry.m, entry.n, entry.k)
            shapes[shape] = shapes.get(shape, 0) + calls
        elif entry.op != "gemm" and attention != "none":
            others.append(replace(entry, calls=calls))
    shares = {kind: f"{kind} ({share:.1%})" for kind, share in inventory.mac_shares.items()}
    has = ["linear layers", "attention"][: 1 + (attention != "none")]
    told = f"{sum(inventory.mac_shares[kind] for kind in has):.1%} of the MACs of a step: "
    told += " and ".join(shares.pop(kind) for kind in has)
    if others:
        told += f" in 8 bits, which takes {StepWork(shapes={}, others=tuple(others)).least_bits} "
        told += "bits of accumulator at least; elementwise work on the lanes"
    told += f"; left out: {', '.join(shares.values())}"
    return StepWork(shapes=shapes, others=tuple(others), told=told)


def explore(
    splits: Sequence[PrecisionSplit],
    layers: Iterable[Layer],
    work: StepWork,
    *,
    area_mm2: float,
    node_nm: int = 7,
    clock_hz: float = 1e9,
    dram_bytes_per_s: float = 51.2e9,
    per_branch: int = PER_BRANCH,
    products_per_add: Sequence[int] = _PRODUCTS,
    tokens: int | None = None,
    method: str = "svdquant",
    preset: str = "fast",
    on_split: Callable[[PrecisionSplit], None] | None = None,
) -> Explored:
    """Designs of at most `area_mm2` that no other beats in error, latency and energy.

    Parameters
    ----------
    splits : sequence of PrecisionSplit
        Of integers, in groups.
    layers : iterable of Layer
        With activations; what errors are measured on.
    work : StepWork
        What a step runs; attention, where it has any, in 8-bit integers.
    area_mm2, node_nm, clock_hz, dram_bytes_per_s, per_branch
        Of the chip.
    products_per_add : sequence of int
        Adder trees to try.
    tokens : int, optional
        Activation rows to measure errors on; all by default.
    method, preset : str
        Solver of splits with a branch, and its effort.
    on_split : callable, optional
        Told each split before its errors are measured.

    Raises
    ------
    InputError
        If no design fits, no split has an integer array, or a size is out of range.
    """
    check_chip(area_mm2, node_nm)
    for count in (per_branch, *products_per_add):
        checked_int("per_branch and products_per_add", count, 1, 64)
    layers = list(layers)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for split in splits:
        if on_split is not None:
            on_split(split)
        common: dict[str, Any] = {
            "node_nm": node_nm,
            "clock_hz": clock_hz,
            "dram_bytes_per_s": dram_bytes_per_s,
            "per_branch": per_branch,
            "attention": "int8" if work.others else "none",
        }
        try:
            settings = CaseSettings(split=split, method=method, preset=preset, tokens=tokens)
            arrays = list(_arrays(settings, layers, products_per_add, common, work.least_bits))
        except (InputError, hwmodels.AcceleratorError) as error:
            notes.append(f"{split} left out: {error}")
            continue
        for array in arrays:
            rows += _laid_out(split, array, work, area_mm2, common)
    if not rows:
        told = notes[0] if notes else "not even 8 elements and 32 KiB fit"
        raise InputError(f"no design of {area_mm2:g} mm2 on {node_nm} nm: {told}")
    front = [row for row in mark_front(rows, _OBJECTIVES, by=()) if row["pareto"]]
    front.sort(key=lambda row: (row["output_error"], row["latency_s"]))
    # A knee that nobody would build is none, as long as there are others.
    fit = [row for row in front if row["output_error"] <= WORST_ERROR] or front
    points = np.array([[row[name] for name in _OBJECTIVES] for row in fit], np.float64)
    place = knee_of(points, _OBJECTIVES) or 0
    return Explored(front=front, knee=fit[place], n_designs=len(rows), notes=tuple(notes))


def _arrays(
    settings: CaseSettings,
    layers: Sequence[Layer],
    products: Sequence[int],
    common: Mapping[str, Any],
    least_bits: int,
) -> Iterator[dict[str, Any]]:
    """Arrays of a split, with error and overflows, that no other beats in error and gates."""
    split = settings.split
    if not split.has_branch:
        settings = replace(settings, method="rtn")
    solutions = {layer.name: solve_case(layer, settings) for layer in layers}
    found: list[dict[str, Any]] = []
    for count in products:
        machine = paper_machine(
            Design(
                split=split,
                rows=16,
                columns=16,
                products_per_add=count,
                acc_bits=_WIDE,
                overflow="wrap",
                sram_bytes=2**20,
                **common,
            )
        )

        def measured(bits: int, rule: str, machine: Any = machine) -> dict[str, Any]:
            path = {"acc_bits": bits, "overflow": rule}
            own = [
                evaluate_case(
                    layer,
                    replace(settings, datapath=path),
                    machine,
                    solution=solutions[layer.name],
                )
                for layer in layers
            ]
            (total,) = model_totals(own)
            return dict(total)

        wide = measured(_WIDE, "wrap")
        held = wide["safe_acc_bits"]
        if held is None or wide["output_error"] is None:
            raise InputError("its error is not known: the layers have no activations")
        limit = _MOST_ERROR * wide["output_error"]
        wanted = [(max(held, least_bits), "wrap")]
        for less in _NARROWER:
            wanted += [(held - less, rule) for rule in ("wrap", "saturate")]
        for bits, rule in wanted:
            if bits < least_bits:
                continue
            total = wide if bits >= held else measured(bits, rule)
            area = _area_of(machine, split, bits, rule, count)
            row = {"products_per_add": count, "acc_bits": bits, "overflow": rule, "area_ge": area}
            row |= {"output_error": total["output_error"]}
            row |= {"overflow_count": 0 if bits >= held else total["overflow_count"]}
            if bits >= held or (row["output_error"] or math.inf) <= limit:
                found.append(row)
    marked = mark_front(found, ("output_error", "area_ge"), by=("products_per_add",))
    yield from (row for row in marked if row["pareto"])


def _area_of(machine: Any, split: PrecisionSplit, bits: int, rule: str, count: int) -> float:
    """Gate equivalents per MAC of the main branch's array."""
    work = hwmodels.GemmWorkload(
        m=1, n=1, k=1, main=split.costed[0], branch=None, rank=0, family=split.family
    )
    mac = MacArray(acc_bits=bits, overflow=rule, products_per_add=count)
    cost = hwmodels.array_of(work, machine, mac=mac)
    if cost is None:
        raise InputError("it runs in a float mode, whose gates nobody has synthesized")
    return cost.area_ge


def _laid_out(
    split: PrecisionSplit,
    array: Mapping[str, Any],
    work: StepWork,
    area_mm2: float,
    common: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """The array in several shapes, each as wide as the area left by its SRAM allows."""
    chosen = {name: array[name] for name in ("products_per_add", "acc_bits", "overflow")}
    node = hwmodels.load_node(common["node_nm"])
    for share in _SRAM_SHARES:
        room = area_mm2 * share - node.sram_mm2(_BUFFER_BYTES)
        sram = int(room / node.sram_mm2(1)) // 1024 * 1024 if room > 0 else 0
        if sram < _LEAST_SRAM:
            continue
        for rows in _ROWS:
            design = Design(split=split, rows=rows, columns=1, sram_bytes=sram, **chosen, **common)
            columns = _most_columns(design, area_mm2)
            if columns < 1 or not 1 / 8 <= columns / rows <= 8:
                continue
            # Fewer columns take as many passes over N.
            even = {-(-n // -(-n // columns)) for _, n, _ in work.shapes}
            for count in sorted({columns, *even}):
                yield _priced(design, count, array, work)


def _most_columns(design: Design, area_mm2: float) -> int:
    """The most columns within the area: all parts but SRAM grow with them."""
    parts = hwmodels.chip_area(paper_machine(design))
    each = sum(value for name, value in parts.items() if name != "sram")
    return math.floor((area_mm2 - parts["sram"]) / each * (1 + 1e-9))


def _priced(
    design: Design,
    columns: int,
    array: Mapping[str, Any],
    work: StepWork,
) -> dict[str, Any]:
    design = replace(design, columns=columns)
    machine = paper_machine(design)
    sums = dict.fromkeys(("latency_s", "energy_j", "dram_bytes"), 0.0)
    macs, in_gates = 0, 0.0
    bounds: dict[str, float] = {}
    costs: list[tuple[hwmodels.Cost | ProductCost, int]] = []
    energies = {mode.name: mode.energy_pj_per_mac for mode in machine.modes}
    for (m, n, k), calls in work.shapes.items():
        _, cost = cost_split(m, n, k, design.split, machine)
        costs.append((cost, calls))
        parts = cost.parts["energy_j"]
        in_gates += calls * sum(part for name, part in parts.items() if name.startswith("mac_"))
        macs += m * n * k * calls
    for entry in work.others:
        product = hwmodels.product_cost(entry, machine, qk="int8", pv="int8")
        costs.append((product, entry.calls))
        if entry.op.endswith("attention"):
            in_gates += entry.macs * energies["int8"] * 1e-12
            macs += entry.macs
    for each, calls in costs:
        for name in sums:
            sums[name] += getattr(each, name) * calls
        bounds[each.bound] = bounds.get(each.bound, 0.0) + each.latency_s * calls
    area = hwmodels.chip_area(machine)
    names = ("rows", "columns", "products_per_add", "acc_bits", "overflow", "sram_bytes")
    return {
        "split": design.split.text,
        "modes": ", ".join(mode.name for mode in machine.modes),
        **{name: getattr(design, name) for name in names},
        "output_error": array["output_error"],
        **sums,
        "bound": max(bounds, key=bounds.__getitem__),
        "area_mm2": sum(area.values()),
        **{f"{part}_mm2": value for part, value in area.items()},
        "peak_tops": 2e-12 * machine.units.count * design.products_per_add * design.clock_hz,
        "tops_per_w": 2 * macs / sums["energy_j"] / 1e12,
        "gates_energy_share": in_gates / sums["energy_j"],
        "overflow_count": array["overflow_count"],
        "design": design,
    }
