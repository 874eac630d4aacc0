"""The systolic array against SCALE-Sim's cycles, ZigZag's, and a count of folds by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import GemmWorkload, estimate_cost, load_accelerator
from hwmodels.systolic import systolic_cycles

# (m, k, n) and cycles of SCALE-Sim 3.0.0 on a 32 x 32 weight-stationary array; the last is the
# whole of PixArt's first feed-forward layer, from its slices.
SCALE_SIM = [
    ((256, 512, 288), 50_399),
    ((512, 1024, 576), 349_055),
    ((4096, 32, 1152), 150_839),
    ((4096, 64, 1152), 301_679),
    ((4096, 1152, 32), 150_839),
    ((4096, 1152, 4608), 21_720_959),
]
ZIGZAG = [
    ((4096, 1152, 4608), 21_360_190),
    ((4096, 1152, 1152), 5_399_486),
    ((4096, 4608, 1152), 22_025_149),
]


def _cost(shape, name="systolic", **fields):
    m, k, n = shape
    work = GemmWorkload(m=m, n=n, k=k, **{"main": "W8A8"} | fields)
    return estimate_cost(work, load_accelerator(name))


@pytest.mark.parametrize(("shape", "cycles"), SCALE_SIM)
def test_the_closed_form_is_scale_sims(shape, cycles):
    m, k, n = shape
    assert systolic_cycles(m, n, k, rows=32, columns=32) == cycles


@pytest.mark.parametrize(("shape", "cycles"), SCALE_SIM)
@pytest.mark.parametrize("group", [None, 64])
def test_the_shipped_template_costs_exactly_those_cycles(shape, cycles, group):
    assert _cost(shape, group=group).cycles == pytest.approx(cycles, rel=1e-12)


@pytest.mark.parametrize(("shape", "cycles"), ZIGZAG)
def test_zigzags_cycles_are_within_two_percent(shape, cycles):
    assert _cost(shape).cycles == pytest.approx(cycles, rel=0.02)
    assert _cost(shape, "systolic@zigzag_memory", out_bits=8).cycles == pytest.approx(
        cycles, rel=0.02
    )


def test_mac_energy_is_zigzags():
    # 21,743,271,936 MACs of 0.04 pJ: 869.73 uJ in ZigZag's breakdown.
    energy = _cost((4096, 1152, 4608)).parts["energy_j"]["mac_main"]
    assert energy == pytest.approx(869.73e-6, rel=1e-5)


def test_an_unfused_rank_32_branch_costs_about_fourteen_percent():
    shape = (4096, 1152, 4608)
    plain = _cost(shape).latency_s
    branch = {"branch": "W8A8", "rank": 32}
    unfused = _cost(shape, **branch, fused=False).latency_s / plain - 1
    fused = _cost(shape, **branch).latency_s / plain - 1
    assert unfused == pytest.approx(0.141, abs=0.01)  # two layers of their own in ZigZag: +14.1 %
    assert 0.03 < fused < 0.05  # +3.5 % of the MACs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(m=st.integers(1, 60), n=st.integers(1, 60), k=st.integers(1, 60), size=st.integers(1, 9))
def test_folds_counted_by_hand(m, n, k, size):
    folds = len(range(0, k, size)) * len(range(0, n, size))
    per_fold = m + size + (2 * size - 2)  # stream, load the weights, skew and drain
    assert systolic_cycles(m, n, k, rows=size, columns=size) == folds * per_fold - 1


@pytest.mark.parametrize(
    ("dataflow", "as_weight_stationary"),
    [("output_stationary", (100, 70, 50)), ("input_stationary", (70, 50, 100))],
)
def test_other_dataflows_permute_the_same_form(dataflow, as_weight_stationary):
    size = {"rows": 8, "columns": 16}
    cycles = systolic_cycles(50, 70, 100, dataflow=dataflow, **size)
    assert cycles == systolic_cycles(*as_weight_stationary, **size)


def test_variants_run_their_dataflow():
    shape = (512, 1024, 576)
    expected = systolic_cycles(512, 576, 1024, rows=32, columns=32, dataflow="output_stationary")
    cost = _cost(shape, "systolic@output_stationary", out_bits=8, group=None)
    assert cost.cycles == pytest.approx(expected, rel=1e-12)
