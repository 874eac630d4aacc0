"""The systolic array against SCALE-Sim's cycles, ZigZag's, and a count of folds by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import AcceleratorError, GemmWorkload, estimate_cost, load_accelerator, with_overrides
from hwmodels.kernel_cycles import systolic_cycles

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


@pytest.mark.parametrize("dataflow", ["weight_stationary", "input_stationary", "output_stationary"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), k=st.integers(1, 12),
    rows=st.integers(1, 6), columns=st.integers(1, 6),
)  # fmt: skip
def test_every_dataflow_follows_its_operands_through_the_array(m, n, k, rows, columns, dataflow):
    stays, other = {
        "weight_stationary": ((k, n), m),
        "input_stationary": ((k, m), n),
        "output_stationary": ((m, n), k),
    }[dataflow]
    cycles = 0
    for _ in range(0, stays[0], rows):
        for _ in range(0, stays[1], columns):
            if dataflow != "output_stationary":
                cycles += rows  # One row of the operand that stays enters a cycle.
            # The last step enters at `other - 1`, one later in each row and column.
            cycles += other + (rows - 1) + (columns - 1)
    assert systolic_cycles(m, n, k, rows=rows, columns=columns, dataflow=dataflow) == cycles - 1


# Cycles of SCALE-Sim 3.0.0 by its own count, folds * (K + rows + columns - 2) - 1.
@pytest.mark.parametrize(
    ("array", "mnk", "cycles"),
    [
        ((2, 2), (4, 4, 4), 4 * (4 + 2) - 1),
        ((2, 2), (3, 5, 7), 6 * (7 + 2) - 1),
        ((8, 4), (20, 9, 30), 9 * (30 + 10) - 1),
        ((32, 32), (256, 256, 768), 64 * (768 + 62) - 1),
    ],
)
def test_outputs_that_stay_have_nothing_to_load(array, mnk, cycles):
    rows, columns = array
    size = {"rows": rows, "columns": columns, "dataflow": "output_stationary"}
    assert systolic_cycles(*mnk, **size) == cycles


# Compute cycles that SCALE-Sim 3.0.0 reports (CALC, SRAM of 4 MiB) for weights, inputs and outputs
# that stay.
SCALE_SIM_REPORTS = {
    ((2, 2), (3, 5, 7)): (83, 71, 53),
    ((4, 8), (20, 9, 30)): (543, 551, 399),
    ((8, 4), (20, 9, 30)): (455, 539, 359),
    ((32, 32), (256, 288, 512)): (50_399, 48_895, 41_327),
}


@pytest.mark.parametrize(("array", "mnk"), SCALE_SIM_REPORTS, ids=str)
def test_all_three_dataflows_take_what_scale_sim_reports(array, mnk):
    dataflows = ("weight_stationary", "input_stationary", "output_stationary")
    size = {"rows": array[0], "columns": array[1]}
    cycles = tuple(systolic_cycles(*mnk, **size, dataflow=name) for name in dataflows)
    assert cycles == SCALE_SIM_REPORTS[array, mnk]


def test_one_element_never_beats_its_own_peak():
    hw = load_accelerator("systolic@output_stationary")
    tiny = with_overrides(hw, {"units.rows": 1, "units.columns": 1})
    cost = estimate_cost(GemmWorkload(m=5, n=6, k=7, main="W8A8", group=None), tiny)
    assert cost.latency_s >= cost.roofline_latency_s


def test_the_lanes_below_the_columns_grow_with_the_array():
    # 256 x 768 x 256 on 128 x 128: 12 folds of 256 + 128 + 254, less one; y of 8 bits keeps DRAM
    # out of the way (SCALE-Sim issue 51).
    larger = with_overrides(load_accelerator("systolic"), {"units.rows": 128, "units.columns": 128})
    work = GemmWorkload(m=256, n=256, k=768, main="W8A8", out_bits=8)
    cost = estimate_cost(work, larger)
    assert cost.bound == "compute"
    assert cost.cycles == pytest.approx(12 * (256 + 128 + 254) - 1, rel=1e-12)
    # A column that scales one sum a cycle: 12 groups of 256 x 256 sums on 128 lanes.
    assert cost.parts["latency_s"]["combine"] == 0


def test_lanes_by_column_are_for_systolic_arrays():
    with pytest.raises(AcceleratorError, match=r"vector.scope 'column' is for organization"):
        with_overrides(load_accelerator("aie2"), {"vector.scope": "column"})


def test_variants_run_their_dataflow():
    shape = (512, 1024, 576)
    expected = systolic_cycles(512, 576, 1024, rows=32, columns=32, dataflow="output_stationary")
    cost = _cost(shape, "systolic@output_stationary", out_bits=8, group=None)
    assert cost.cycles == pytest.approx(expected, rel=1e-12)
