"""Elasticities: what a cost depends on, and what it does not."""

import pytest

from hwmodels import GemmWorkload, load_accelerator, sensitivity

WORK = GemmWorkload(m=4096, n=4608, k=1152, main="W8A8", group=None)


def _effects(name):
    return {row["key"]: row for row in sensitivity(WORK, load_accelerator(name))}


def test_a_compute_bound_array_follows_its_clock_and_nothing_off_chip():
    effects = _effects("systolic")
    # 10 % more clock is 1 / 1.1 of the time: -0.0909 / 0.1.
    assert effects["units.clock_hz"]["latency_elasticity"] == pytest.approx(-1 / 1.1, rel=1e-6)
    assert "memories.dram.latency_s" not in effects
    assert effects["energy.dram_pj_per_byte"]["latency_elasticity"] == 0


def test_energy_elasticities_of_energy_constants_sum_to_one():
    effects = _effects("aie2")
    share = sum(
        row["energy_elasticity"] for key, row in effects.items() if key.startswith("energy")
    )
    macs = sum(row["energy_elasticity"] for key, row in effects.items() if "pj_per_mac" in key)
    assert share + macs == pytest.approx(1.0, rel=1e-6)


def test_the_largest_effect_comes_first_and_uncertainty_becomes_a_range():
    rows = sensitivity(WORK, load_accelerator("aie2"))
    sizes = [abs(row["latency_elasticity"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    by_key = {row["key"]: row for row in rows}
    launch = by_key["dispatch.launch_s"]
    assert launch["latency_range"] == pytest.approx(abs(launch["latency_elasticity"]) * 0.5)
