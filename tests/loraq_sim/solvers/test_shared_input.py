"""Layers that read one input: one branch in common or one each, bytes counted once."""

import numpy as np
import pytest
from scipy.linalg import hadamard

from loraq_sim.emulator.datapath import Datapath
from loraq_sim.errors import InputError
from loraq_sim.machine import solved_workload
from loraq_sim.quantized_model import read_quantized_model, write_quantized_model
from loraq_sim.solvers import METHODS, solve, solve_group
from loraq_sim.solvers.solve import DEFLATING
from loraq_sim.split import parse_split


def members(k=64):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_t(6, (n, k)).astype(np.float32)
        for name, n in (("q", 48), ("k", 40), ("v", 33))
    }


def inputs(k=64):
    rng = np.random.default_rng(1)
    return (rng.standard_normal((50, k)) * np.exp(rng.standard_normal(k))).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_members_are_the_rows_of_the_stacked_solution(method, smooth):
    weights = members()
    options = {"method": method, "rank": 8, "preset": "fast", "activations": inputs()}
    options |= {"feedback": "auto"} if method in DEFLATING else {}
    solutions = solve_group(weights, smooth=smooth, **options)
    whole = solve(np.concatenate(list(weights.values())), smooth=smooth, **options)
    parts = ("main",) if whole.left is None else ("main", "left")
    for part in parts:
        rows = [getattr(s, part).dequantize() for s in solutions.values()]
        np.testing.assert_array_equal(np.concatenate(rows), getattr(whole, part).dequantize())
    assert sum(s.nbytes for s in solutions.values()) == whole.nbytes
    assert len({id(s.right) for s in solutions.values()}) == 1
    for name, solution in solutions.items():
        # Float32 sums against float64 ones.
        miss = np.linalg.norm(weights[name] - solution.reconstruct())
        assert solution.weight_error == pytest.approx(
            miss / np.linalg.norm(weights[name]), rel=1e-5
        )


@pytest.mark.parametrize("main", ["int4/tensor", "int4/row", "nvfp4"])
def test_members_share_a_scale_of_the_tensor_and_have_their_own_rows(main):
    weights = members()
    options = {"main": main, "method": "lqer", "rank": 4, "preset": "fast"}
    solutions = solve_group(weights, **options)
    whole = solve(np.concatenate(list(weights.values())), **options)
    rows = np.concatenate([s.main.dequantize() for s in solutions.values()])
    np.testing.assert_array_equal(rows, whole.main.dequantize())
    for name, solution in solutions.items():
        assert solution.main.dequantize().shape == weights[name].shape
        assert len(solution.main.scales) == (1 if main == "int4/tensor" else len(weights[name]))


def test_own_branches_are_those_of_single_layers_with_one_smoothing():
    weights, x = members(), inputs()
    own = solve_group(weights, share="own", smooth=0.5, rank=6, preset="fast", activations=x)
    smooths = {s.smooth.tobytes() for s in own.values()}
    assert len(smooths) == 1
    assert sum(s.bytes_by_part["smooth"] for s in own.values()) == 2 * 64
    alone = solve(weights["q"], smooth=own["q"].smooth, rank=6, preset="fast", activations=x)
    np.testing.assert_array_equal(alone.reconstruct(), own["q"].reconstruct())


@pytest.mark.parametrize("share", ["own", "common"])
def test_a_group_reads_back_from_a_file_that_takes_its_bytes(tmp_path, share):
    solutions = solve_group(
        members(), share=share, smooth=0.5, rank=6, preset="fast", activations=inputs(),
        rotate="hadamard:16",
    )  # fmt: skip
    path = write_quantized_model(tmp_path / "q.safetensors", solutions)
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert len(raw) - 8 - header == sum(s.nbytes for s in solutions.values())
    model = read_quantized_model(path)
    for name, solution in solutions.items():
        np.testing.assert_array_equal(model[name].reconstruct(), solution.reconstruct())
        assert model[name].bytes_by_part == solution.bytes_by_part
        assert model[name].rotation == 16


@pytest.mark.parametrize("share", ["own", "common"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 9, "feedback": 3},
        {"budget": "fp16@6", "feedback": "auto"},
        {"rank": 6, "feedback": 6},
    ],
)
def test_members_deflate_their_input_by_one_v(tmp_path, share, options):
    """Worked out in float64: L_f = W V^T, and the layer multiplies X with what it says it does."""
    rng = np.random.default_rng(2)
    loud = rng.standard_normal((3, 64)) * 6
    x = (rng.standard_normal((90, 3)) @ loud + rng.standard_normal((90, 64))).astype(np.float32)
    weights, branch = members(), "int8/g64"
    found = solve_group(
        weights, share=share, activations=x, rotate="hadamard:8", smooth=0.5, branch=branch,
        preset="fast", **options,
    )  # fmt: skip
    assert len({id(s.feedback) for s in found.values()}) == 1
    spent = {s.feedback_rank for s in found.values()}
    assert len(spent) == 1
    assert min(spent) > 0
    is_all_common = share == "common" or options.get("feedback") == options.get("rank")
    assert {s.shared_by for s in found.values()} == ({3} if is_all_common else {1})
    stored = sum(s.bytes_by_part["feedback"] for s in found.values())
    assert stored == found["q"].feedback.nbytes
    # The cost model charges what the solutions count, but for rounding up.
    split, path = parse_split("W4A4~W8A8r9"), Datapath()
    works = [solved_workload(90, s, split, path, fused=True) for s in found.values()]
    for part in ("feedback", "smooth"):
        charged = sum(work.weight_bytes()[part] for work in works)
        assert 0 <= charged - sum(s.bytes_by_part[part] for s in found.values()) < 3
    turn = np.kron(np.eye(8), hadamard(8) / np.sqrt(8))
    for name, s in found.items():
        v = s.feedback.dequantize().astype(np.float64)
        turned = weights[name].astype(np.float64) * s.smooth @ turn
        l_f = s.feedback_left.dequantize()
        assert l_f.shape == (len(weights[name]), s.feedback_rank)
        assert np.linalg.norm(l_f - turned @ v.T) < 0.02 * np.linalg.norm(turned @ v.T)
        whole = s.main.dequantize().astype(np.float64)
        if s.left is not None:
            whole += s.left.dequantize().astype(np.float64) @ s.right.dequantize()
        whole = (whole @ (np.eye(64) - v.T @ v) + l_f @ v) @ turn / s.smooth
        np.testing.assert_allclose(s.reconstruct(), whole, atol=1e-4)
        assert np.linalg.norm(whole - weights[name]) < 0.2 * np.linalg.norm(weights[name])
    path = write_quantized_model(tmp_path / "q.safetensors", found)
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert len(raw) - 8 - header == sum(s.nbytes for s in found.values())


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({}, {}, r"at least one member"),
        ({**members(), "o": np.ones((4, 32), np.float32)}, {}, r"same K: .*'o' has K=32"),
        ({"q": np.full((4, 4), np.nan)}, {}, r"weight of 'q' holds 16 NaN"),
        (members(), {"share": "all"}, r"unknown sharing of inputs 'all'"),
        (
            members(),
            {"share": "own", "method": "svdquant_tuned", "activations": inputs()},
            r"would choose another smoothing",
        ),
        (
            members(),
            {"share": "own", "condition": "auto", "activations": inputs()},
            r"condition 'auto' would choose another smoothing",
        ),
    ],
)
def test_groups_that_cannot_be_solved_say_why(weights, options, message):
    with pytest.raises(InputError, match=message):
        solve_group(weights, **options)
