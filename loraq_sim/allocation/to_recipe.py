"""An allocation as a recipe file that ``loraq-sim solve --recipe`` takes."""

import glob
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from loraq_sim.allocation.model import Allocation
from loraq_sim.errors import InputError
from loraq_sim.layer_settings import NONE
from loraq_sim.recipe import Recipe
from loraq_sim.rows import Row
from loraq_sim.split import parse_split

__all__ = ["allocation_recipe"]

_SETTINGS = {
    "method": "method",
    "preset": "preset",
    "family": "family",
    "group": "group_size",
    "seed": "seed",
    "smooth": "smooth",
    "rotate": "rotation",
}
_OF_BRANCHES = ("method", "preset", "seed")


def allocation_recipe(
    allocation: Allocation, provenance: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of an allocation: what most layers share under defaults, the rest by layer.

    `provenance` is added to what the allocation knows of itself: model, accelerator, budget,
    objective, totals and gap.
    """
    settings = {row["layer"]: _settings(row) for row in allocation.rows}
    defaults = {
        key: Counter(values).most_common(1)[0][0]
        for key in _SETTINGS
        if (values := [own[key] for own in settings.values() if own.get(key) is not None])
    }
    layers = {
        # Brackets and stars of a name are not to be read as a pattern.
        glob.escape(layer): {
            key: value
            for key, value in (own | _ended(own, defaults)).items()
            if value is not None and defaults.get(key) != value
        }
        for layer, own in settings.items()
    }
    facts = _facts(allocation) | dict(provenance or {})
    try:
        return Recipe(provenance=facts, defaults=defaults, layers=layers)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the allocation has no recipe: {key}: {first['msg']}, got {first['input']!r:.80}; "
            "the rows of that setting are no sweep's, leave them out"
        ) from None


def _ended(own: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What most layers do to their inputs and this one does not."""
    return {key: NONE for key in ("smooth", "rotate") if key in defaults and own[key] is None}


def _settings(row: Row) -> dict[str, Any]:
    own = {"split": row["split"]}
    own |= {key: row.get(column) for key, column in _SETTINGS.items()}
    family, group = own["family"] or "int", own["group"] or 64
    if not parse_split(row["split"], family=family, group=group).has_branch:
        # Rounded to nearest whatever the solver is.
        own |= dict.fromkeys(_OF_BRANCHES)
    return own


def _facts(allocation: Allocation) -> dict[str, Any]:
    machine = {key: value for key, value in allocation.problem.machine.items() if value}
    facts: dict[str, Any] = {"model": machine.pop("dump", None), "layers": len(allocation.picks)}
    facts |= {"accelerator": machine.pop("accelerator", None), "machine": machine}
    facts |= {"budget": dict(allocation.budget), "minimized": allocation.minimize}
    facts |= {"aggregate": allocation.problem.aggregate, "method": allocation.method}
    facts |= {"totals": allocation.totals, "bound": allocation.bound, "gap": allocation.gap}
    return facts
