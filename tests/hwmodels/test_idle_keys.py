"""No number of an accelerator file is without effect in silence."""

import random

import pytest

from hwmodels import (
    AcceleratorError,
    GemmWorkload,
    estimate_cost,
    idle_keys,
    load_accelerator,
    with_overrides,
)
from hwmodels.overrides import keys_of
from loraq_sim.machine import datapath_for

SHAPES = (
    {"m": 4096, "n": 1152, "k": 1152},
    {"m": 37, "n": 100, "k": 200},
    {"m": 4096, "n": 1, "k": 8},
)
SPLITS = (
    *(("int", main) for main in ("W4A4", "W4A8", "W8A8", "W3A5", "W16A16", "W8A16i")),
    *(("mxint", "W4A8"), ("mxfp", "W4A4"), ("mxfp", "W6A8"), ("nvfp", "W4A4")),
)
SCHEDULES = ("fused", "unfused", "recompute", "parallel")
TILES = ((16, 16, 16), (64, 64, 32), (8, 8, 8), (128, 128, 64), (24, 40, 56), (128, 192, 256))
FACTORS = (1.5, 0.5, 10, 0.1, 1000, 0.001)
# Of a number that is said to be idle: what matters at all, matters there.
EXTREMES = (1000, 0.001)


def _works():
    for shape in SHAPES:
        for family, main in SPLITS:
            yield GemmWorkload(**shape, main=main, family=family)
            for schedule in SCHEDULES:
                branch = {"branch": "W8A8", "rank": min(24, shape["n"], shape["k"])}
                yield GemmWorkload(
                    **shape, main=main, family=family, **branch, branch_schedule=schedule
                )


# In an order that meets every format, schedule and shape early: most numbers show at once.
# The last one has rows so long that a shorter step of DMA does not reach the next.
WORKS = (
    *random.Random(0).sample(works := tuple(_works()), len(works)),
    GemmWorkload(m=1, n=1, k=2**20, main="W16A16"),
)
SMALL = GemmWorkload(m=16, n=16, k=16, main="W8A8")
TILED = tuple(work for work in WORKS if work.m == 4096 and work.n > 1 and not work.has_branch)


def _results(hw):
    """All the cost model says, one workload and one tile after the other."""
    for work, launch in (*((work, "stream") for work in WORKS), (SMALL, "graph")):
        try:
            cost = estimate_cost(work, hw, launch=launch)
            yield cost.latency_s, cost.energy_j, cost.dram_bytes, cost.busy_s, cost.fits_in
        except AcceleratorError:
            yield "refused"
    for tile in TILES:
        for work in TILED:
            try:
                yield estimate_cost(work, hw, tile_mkn=tile).latency_s
            except AcceleratorError as error:
                yield str(error)


def _numbers(hw):
    content = hw.model_dump()
    for key, steps in keys_of(hw).items():
        value = content
        for step in steps:
            value = value[step]
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _moved(value, factors):
    """Other values of one number, larger and smaller."""
    for factor in factors:
        moved = value * factor if value else 1e-3
        if isinstance(value, int):
            moved = max(1, round(value * factor)) if value else 1
            moved = value + 1 if moved == value else moved
        yield moved


def _with(hw, key, value):
    """`hw` with one number changed, if need be with the limit above it; None if it may not be."""
    above = {
        "kernel.register_block_m": "kernel.tile_m_max_rows",
        "kernel.register_block_n": "kernel.tile_n_max_columns",
        "kernel.tile_k_step": "kernel.tile_k_max",
    }
    for changes in ({key: value}, {key: value, above.get(key, key): value}):
        try:
            return with_overrides(hw, changes)
        except AcceleratorError:
            continue
    return None


def _changes_something(hw, key, value, before, factors):
    for moved in _moved(value, factors):
        changed = _with(hw, key, moved)
        if changed is None:
            continue
        if datapath_for(changed) != datapath_for(hw):
            return True
        if any(new != old for new, old in zip(_results(changed), before, strict=True)):
            return True
    return False


@pytest.mark.parametrize("name", ["aie2", "h100", "systolic"])
def test_every_number_changes_a_result_or_says_why_not(name):
    hw = load_accelerator(name)
    before = list(_results(hw))
    idle = idle_keys(hw)
    recorded = {"datapath.products_per_add", "datapath.accumulators"}
    for key, value in _numbers(hw):
        factors = EXTREMES if key in idle.keys() - recorded else FACTORS
        has_effect = _changes_something(hw, key, value, before, factors)
        assert has_effect != (key in idle) or key in recorded, key


def test_idle_numbers_come_with_a_reason():
    idle = idle_keys(load_accelerator("systolic"))
    assert "closed form in place of tiles" in idle["kernel.tile_m_max_rows"]
    assert "datapath.acc_bits" in idle["modes.int8.accumulator_bits"]
    assert "closed form" not in idle_keys(load_accelerator("aie2")).values()
