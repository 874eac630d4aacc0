"""An accelerator as a table: every number with its unit, source and confidence, and idle ones."""

from fnmatch import fnmatchcase

from hwmodels.description import Accelerator, Block
from hwmodels.modes import unreachable_modes
from hwmodels.overrides import keys_of

__all__ = ["describe", "idle_keys"]

# Longest suffix first: bytes_per_cycle before bytes.
_UNITS = {
    "_bytes_per_cycle": "B/cycle",
    "_elements_per_cycle": "elements/cycle",
    "_macs_per_cycle": "MAC/cycle",
    "macs_per_cycle": "MAC/cycle",
    "_bytes_per_s": "B/s",
    "_cycles_per_64_bytes": "cycles/64 B",
    "_pj_per_byte": "pJ/B",
    "_pj_per_mac": "pJ/MAC",
    "_pj_per_element": "pJ/element",
    "_overhead_cycles": "cycles",
    "_bytes": "B",
    "_bits": "bit",
    "_rows": "rows",
    "_columns": "columns",
    "_percent": "%",
    "_fraction": "of 1",
    "_hz": "Hz",
    "_nm": "nm",
    "_s": "s",
    "_w": "W",
}
_TILED = (
    *("modes.*.instruction_*", "kernel.load_bytes_per_cycle", "kernel.block_overhead_cycles"),
    *("kernel.partial_cycles_per_64_bytes", "kernel.tile_*", "kernel.accumulator_capacity_bytes"),
    *("kernel.fused_rate_fraction", "memories.l1.reserved_bytes", "memories.l1.input_buffers"),
    *("memories.l1.output_buffers", "memories.l1.fill_bytes_per_cycle"),
    "memories.l1.drain_bytes_per_cycle",
)
_ABOUT = {"source", "confidence", "uncertainty_percent"}


def describe(hw: Accelerator) -> list[dict]:
    """Rows of key, value, unit, source and confidence, in the order of the file.

    Keys are paths as the file has them (`memories.l2.capacity_bytes`, `modes[0].macs_per_cycle`).
    """
    rows: list[dict] = []
    for field in type(hw).model_fields:
        if field not in {"name", "title", "aliases", "variants"}:
            _add(rows, field, getattr(hw, field))
    for variant in hw.variants:
        for key, value in variant.set.items():
            rows.append(_row(f"variant {variant.name}: {key}", value, variant))
    return rows


def idle_keys(hw: Accelerator) -> dict[str, str]:
    """Keys of `hw` whose value changes no cost and no emulated result, with the reason.

    Keys are those of `with_overrides`: ``modes.int8.accumulator_bits``.
    """
    reasons = {
        "modes.*.accumulator_bits": "for the reader: the emulator takes datapath.acc_bits",
        "energy.node_nm": "for the reader: says at which node the energies hold; none is rescaled",
    }
    if hw.units.organization == "systolic":
        closed = "not used: a systolic array has a closed form in place of tiles and blocks"
        reasons |= dict.fromkeys(_TILED, closed)
    else:
        reasons["vector.add_elements_per_cycle"] = "used for a systolic array only"
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
    for name, why in unreachable_modes(hw).items():
        reasons[f"modes.{name}.*"] = f"mode {name} is reached by no split: {why}"
    return {
        key: why
        for key in keys_of(hw)
        for pattern, why in reasons.items()
        if fnmatchcase(key, pattern)
    }


def _add(rows: list[dict], path: str, value: object) -> None:
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
    else:
        for field in type(value).model_fields:
            _add(rows, f"{path}.{field}", getattr(value, field))


def _row(key: str, value: object, block: Block) -> dict:
    if isinstance(value, tuple):
        value = ", ".join(str(item) for item in value) or "none"
    return {
        "key": key,
        "value": value,
        "unit": _unit(key),
        "source": block.source,
        "confidence": block.confidence,
    }


def _unit(key: str) -> str:
    return next((unit for suffix, unit in _UNITS.items() if key.endswith(suffix)), "")
