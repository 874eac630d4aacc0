import pytest

import hwmodels
from hwmodels.families import usual_families
from loraq_sim.results.choice import FEWEST_ROWS, latency_accuracy, with_latency_bounds


def _usual(machine):
    """Validated rows of the kernels that a layer would get; others are asked for by name."""
    hw = hwmodels.load_accelerator(machine)
    rows = hwmodels.validate(hw, hwmodels.measured_rows())
    return [row for row in rows if row["kernel_family"] in usual_families(hw)]


def test_the_accuracy_is_the_worst_error_of_the_devices_own_rows():
    results = _usual("aie2")
    assert len(results) >= FEWEST_ROWS
    worst, seen = latency_accuracy("aie2")
    assert worst == max(abs(row["error"]) for row in results)
    assert seen.startswith(f"worst of {len(results)} GEMMs measured on aie2, of the kernels")


def test_devices_with_few_rows_or_none_get_the_worst_of_all():
    paper, seen = latency_accuracy("a chip on paper")
    assert "0 of them a chip on paper" in seen
    names = hwmodels.list_accelerators()
    counts = {name: len(_usual(name)) for name in names}
    few = [name for name in names if counts[name] < FEWEST_ROWS]
    assert few
    for name in few:
        worst, seen = latency_accuracy(name)
        assert worst == paper
        assert f"{counts[name]} of them {name}" in seen
    worst_of_all = max(abs(row["error"]) for name in names for row in _usual(name))
    assert paper == worst_of_all >= latency_accuracy("aie2")[0]


def test_every_measured_time_lies_within_the_bounds():
    for row in _usual("aie2"):
        (bounded,) = with_latency_bounds(
            [{"accelerator": "aie2", "latency_s": row["predicted_ms"]}]
        )
        # The worst row lies on a bound; two divisions of rounding.
        assert bounded["latency_lo_s"] <= row["measured_ms"] * (1 + 1e-12)
        assert bounded["latency_hi_s"] >= row["measured_ms"] * (1 - 1e-12)


def test_rows_closer_than_the_models_error_are_counted_per_group():
    rows = [{"accelerator": "aie2", "latency_s": t} for t in (1.0, 1.07, 2.0, None)]
    rows.append({"accelerator": "a100", "latency_s": 1.0})
    bounded = with_latency_bounds(rows)
    assert [row["within_uncertainty"] for row in bounded] == [1, 1, 0, None, 0]
    assert bounded[3]["latency_lo_s"] is None
    assert bounded[0]["latency_lo_s"] == pytest.approx(1 / (1 + latency_accuracy("aie2")[0]))
