"""What is done to X before the product is charged, and what layers share is charged once."""

import math
from importlib import resources

import pytest

from hwmodels import AcceleratorError, GemmWorkload, estimate_cost, load_accelerator
from hwmodels.description import TRANSFORMS
from hwmodels.overrides import with_overrides

MACHINES = ("aie2", "h100", "systolic")
SCHEDULES = ("fused", "unfused", "down_fused", "recompute")
SIZES = {"m": 4096, "n": 1152, "k": 1152}
BRANCH = {"branch": "W8A8", "rank": 32}


def _cost(name, **fields):
    return estimate_cost(GemmWorkload(**SIZES | fields), load_accelerator(name))


def test_a_rotation_takes_log2_of_its_block_in_additions_per_element():
    plain, rotated = (_cost("aie2", transforms=t) for t in ((), ("hadamard64",)))
    # 4096 x 1152 elements, 6 additions each, on 16 cores of 16 lanes at 1 GHz and 1.7 pJ.
    additions = 4096 * 1152 * 6
    assert rotated.parts["latency_s"]["rotate"] == pytest.approx(additions / 256 / 1e9, rel=1e-12)
    assert rotated.parts["energy_j"]["rotate"] == pytest.approx(additions * 1.7e-12, rel=1e-12)
    assert rotated.latency_s - plain.latency_s >= additions / 256 / 1e9
    # X must be whole before it is rounded: the first pass reads 16 bits.
    moved = rotated.dram_bytes - plain.dram_bytes
    assert moved >= 4096 * 1152 * 2 - 4096 * (1152 // 2 + 18 * 2)
    assert rotated.peak_activation_bytes == 4096 * 1152 * 2 * 2


def test_smoothing_takes_a_multiplication_per_element_and_a_factor_per_channel():
    plain, smooth = (_cost("aie2", transforms=t) for t in ((), ("smooth",)))
    assert smooth.parts["latency_s"]["smooth"] == pytest.approx(4096 * 1152 / 256 / 1e9, rel=1e-12)
    assert smooth.parts["energy_j"]["smooth"] == pytest.approx(4096 * 1152 * 1.7e-12, rel=1e-12)
    assert smooth.parts["weight_bytes"]["smooth"] == 2 * 1152
    assert smooth.dram_bytes - plain.dram_bytes == smooth.parts["dram_bytes"]["smooth"] == 2 * 1152


def test_rounding_x_is_charged_once_for_each_format_it_gets():
    # 0.3 pJ an element on aie2. The other part of `vector`, scaling, is the same with and without.
    def rounded(**fields):
        with_it, without = (_cost("aie2", rounds_x=r, **fields) for r in (True, False))
        joules = with_it.parts["energy_j"]["vector"] - without.parts["energy_j"]["vector"]
        return round(joules / (4096 * 1152 * 0.3e-12))

    assert rounded(main="W4A4") == 1
    assert rounded(main="W16A16") == 0
    assert rounded(main="W4A8", **BRANCH) == 1
    # With codes given, the branch's second format was charged already.
    assert rounded(main="W4A4", **BRANCH) == 1
    assert rounded(main="W4A4", branch="W16A16", rank=32) == 0
    assert rounded(main="W4A4", **BRANCH, branch_schedule="unfused") == 1
    assert rounded(main="W4A8", **BRANCH, branch_schedule="down_fused") == 1


def test_rounding_x_takes_the_vector_units_their_time():
    # 16 elements a cycle on each of 16 cores, and nothing to unpack: 4 bits widen in the load.
    busy = _cost("aie2", main="W4A4").busy_s["vector"]
    assert busy == pytest.approx(4096 * 1152 / 256 / 1e9, rel=1e-12)
    assert _cost("aie2", main="W4A4", rounds_x=False).busy_s["vector"] == 0


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transforms", [("smooth",), ("hadamard128",), ("smooth", "hadamard64")])
def test_transforms_cost_time_energy_and_bytes_everywhere(name, schedule, transforms):
    fields = {"main": "W4A4", **BRANCH, "branch_schedule": schedule}
    plain, more = _cost(name, **fields), _cost(name, **fields, transforms=transforms)
    for metric in ("latency_s", "energy_j", "dram_bytes"):
        assert getattr(more, metric) > getattr(plain, metric), metric
    for total, parts in more.parts.items():
        assert math.fsum(parts.values()) == pytest.approx(getattr(more, total), rel=1e-12)
    assert more.latency_s >= more.roofline_latency_s >= plain.roofline_latency_s


def test_each_kernel_that_reads_x_transforms_it_and_no_other():
    def times(schedule):
        fields = {"main": "W4A8", **BRANCH, "branch_schedule": schedule}
        part = _cost("h100", **fields, transforms=("hadamard64",)).parts["energy_j"]["rotate"]
        return part / (4096 * 1152 * 6 * 1.2e-12)

    assert times("fused") == pytest.approx(1)
    assert times("down_fused") == pytest.approx(1)
    assert times("unfused") == pytest.approx(2)  # Main and X R^T; P L^T reads P.


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("schedule", ["fused", "unfused", "down_fused"])
@pytest.mark.parametrize("layers", [2, 3])
def test_layers_that_share_a_branch_pay_for_it_once(name, schedule, layers):
    fields = {"main": "W4A8", **BRANCH, "transforms": ("smooth",), "branch_schedule": schedule}
    alone, shared = _cost(name, **fields), _cost(name, **fields, shared_by=layers)
    once = [("latency_s", "branch_down"), ("weight_bytes", "right"), ("weight_bytes", "smooth")]
    if schedule != "unfused":  # Main transforms X by itself there.
        once += [("latency_s", "smooth"), ("energy_j", "smooth"), ("dram_bytes", "smooth")]
    for quantity, part in once:
        whole = alone.parts[quantity][part]
        # A byte that does not divide is charged to each.
        left_over = layers if quantity.endswith("bytes") else 0
        assert layers * shared.parts[quantity][part] == pytest.approx(
            whole, abs=left_over, rel=1e-9
        )
    assert shared.energy_j < alone.energy_j
    assert shared.latency_s < alone.latency_s
    assert shared.weight_bytes < alone.weight_bytes
    assert shared.dram_bytes < alone.dram_bytes
    # P L^T is each layer's own.
    up, own = (cost.parts["latency_s"]["branch_up"] for cost in (shared, alone))
    assert up == pytest.approx(own, rel=1e-9)


def test_a_shared_kernel_is_started_once():
    fields = {"main": "W4A8", **BRANCH, "fused": False, "shared_by": 4}
    assert _cost("h100", **fields).parts["latency_s"]["dispatch"] == pytest.approx(2.25 * 3e-6)


def test_a_tile_that_forms_its_own_p_shares_no_more_than_the_stored_r():
    fields = {"main": "W4A8", **BRANCH, "branch_schedule": "recompute"}
    alone, shared = (_cost("h100", **fields, shared_by=n) for n in (1, 3))
    assert shared.parts["latency_s"]["branch_down"] == alone.parts["latency_s"]["branch_down"]
    assert shared.parts["dram_bytes"]["factors"] == alone.parts["dram_bytes"]["factors"]
    assert 3 * shared.parts["weight_bytes"]["right"] == alone.parts["weight_bytes"]["right"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transforms": ("hadamar64",)}, r"'hadamar64' must be 'smooth' or 'hadamardB'"),
        ({"transforms": ("hadamard",)}, r"'hadamard' must be 'smooth' or 'hadamardB'"),
        ({"transforms": ("hadamard48",)}, r"a power of two from 2 that divides k=1152, got 48"),
        ({"transforms": ("hadamard256",)}, r"divides k=1152, got 256; the largest is 128"),
        ({"transforms": ("hadamard1",)}, r"got 1"),
        ({"transforms": "hadamard64x"}, r"must be 'smooth' or 'hadamardB'"),
        ({"transforms": ("smooth", "smooth")}, r"each kind may appear once"),
        ({"transforms": ("hadamard8", "hadamard64")}, r"each kind may appear once"),
        ({"transforms": 5}, r"must be 'smooth' or 'hadamardB'"),
        ({"shared_by": 0}, r"shared_by=0 must be a whole number of at least 1"),
        ({"shared_by": 1.5}, r"shared_by=1.5 must be a whole number"),
        ({"rounds_x": 1}, r"rounds_x=1 must be one of True, False"),
    ],
)
def test_bad_transforms_are_named(fields, message):
    with pytest.raises(AcceleratorError, match=message):
        GemmWorkload(**SIZES | fields)


@pytest.mark.parametrize(
    ("sizes", "level"),
    [((16, 64, 64), "l1"), ((768, 640, 640), "l2"), ((4096, 1152, 1152), "dram")],
)
def test_the_working_set_is_compared_with_the_memories(sizes, level):
    # XDNA1: 16 x 63 KiB of L1 and 2 MiB of L2.
    m, n, k = sizes
    cost = estimate_cost(
        GemmWorkload(m=m, n=n, k=k, main="W8A8", **BRANCH), load_accelerator("aie2")
    )
    p_bytes = m * (32 + 2)
    x_bytes = m * (k + 2 * -(-k // 64))
    assert cost.peak_activation_bytes == x_bytes + p_bytes + 2 * m * n
    assert cost.working_set_bytes == cost.peak_activation_bytes + cost.weight_bytes
    assert cost.fits_in == level


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hadamard", {"transforms": ("hadamard64",)}, "no Hadamard rotation .*leave out rotate="),
        ("smooth", {"transforms": ("smooth",)}, "no smoothing .*leave out smooth="),
        ("residual", {**BRANCH, "feedback_rank": 3}, "no residual input .*write [+] for ~"),
    ],
)
def test_a_machine_refuses_a_transform_that_its_file_does_not_list(tmp_path, name, fields, message):
    text = (resources.files("hwmodels") / "accelerators" / "aie2.yaml").read_text()
    others = [other for other in TRANSFORMS if other != name]
    text = text.replace("name: aie2\n", "name: bare\n", 1).replace("[xdna1, npu1]", "[]")
    path = tmp_path / "bare.yaml"
    path.write_text(f"{text}\ntransforms: [{', '.join(others)}]\n")
    bare = load_accelerator(str(path))
    work = GemmWorkload(**SIZES | fields)
    with pytest.raises(AcceleratorError, match=rf"bare has {message}") as caught:
        estimate_cost(work, bare)
    assert "\n" not in str(caught.value)
    # All else costs what it does on the machine with everything, and that machine takes it.
    assert estimate_cost(work, load_accelerator("aie2")).latency_s > 0
    plain = GemmWorkload(**SIZES)
    assert estimate_cost(plain, bare).latency_s == _cost("aie2").latency_s
    path.write_text(f"{text}\ntransforms: [fourier]\n")
    with pytest.raises(AcceleratorError, match="transforms"):
        load_accelerator(str(path))


def test_transforms_may_have_a_rate_and_an_energy_of_their_own():
    hw = load_accelerator("aie2")
    quick = with_overrides(
        hw, {"vector.transform_elements_per_cycle": 64, "energy.transform_pj_per_element": 0.5}
    )
    work = GemmWorkload(**SIZES, transforms=("hadamard64", "smooth"))
    cost = estimate_cost(work, quick)
    elements = 4096 * 1152
    assert cost.parts["latency_s"]["rotate"] == pytest.approx(6 * elements / 1024 / 1e9, rel=1e-12)
    assert cost.parts["energy_j"]["smooth"] == pytest.approx(elements * 0.5e-12, rel=1e-12)
    for part in ("main", "vector"):
        known = estimate_cost(work, hw).parts["energy_j"].get(part)
        assert cost.parts["energy_j"].get(part) == known
