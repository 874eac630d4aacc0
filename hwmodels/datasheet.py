"""An accelerator as a table: every number with its unit, source and confidence."""

from hwmodels.description import Accelerator, Block

__all__ = ["describe"]

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


def _add(rows: list[dict], path: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, Block):
        for field in type(value).model_fields:
            if field not in _ABOUT and getattr(value, field) not in (None, ()):
                rows.append(_row(f"{path}.{field}", getattr(value, field), value))
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
