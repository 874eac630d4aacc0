"""Which splits of a plan cannot be solved in which layers, known before anything runs.

A rank must not exceed min(N, K) of a layer, and a budget must hold one rank. A split that breaks
this in every layer it is for is a mistake of the plan; one that does so in some layers, as happens
with mixed shapes, fails there and is worth doing elsewhere.
"""

from collections.abc import Iterable
from functools import lru_cache

from loraq_sim.conditioning import hadamard_block
from loraq_sim.dumps import LayerInfo
from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.split import PrecisionSplit, branch_bytes
from loraq_sim.sweeps.cases import SweepTask

__all__ = [
    "check_split_fit",
    "check_transform_fit",
]


def check_split_fit(tasks: Iterable[SweepTask]) -> list[str]:
    """One sentence on each split that some of its layers cannot take.

    Raises
    ------
    InputError
        If none of a split's layers can; the message has a split that fits.
    """
    infos: dict[PrecisionSplit, dict[str, LayerInfo]] = {}
    n_cases: dict[tuple[PrecisionSplit, str], int] = {}
    for task in tasks:
        for case in task.cases:
            split = case.settings.split
            if task.info is not None:
                infos.setdefault(split, {})[task.layer] = task.info
            n_cases[split, task.layer] = n_cases.get((split, task.layer), 0) + 1
    notes = []
    for split, layers in infos.items():
        broken = {name: info for name, info in layers.items() if _broken_rule(split, info)}
        if len(broken) == len(layers) > 0:
            raise InputError(_refusal(split, broken))
        if broken:
            name, info = next(iter(broken.items()))
            count = sum(n_cases[split, layer] for layer in broken)
            notes.append(
                f"split {split} fails in {len(broken)} of {len(layers)} layers ({count} cases), "
                f"such as {name}: {_broken_rule(split, info)}"
            )
    return notes


def check_transform_fit(tasks: Iterable[SweepTask]) -> list[str]:
    """One sentence on each rotation or smoothing that some of its layers cannot take.

    Raises
    ------
    InputError
        If none of its layers can.
    """
    layers: dict[tuple[str, str | float], dict[str, LayerInfo]] = {}
    for task in tasks:
        for case in task.cases:
            if task.info is None:
                continue
            for key in ("rotate", "smooth"):
                value = getattr(case.settings, key)
                if value is not None:
                    layers.setdefault((key, value), {})[task.layer] = task.info
    notes = []
    for (key, value), infos in layers.items():
        broken = {name: rule for name, i in infos.items() if (rule := _unfit(key, value, i))}
        if not broken:
            continue
        name, rule = next(iter(broken.items()))
        if len(broken) == len(infos):
            raise InputError(f"{key} {value} fits none of its {len(infos)} layers; {name}: {rule}")
        where = f"{len(broken)} of {len(infos)} layers, such as {name}"
        notes.append(f"{key} {value} fails in {where}: {rule}")
    return notes


def _unfit(key: str, value: str | float, info: LayerInfo) -> str:
    if key == "smooth":
        return "" if info.tokens else "smoothing by strength needs activations"
    try:
        hadamard_block(str(value), info.k)
    except InputError as error:
        return str(error)
    return ""


def _broken_rule(split: PrecisionSplit, info: LayerInfo) -> str:
    """Why the layer cannot take the split, empty if it can."""
    return _broken_rule_of_shape(split, info.n, info.k)


# Models repeat their shapes.
@lru_cache(maxsize=4096)
def _broken_rule_of_shape(split: PrecisionSplit, n: int, k: int) -> str:
    from loraq_sim.solvers.solve import resolve_rank

    if not split.has_branch:
        return ""
    try:
        resolve_rank((n, k), split.branch_weight, split.rank, split.budget)
    except InputError as error:
        return str(error)
    return ""


def _refusal(split: PrecisionSplit, layers: dict[str, LayerInfo]) -> str:
    """What is wrong in the layer that comes nearest, and what would fit there."""
    sizes = {name: _nearest_size(split, info) for name, info in layers.items()}
    wanted = split.rank or 0
    if split.budget is not None:
        wanted = int(split.budget.rpartition("@")[2])
    name = min(sizes, key=lambda layer: abs(sizes[layer] - wanted))
    info = layers[name]
    which = "its only layer" if len(layers) == 1 else f"any of its {len(layers)} layers"
    size = split.text.removesuffix(str(wanted)) + str(sizes[name])
    bound = "a smaller rank" if split.budget is None else "a larger budget"
    return (
        f"split {split.text} cannot be solved in {which}; {name} ({info.n}, {info.k}) comes "
        f"nearest: {_broken_rule(split, info)}; use {size} or {bound}"
    )


def _nearest_size(split: PrecisionSplit, info: LayerInfo) -> int:
    """The largest rank the layer takes, or the least rank of a budget that holds one rank."""
    if split.budget is None or split.branch_weight is None:
        return min(info.n, info.k)
    least = branch_bytes(info.n, info.k, 1, split.branch_weight)
    fmt = parse_format(split.budget.partition("@")[0])
    rank = 1
    while branch_bytes(info.n, info.k, rank, fmt) < least:
        rank += 1
    return rank
