"""Costs: laws every estimate must obey, and the facts that must come out."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hwmodels import (
    AcceleratorError,
    GemmWorkload,
    estimate_cost,
    list_accelerators,
    load_accelerator,
)

MACHINES = {name: load_accelerator(name) for name in list_accelerators()}
METRICS = ("latency_s", "energy_j", "dram_bytes", "weight_bytes")
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)

machines = st.sampled_from(sorted(MACHINES)).map(MACHINES.__getitem__)
sizes = st.one_of(
    st.integers(1, 200), st.integers(1, 6000), st.integers(1, 300).map(lambda i: 16 * i)
)
quantized = st.integers(2, 8)
families = st.sampled_from(["int", "int", "mxint", "mxfp", "nvfp"])
schedules = st.sampled_from(["fused", "unfused", "down_fused", "recompute", "given_p", "parallel"])


@st.composite
def workloads(draw, *, with_branch=None):
    m, n, k = draw(sizes), draw(sizes), draw(sizes)
    family = draw(families)
    bits = quantized if family == "int" else st.sampled_from([4, 6, 8])
    fields = {
        "m": m, "n": n, "k": k,
        "main": f"W{draw(bits)}A{draw(bits)}",
        "family": family,
        "group": draw(st.sampled_from([None, 32, 64, 128])),
        "out_bits": draw(st.sampled_from([8, 16, 32])),
        "branch_schedule": draw(schedules),
        "transforms": draw(st.sampled_from([(), ("smooth",)])),
        "shared_by": draw(st.sampled_from([1, 1, 3])),
    }  # fmt: skip
    if draw(st.booleans()) if with_branch is None else with_branch:
        fields["branch"] = f"W{draw(bits)}A{draw(bits)}"
        fields["rank"] = draw(st.integers(1, min(n, k, 256)))
    return fields


def _cost(hw, fields, **changes):
    if fields.get("branch_schedule") == "parallel":
        assume(hw.side_unit is not None)
    return estimate_cost(GemmWorkload(**(fields | changes)), hw)


def _changed(hw, block, **values):
    """A copy of `hw` with values of one block replaced."""
    part = hw
    for name in block.split("."):
        part = getattr(part, name)
    part = part.model_copy(update=values)
    for name in reversed(block.split(".")[:-1]):
        part = getattr(hw, name).model_copy(update={block.split(".")[-1]: part})
    return hw.model_copy(update={block.split(".")[0]: part})


def _without_free_widening(hw):
    """The machine without a load that widens 4 but not 3 bits, whose unpacking costs more."""
    return _changed(hw, "vector", load_widens_bits=())


def _assert_not_cheaper(more, less, metrics=METRICS):
    for metric in metrics:
        assert getattr(more, metric) >= getattr(less, metric), metric


@SETTINGS
@given(hw=machines, fields=workloads(), key=st.sampled_from("mnk"), more=st.integers(1, 600))
def test_cost_never_falls_when_the_layer_grows(hw, fields, key, more):
    larger = _cost(hw, fields, **{key: fields[key] + more})
    _assert_not_cheaper(larger, _cost(hw, fields))


@SETTINGS
@given(
    hw=machines, fields=workloads(), key=st.sampled_from("mnk"), more=st.integers(1, 9),
    block=st.sampled_from([2, 16, 64, 512]),
)  # fmt: skip
def test_cost_never_falls_when_a_rotated_layer_or_its_block_grows(hw, fields, key, more, block):
    k = block * 2 * -(-fields["k"] // (2 * block))
    fields |= {"k": k, "transforms": (*fields["transforms"], f"hadamard{block}")}
    rotated = _cost(hw, fields)
    _assert_not_cheaper(rotated, _cost(hw, fields, transforms=fields["transforms"][:-1]))
    larger = fields[key] + (2 * block * more if key == "k" else more)
    _assert_not_cheaper(_cost(hw, fields, **{key: larger}), rotated)
    wider = (*fields["transforms"][:-1], f"hadamard{2 * block}")
    _assert_not_cheaper(_cost(hw, fields, transforms=wider), rotated)
    assert rotated.latency_s >= rotated.roofline_latency_s


@SETTINGS
@given(hw=machines, fields=workloads(with_branch=True), more=st.integers(1, 64))
def test_cost_never_falls_when_the_rank_grows(hw, fields, more):
    rank = min(fields["rank"] + more, fields["n"], fields["k"])
    _assert_not_cheaper(_cost(hw, fields, rank=rank), _cost(hw, fields))


@SETTINGS
@given(hw=machines, fields=workloads(with_branch=False), which=st.sampled_from("wa"))
def test_cost_never_falls_when_the_main_branch_widens(hw, fields, which):
    w_bits, a_bits = GemmWorkload(**fields).main_bits
    step = 1 if fields["family"] == "int" else 2
    if fields["family"] == "nvfp" and 4 in (w_bits, a_bits):
        step = 0  # From NVFP4 to MXFP6 the scales get coarser: bytes rise, scaling work may fall.
    wider = (min(w_bits + step, 8), a_bits) if which == "w" else (w_bits, min(a_bits + step, 8))
    hw = _without_free_widening(hw)
    _assert_not_cheaper(_cost(hw, fields, main="W{}A{}".format(*wider)), _cost(hw, fields))


@SETTINGS
@given(hw=machines, fields=workloads(with_branch=True))
def test_cost_never_falls_when_the_factors_widen(hw, fields):
    # Activation bits are left alone: at main's own width the branch shares X and gets cheaper.
    w_bits, a_bits = GemmWorkload(**fields).branch_bits
    step = 1 if fields["family"] == "int" else 2
    if fields["family"] == "nvfp" and 4 in (w_bits, a_bits):
        step = 0
    hw = _without_free_widening(hw)
    wider = _cost(hw, fields, branch=f"W{min(w_bits + step, 8)}A{a_bits}")
    _assert_not_cheaper(wider, _cost(hw, fields))


@SETTINGS
@given(
    hw=machines,
    m=sizes,
    n=st.integers(64, 5000),
    k=st.integers(64, 5000),
    branch=st.sampled_from([None, "W8A8", "W16A16"]),
    fused=st.booleans(),
)
def test_w4a4_is_never_dearer_than_w4a8_than_w8a8(hw, m, n, k, branch, fused):
    fields = {"m": m, "n": n, "k": k, "branch": branch, "rank": 32 if branch else 0}
    costs = [_cost(hw, fields, main=p, fused=fused) for p in ("W4A4", "W4A8", "W8A8")]
    _assert_not_cheaper(costs[1], costs[0])
    _assert_not_cheaper(costs[2], costs[1])


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("shape", [(4096, 1152, 1152), (4096, 4608, 1152), (4096, 3072, 3072)])
def test_sixteen_bit_layers_cost_most(name, shape):
    m, n, k = shape
    costs = [_cost(MACHINES[name], {"m": m, "n": n, "k": k}, main=p) for p in ("W8A8", "W16A16")]
    _assert_not_cheaper(costs[1], costs[0])


@SETTINGS
@given(
    hw=machines,
    fields=workloads(),
    change=st.sampled_from(
        [
            ("units", "clock_hz"),
            ("units", "rows"),
            ("units", "columns"),
            ("memories.dram", "bandwidth_bytes_per_s"),
            ("memories.l2", "bandwidth_bytes_per_cycle"),
            ("memories.l2", "capacity_bytes"),
            ("memories.l1", "capacity_bytes"),
            ("memories.l1", "fill_bytes_per_cycle"),
            ("kernel", "load_bytes_per_cycle"),
            ("vector", "combine_elements_per_cycle"),
            ("vector", "unpack_elements_per_cycle"),
        ]
    ),
    factor=st.integers(2, 4),
)
def test_latency_never_rises_with_a_faster_or_larger_machine(hw, fields, change, factor):
    block, key = change
    # A larger systolic array has a longer fill and drain, as its closed form says.
    assume(not (block == "units" and key != "clock_hz" and hw.units.dataflow))
    part = hw
    for name in block.split("."):
        part = getattr(part, name)
    faster = _changed(hw, block, **{key: getattr(part, key) * factor})
    _assert_not_cheaper(_cost(hw, fields), _cost(faster, fields), ("latency_s",))


@SETTINGS
@given(hw=machines, fields=workloads())
def test_parts_sum_to_totals_and_the_roofline_holds(hw, fields):
    cost = _cost(hw, fields)
    for total, parts in cost.parts.items():
        # Parts are differences and sums of at most 30 float64 terms of the size of the total.
        assert math.fsum(parts.values()) == pytest.approx(getattr(cost, total), rel=1e-12)
        assert min(parts.values()) >= 0
    assert cost.latency_s >= cost.roofline_latency_s
    assert 0 < cost.utilization <= 1
    assert cost.cycles == cost.latency_s * hw.units.clock_hz


@SETTINGS
@given(hw=machines, fields=workloads(with_branch=False))
def test_rank_zero_costs_exactly_nothing(hw, fields):
    plain = {key: value for key, value in fields.items() if key != "branch_schedule"}
    assert _cost(hw, fields, branch="W8A8", rank=0) == _cost(hw, plain)


@SETTINGS
@given(hw=machines, fields=workloads(with_branch=True))
def test_a_branch_never_comes_for_less_than_nothing(hw, fields):
    _assert_not_cheaper(_cost(hw, fields), _cost(hw, fields, branch=None, rank=0))


@pytest.mark.parametrize("shape", [(4096, 3072, 3072), (4096, 4608, 1152), (4096, 1152, 4608)])
def test_unfused_branch_costs_tens_of_percent_on_a_gpu_and_fused_a_few(shape):
    m, n, k = shape
    fields = {"m": m, "n": n, "k": k, "main": "W4A4"}
    plain = _cost(MACHINES["a100"], fields).latency_s
    fused = _cost(MACHINES["a100"], fields, branch="W16A16", rank=32).latency_s
    unfused = _cost(MACHINES["a100"], fields, branch="W16A16", rank=32, fused=False).latency_s
    # SVDQuant reports +57 % unfused for its 4-bit layers, and 5 to 10 % at most once fused.
    assert 0.25 < unfused / plain - 1 < 0.9
    assert 0.01 < fused / plain - 1 < 0.10


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("branch", ["W8A8", "W6A6", "W4A4"])
def test_fusing_never_costs_more(name, branch):
    fields = {"m": 4096, "n": 4608, "k": 1152, "main": "W4A8", "branch": branch, "rank": 64}
    _assert_not_cheaper(_cost(MACHINES[name], fields, fused=False), _cost(MACHINES[name], fields))


def test_a_shared_format_reads_x_once_and_another_one_reads_the_wider():
    fields = {"m": 4096, "n": 1152, "k": 1152, "branch": "W8A8", "rank": 32}
    shared = _cost(MACHINES["a100"], fields, main="W4A8").parts["dram_bytes"]["activations"]
    mixed = _cost(MACHINES["a100"], fields, main="W4A4").parts["dram_bytes"]["activations"]
    assert shared == mixed == 4096 * (1152 + 18 * 2)


def test_unfused_moves_p_and_the_output_again():
    fields = {"m": 16384, "n": 1152, "k": 1152, "main": "W4A8", "branch": "W8A8", "rank": 32}
    parts = _cost(MACHINES["a100"], fields, fused=False).parts
    assert parts["dram_bytes"]["output"] == 3 * 16384 * 1152 * 2
    assert parts["dram_bytes"]["p"] == 2 * 16384 * (32 + 2)
    assert parts["latency_s"]["dispatch"] == pytest.approx(3 * 3e-6)


def test_an_output_that_fits_in_l2_is_not_read_back_from_dram():
    fields = {"m": 4096, "n": 1152, "k": 1152, "main": "W4A8", "branch": "W8A8", "rank": 32}
    parts = _cost(MACHINES["a100"], fields, fused=False).parts
    assert parts["dram_bytes"]["output"] == 2 * 4096 * 1152 * 2  # 9.4 MB in half of 40 MB


GPUS = sorted(name for name, hw in MACHINES.items() if hw.units.organization == "grid")


@pytest.mark.parametrize("name", GPUS)
def test_fusing_the_branch_is_what_makes_it_cheap_on_every_gpu(name):
    fields = {"m": 4096, "n": 3072, "k": 3072, "main": "W4A4"}
    plain = _cost(MACHINES[name], fields).latency_s
    overheads = [
        _cost(MACHINES[name], fields, branch="W16A16", rank=32, branch_schedule=s).latency_s / plain
        - 1
        for s in ("fused", "down_fused", "unfused")
    ]
    assert overheads[0] < min(overheads[1:])
    # The L40S's kernels hide little of memory behind compute: X in 16 bits adds to the time. In
    # Trainium2, whose integers are multiplied as bf16, it comes through each core's own DMA.
    assert overheads[0] < (0.25 if name in ("l40s", "trainium2") else 0.16)
    assert 0.2 < overheads[2] < 1.1


def test_forming_p_again_in_every_tile_costs_its_share_of_macs():
    # Rank 64 in 256-column tiles: a quarter of the main MACs again, as in the authors' kernel.
    fields = {"m": 4096, "n": 12288, "k": 3072, "main": "W4A8", "family": "mxfp"}
    plain = _cost(MACHINES["mi350x"], fields)
    branch = {"branch": "W8A8", "rank": 64}
    again = _cost(MACHINES["mi350x"], fields, **branch, branch_schedule="recompute")
    once = _cost(MACHINES["mi350x"], fields, **branch)
    assert 0.2 < again.latency_s / plain.latency_s - 1 < 0.4
    assert once.latency_s / plain.latency_s - 1 < 0.06


def test_a_side_unit_hides_the_down_projection_or_becomes_the_bound():
    fields = {"m": 4096, "n": 4608, "k": 1152, "main": "W4A8", "branch": "W8A8"}
    hidden = _cost(MACHINES["h100"], fields, rank=16, branch_schedule="parallel")
    assert hidden.latency_s < _cost(MACHINES["h100"], fields, rank=16).latency_s
    slow = _changed(MACHINES["h100"], "side_unit", macs_per_cycle=64)
    assert _cost(slow, fields, rank=64, branch_schedule="parallel").bound == "side"
    with pytest.raises(AcceleratorError, match="needs a side_unit block in the file of systolic"):
        estimate_cost(
            GemmWorkload(**fields, rank=16, branch_schedule="parallel"), MACHINES["systolic"]
        )


def test_weight_bytes_do_not_depend_on_the_machine():
    fields = {"m": 64, "n": 1152, "k": 1152, "main": "W4A4", "branch": "W8A8", "rank": 64}
    costs = [_cost(hw, fields) for hw in MACHINES.values()]
    assert costs[0].weight_bytes == costs[1].weight_bytes == 663552 + 41472 + 76032 + 76032


def test_group_scales_cost_time_that_row_scales_do_not():
    fields = {"m": 4096, "n": 1152, "k": 1152, "main": "W4A8"}
    grouped, by_row = (_cost(MACHINES["aie2"], fields, group=g) for g in (64, None))
    assert grouped.parts["latency_s"]["combine"] > 10 * by_row.parts["latency_s"]["combine"]


@pytest.mark.parametrize(
    ("name", "fields", "bound"),
    [
        ("aie2", {"m": 1, "n": 64, "k": 64}, "dispatch"),
        ("a100", {"m": 4096, "n": 4608, "k": 4608, "main": "W8A8", "group": None}, "compute"),
        ("a100", {"m": 4096, "n": 4608, "k": 4608, "main": "W4A4", "group": 32}, "vector"),
        ("a100", {"m": 64, "n": 16384, "k": 16384, "main": "W8A8"}, "dram"),
    ],
)
def test_the_bound_is_named(name, fields, bound):
    assert _cost(MACHINES[name], fields).bound == bound


def test_the_bound_of_several_kernels_is_that_of_most_of_the_time():
    fields = {"m": 16384, "n": 4608, "k": 256, "main": "W8A8", "branch": "W8A8", "rank": 256}
    cost = _cost(MACHINES["a100"], fields, fused=False)
    assert [kernel.bound for kernel in cost.kernels] == ["compute", "compute", "dram"]
    assert cost.kernels[2].latency_s > cost.latency_s / 2
    assert cost.bound == "dram"


def test_a_machine_too_small_for_any_tile_says_which_key():
    tiny = _changed(MACHINES["aie2"], "memories.l1", capacity_bytes=1100)
    with pytest.raises(AcceleratorError, match=r"memories.l1.capacity_bytes=1100"):
        _cost(tiny, {"m": 64, "n": 64, "k": 64})
