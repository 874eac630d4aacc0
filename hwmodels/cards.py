"""What Jupyter shows for an accelerator and a cost: facts above, tables below."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwmodels.cost import Cost
    from hwmodels.description import Accelerator

__all__ = ["accelerator_card", "bar_text", "cost_card", "html_card"]

_BAR_CHARACTERS = 20
_MOST_ROWS = 60
_QUANTITIES = {
    "latency_s": ("latency", "us", 1e6),
    "energy_j": ("energy", "uJ", 1e6),
    "dram_bytes": ("DRAM traffic", "KiB", 1 / 1024),
    "weight_bytes": ("stored weights", "KiB", 1 / 1024),
}


def html_card(
    title: str, facts: Mapping[str, object], *tables: Sequence[Mapping[str, object]]
) -> str:
    """HTML of a title, facts by name (None is left out) and tables given as rows.

    Tables longer than 60 rows are cut; a line says by how many.
    """
    import pandas as pd

    look = {"index": False, "border": 0}
    known = [(name, str(value)) for name, value in facts.items() if value is not None]
    shown = []
    with pd.option_context("display.max_colwidth", None):
        if known:
            shown.append(pd.DataFrame(known).to_html(header=False, **look))
        for rows in tables:
            texts = [{name: str(cell) for name, cell in row.items()} for row in rows[:_MOST_ROWS]]
            if texts:
                shown.append(pd.DataFrame(texts).to_html(**look))
            if len(rows) > _MOST_ROWS:
                shown.append(f"<p>{len(rows) - _MOST_ROWS:,} more rows are not shown</p>")
    return f"<strong>{escape(title)}</strong>{''.join(shown)}"


def bar_text(share: float) -> str:
    """A bar of up to 20 characters; shares outside 0 to 1 are cut."""
    return "\N{FULL BLOCK}" * round(_BAR_CHARACTERS * min(1.0, max(0.0, share)))


def accelerator_card(hw: "Accelerator") -> str:
    """Size, clock, memories and MAC modes of a machine, each with the confidence in it."""
    units, memories = hw.units, hw.memories
    facts = {
        "compute": f"{units.organization} of {units.rows} x {units.columns} units "
        f"at {units.clock_hz / 1e9:g} GHz ({units.confidence})",
        "memory of a unit": f"{memories.l1.capacity_bytes / 1024:,.0f} KiB "
        f"({memories.l1.confidence})",
        "shared memory": f"{memories.l2.capacity_bytes / 1024:,.0f} KiB ({memories.l2.confidence})",
        "DRAM": f"{memories.dram.sustained_bytes_per_s / 1e9:,.4g} GB/s sustained "
        f"({memories.dram.confidence})",
        "kernel start": f"{hw.dispatch.launch_s * 1e6:g} us ({hw.dispatch.confidence})",
        "accumulator": f"{hw.datapath.acc_bits} bits, {hw.datapath.overflow}",
        "variants": ", ".join(variant.name for variant in hw.variants) or "none",
    }
    per_cycle_s = units.count * units.clock_hz
    modes = [
        {
            "mode": mode.name,
            "activations": f"{mode.activation_bits} bit",
            "weights": f"{mode.weight_bits} bit",
            "MAC/cycle/unit": f"{mode.macs_per_cycle:,}",
            "peak TOPS": f"{2 * mode.macs_per_cycle * per_cycle_s / 1e12:,.4g}",
            "pJ/MAC": f"{mode.energy_pj_per_mac:g}",
            "confidence": mode.confidence,
        }
        for mode in hw.modes
    ]
    return html_card(f"{hw.name}: {hw.title}", facts, modes)


def cost_card(cost: "Cost") -> str:
    """Totals of a cost, then every part of each with its share."""
    facts = {
        "latency": f"{cost.latency_s * 1e6:,.5g} us ({cost.cycles:,.0f} cycles)",
        "bound by": cost.bound,
        "utilization": f"{cost.utilization:.1%} of peak MACs",
        "energy": f"{cost.energy_j * 1e6:,.4g} uJ",
        "DRAM traffic": f"{cost.dram_bytes / 1024:,.1f} KiB",
        "stored weights": f"{cost.weight_bytes / 1024:,.1f} KiB",
        "MAC modes": ", ".join(f"{part} in {mode}" for part, mode in cost.modes.items()),
    }
    rows = [
        _part_row(quantity, part, value, sum(cost.parts[quantity].values()))
        for quantity in _QUANTITIES
        for part, value in cost.parts[quantity].items()
        if value
    ]
    return html_card("Cost of one call", facts, rows)


def _part_row(quantity: str, part: str, value: float, total: float) -> dict[str, str]:
    name, unit, scale = _QUANTITIES[quantity]
    share = value / total
    return {
        "quantity": name,
        "part": part,
        "value": f"{value * scale:,.4g} {unit}",
        "share": f"{share:.1%}",
        "": bar_text(share),
    }
