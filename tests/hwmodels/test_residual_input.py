"""What a residual input costs: two skinny GEMMs before the layer, and the codes of D."""

import dataclasses

import numpy as np
import pytest

import loraq_sim as lq
from hwmodels import AcceleratorError, GemmWorkload, estimate_cost, load_accelerator
from hwmodels.branch import split_into_kernels
from hwmodels.overrides import with_overrides
from loraq_sim.solvers import solve

MACHINES = ("aie2", "h100", "rtx4090")


def _work(**changes) -> GemmWorkload:
    sizes = {"m": 512, "n": 384, "k": 256, "main": "W4A4", "branch": "W8A8", "rank": 62}
    return GemmWorkload(**(sizes | changes))


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("int", "W4A4~W8A8r62f31"),
        ("int", "W4A4~W8A8r12f8"),
        ("int", "W4A4~W8A8r12f9"),
        ("int", "W4A4~W6A6r12f5"),
        ("int", "W4A4~W6A6r16f16"),
        ("int", "W4A8~W16A16r9f2"),
        ("mxint", "W4A4~W8A8r40f33"),
        ("nvfp", "W4A4~W4A4r20f7"),
    ],
)
def test_stored_bytes_are_those_of_the_packed_solution(family, split):
    n, k = 96, 200
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((n, k)), rng.standard_normal((64, k))
    asked = lq.parse_split(split, family=family)
    solution = solve(
        weight, main=asked.main_weight, branch=asked.branch_weight, rank=asked.rank,
        feedback=asked.feedback, activations=x, preset="fast",
    )  # fmt: skip
    row = lq.evaluate_layer(
        lq.Layer(name="a", weight=weight.astype(np.float32), activations=x.astype(np.float32)),
        asked, "h100", solution=solution, rows=64,
    )  # fmt: skip
    work = GemmWorkload(
        m=64, n=n, k=k, main=asked.main, branch=asked.branch, rank=asked.rank, family=family,
        feedback_rank=asked.feedback, group=64, scale_bits=8 if family != "int" else 16,
    )  # fmt: skip
    counted = {part: size for part, size in work.weight_bytes().items() if size}
    assert counted == {part: size for part, size in solution.bytes_by_part.items() if size}
    assert row["weight_bytes"] == sum(counted.values())
    assert row["feedback_rank"] == asked.feedback


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("schedule", ["fused", "unfused", "down_fused", "recompute"])
@pytest.mark.parametrize("spent", [1, 31, 62])
def test_it_is_charged_in_every_schedule(machine, schedule, spent):
    hw = load_accelerator(machine)
    plain = estimate_cost(_work(branch_schedule=schedule), hw)
    cost = estimate_cost(_work(branch_schedule=schedule, feedback_rank=spent), hw)
    assert cost.energy_j > plain.energy_j
    assert {"feedback_down", "feedback_back"} <= cost.parts["latency_s"].keys()
    assert cost.parts["energy_j"]["mac_feedback"] > 0
    for name, total in (("latency_s", cost.latency_s), ("energy_j", cost.energy_j)):
        assert sum(cost.parts[name].values()) == pytest.approx(total, rel=1e-9)
    assert sum(cost.parts["dram_bytes"].values()) == cost.dram_bytes
    assert cost.roofline_latency_s <= cost.latency_s


def test_multiply_accumulates_by_hand():
    work = _work(feedback_rank=31)
    m, n, k, r = 512, 384, 256, 62
    assert work.macs_branch == m * k * r + m * n * r + m * k * 31
    kernels = split_into_kernels(
        dataclasses.replace(work, branch_schedule="unfused"), load_accelerator("h100")
    )
    shapes = {kernel.role: (kernel.m, kernel.n, kernel.k) for kernel in kernels}
    assert shapes == {
        "main": (m, n, k),
        "branch_down": (m, 31, k),
        "branch_up": (m, n, 62),
        "feedback_down": (m, 31, k),
        "feedback_back": (m, k, 31),
    }
    assert sum(a * b * c for a, b, c in shapes.values()) == work.macs_main + work.macs_branch


def test_traffic_of_the_unfused_input_by_hand():
    """X in 16 bits twice, P_f out and in, D out in both formats; V for each product."""
    m, k, spent = 512, 256, 31
    kernels = split_into_kernels(
        _work(feedback_rank=spent, branch_schedule="unfused"), load_accelerator("h100")
    )
    down, back = (k for k in kernels if k.role.startswith("feedback"))
    x16, p = 2 * m * k, m * (spent + 2)
    d = m * (k // 2 + 2 * k // 64) + m * (k + 2 * k // 64)
    v = spent * k + 2 * (k // 64)
    assert (down.first_x_bytes, down.w_bytes, down.out_bytes) == (x16, v, p)
    assert (back.first_x_bytes, back.w_bytes) == (p, v)
    assert (back.reread_bytes, back.out_bytes) == (x16, d)
    assert (down.quantized, down.rounded_x) == (m * spent, m * k)
    assert back.rounded_x == 2 * m * k
    main = kernels[0]
    assert (main.first_x_bytes, main.rounded_x) == (m * (k // 2 + 2 * k // 64), 0)


def test_one_kernel_keeps_rows_of_x_on_chip_where_they_fit():
    hw = load_accelerator("h100")
    inside = estimate_cost(_work(feedback_rank=31), hw)
    assert [k.role for k in split_into_kernels(_work(feedback_rank=31), hw) if k.is_dispatched] == [
        "main"
    ]
    assert inside.parts["latency_s"]["dispatch"] == hw.dispatch.launch_s
    small = with_overrides(hw, {"memories.l2.capacity_bytes": 1 << 16})
    outside = estimate_cost(_work(feedback_rank=31), small)
    assert outside.parts["latency_s"]["dispatch"] == pytest.approx(2 * hw.dispatch.launch_s)
    assert outside.dram_bytes > inside.dram_bytes


def test_layers_of_one_input_form_it_once():
    hw = load_accelerator("h100")
    alone = estimate_cost(_work(feedback_rank=31, branch_schedule="unfused"), hw)
    third = estimate_cost(_work(feedback_rank=31, branch_schedule="unfused", shared_by=3), hw)
    for part in ("feedback_down", "feedback_back"):
        share = third.parts["latency_s"][part] / alone.parts["latency_s"][part]
        assert share == pytest.approx(1 / 3, rel=1e-6)
    assert third.parts["weight_bytes"]["feedback"] == pytest.approx(
        alone.parts["weight_bytes"]["feedback"] / 3, abs=1
    )
    # With an R each, they share D all the same, and nothing else.
    own = estimate_cost(
        _work(feedback_rank=31, branch_schedule="unfused", feedback_shared_by=3), hw
    )
    for part in ("feedback_down", "feedback_back"):
        assert own.parts["latency_s"][part] == third.parts["latency_s"][part]
    assert own.parts["weight_bytes"]["feedback"] == third.parts["weight_bytes"]["feedback"]
    assert own.parts["weight_bytes"]["right"] == alone.parts["weight_bytes"]["right"]
    assert third.latency_s < own.latency_s < alone.latency_s
    assert third.dram_bytes < own.dram_bytes < alone.dram_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedback_rank": 63}, r"feedback_rank=63 must be at most the rank of the branch, 62"),
        ({"feedback_rank": 1, "branch": None, "rank": 0}, r"at most the rank of the branch, 0"),
        ({"feedback_rank": -1}, r"feedback_rank=-1 must be a whole number"),
        ({"feedback_rank": 4, "branch_schedule": "given_p"}, r"'given_p' costs P L\^T alone"),
        ({"feedback_p_bits": 12}, r"feedback_p_bits=12 must be one of"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(changes, message):
    with pytest.raises(AcceleratorError, match=message):
        _work(**changes)
