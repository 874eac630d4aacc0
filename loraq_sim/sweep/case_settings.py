"""Settings of one case: what differs from the defaults, and the columns known beforehand."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps import LayerInfo
from loraq_sim.rows import COLUMN_NAMES

if TYPE_CHECKING:
    from hwmodels import Accelerator
    from loraq_sim.sweep.case_grid import GridPoint
    from loraq_sim.sweep.plan import SweepPlan

__all__ = ["as_tuple", "case_labels", "case_options", "datapath_grid"]


def as_tuple(value: Any) -> tuple:
    """`value` if it is a tuple or list of values, else the tuple of this one value."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def datapath_grid(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of data path settings, where a tuple or list of values asks for each."""
    values = [as_tuple(value) for value in settings.values()]
    return [dict(zip(settings, chosen, strict=True)) for chosen in itertools.product(*values)]


def case_options(plan: "SweepPlan", datapath: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `evaluate_layer` that differ from their default."""
    options: dict[str, Any] = {}
    if plan.smooth is not None:
        options["smooth"] = plan.smooth
    if not plan.fused:
        options["fused"] = False
    if datapath:
        options["datapath"] = dict(datapath)
    return options


def case_labels(
    plan: "SweepPlan",
    name: str,
    info: LayerInfo | None,
    point: "GridPoint",
    accelerator: "Accelerator",
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Columns known beforehand; a row that fails has these and nothing else."""
    from loraq_sim.emulator.mac_array import describe_array
    from loraq_sim.machine import datapath_for

    mac = datapath_for(accelerator, options.get("datapath")).mac
    labels = {
        "layer": name,
        "split": point.split.text,
        "method": point.method,
        "preset": point.preset,
        "accelerator": accelerator.name,
        "seed": point.seed,
        **describe_array(mac),
        "dump": Path(plan.dump).name,
        "family": point.split.family,
        "group_size": point.split.group,
        "token_limit": plan.tokens,
        "options": _other_options(options),
    }
    if info is not None:
        labels |= {"kind": info.kind, "group": info.group, "n": info.n, "k": info.k}
        labels |= {"m": info.rows_per_call or info.tokens or 1}
        labels |= {"calls_per_step": info.calls_per_step}
    return labels


def _other_options(options: Mapping[str, Any]) -> str:
    """JSON of the settings that have no column of their own; empty without any."""
    others = {name: value for name, value in options.items() if name != "datapath"}
    path = options.get("datapath", {})
    unnamed = {name: value for name, value in path.items() if name not in COLUMN_NAMES}
    others |= {"datapath": unnamed} if unnamed else {}
    return json.dumps(others, sort_keys=True) if others else ""
