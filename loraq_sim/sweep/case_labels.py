"""The columns of a row that are known before it is evaluated, and the settings without one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.case_settings import CaseSettings
from loraq_sim.dumps import LayerInfo
from loraq_sim.rows import COLUMN_NAMES

if TYPE_CHECKING:
    from hwmodels import Accelerator

__all__ = ["case_labels"]


def case_labels(
    dump: str,
    name: str,
    info: LayerInfo | None,
    settings: CaseSettings,
    accelerator: "Accelerator",
    asked: Mapping[str, str],
    rows_source: str,
) -> dict[str, Any]:
    """Columns known beforehand; a row that fails has these and nothing else.

    `rows_source` says where the rows of the settings come from, if they have any.
    """
    from loraq_sim.emulator.mac_array import describe_array
    from loraq_sim.machine import datapath_for

    mac = datapath_for(accelerator, settings.datapath).mac
    labels = {
        "layer": name,
        "split": settings.split.text,
        "rotation": settings.rotate,
        "smooth": settings.smooth,
        "method": settings.method,
        "preset": settings.preset,
        "accelerator": accelerator.name,
        "seed": settings.seed,
        **describe_array(mac),
        "dump": Path(dump).name,
        "family": settings.split.family,
        "group_size": settings.split.group,
        "token_limit": settings.tokens,
        "options": _other_options(settings, asked),
    }
    if info is not None:
        labels |= {"kind": info.kind, "group": info.group, "n": info.n, "k": info.k}
        known = (info.m, info.m_source) if settings.rows is None else (settings.rows, rows_source)
        labels |= dict(zip(("m", "m_source"), known, strict=True))
        labels |= {"calls_per_step": info.calls_per_step}
    return labels


def _other_options(settings: CaseSettings, asked: Mapping[str, str]) -> str:
    """JSON of the settings that have no column of their own; empty without any."""
    others: dict[str, Any] = {}
    if not settings.fused:
        others["fused"] = False
    if asked:
        others["asked"] = dict(asked)
    unnamed = {name: v for name, v in settings.datapath.items() if name not in COLUMN_NAMES}
    others |= {"datapath": unnamed} if unnamed else {}
    return json.dumps(others, sort_keys=True) if others else ""
