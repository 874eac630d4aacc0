"""The residual input: what is stored, what it computes, and when it is left alone."""

import dataclasses

import numpy as np
import pytest

import hwmodels
import loraq_sim as lq
from hwmodels.modes import mode_of
from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.walk import run_layer, walk_steps
from loraq_sim.machine import solved_workload
from loraq_sim.solvers import Solution, solve
from loraq_sim.split import branch_bytes, feedback_format

MAIN, BRANCH = "int4/g64", "int8/g64"


def _layer(n: int = 96, k: int = 192, tokens: int = 300, loud: int = 4, seed: int = 0):
    """A weight, and rows that share a few loud directions over quiet noise."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    directions = rng.standard_normal((loud, k))
    x = rng.standard_normal((tokens, loud)) @ directions * 4 + rng.standard_normal((tokens, k))
    return weight, x.astype(np.float32)


def _solved(weight, x, **options) -> Solution:
    settings = {"main": MAIN, "branch": BRANCH, "preset": "fast", "activations": x}
    return solve(weight, **(settings | options))


def _error(solution, x, weight, split="W4A4+W8A8r16", **path) -> float:
    y = run_layer(x, solution, lq.parse_split(split), Datapath(**path)).y.astype(np.float64)
    exact = x.astype(np.float64) @ weight.T
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def test_the_stored_weight_is_the_layer_without_any_rounding_of_inputs():
    weight, x = _layer()
    solution = _solved(weight, x, rank=16, feedback=6)
    q, left, right = (getattr(solution, p).dequantize() for p in ("main", "left", "right"))
    v, l_f = solution.feedback.dequantize(), solution.feedback_left.dequantize()
    x64 = x.astype(np.float64)
    p_f = x64 @ v.T
    d = x64 - p_f @ v
    y = d @ q.T + d @ right.T @ left.T + p_f @ l_f.T
    np.testing.assert_allclose(x64 @ solution.reconstruct().T, y, rtol=0, atol=2e-4 * abs(y).max())
    miss = np.linalg.norm(weight - solution.reconstruct()) / np.linalg.norm(weight)
    assert solution.weight_error == pytest.approx(miss, rel=1e-5)
    assert (solution.rank, solution.weight_rank, solution.feedback_rank) == (16, 10, 6)


@pytest.mark.parametrize("transforms", [{}, {"rotate": "hadamard", "smooth": 0.5}])
def test_the_data_path_forms_the_residual_of_the_rounded_p(transforms):
    weight, x = _layer()
    solution = _solved(weight, x, rank=16, feedback=6, **transforms)
    split = lq.parse_split("W4A4+W8A8r16")
    seen = {done.step.name: done for done in walk_steps(x[:9], solution, split, Datapath())}
    entering = seen["round_feedback"].inputs[0]
    p_f = seen["round_feedback_p"].result.dequantize()
    back = seen["feedback_back"].result
    # One group of components: sums of int8 x int8 products times two scales, in float32.
    np.testing.assert_allclose(back, p_f @ solution.feedback.dequantize(), rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(seen["deflate"].result, entering - back)
    np.testing.assert_array_equal(seen["round_main"].inputs[0], seen["deflate"].result)
    np.testing.assert_array_equal(seen["round_branch"].inputs[0], seen["deflate"].result)
    total = seen["main"].result + seen["up"].result + seen["feedback_up"].result
    np.testing.assert_allclose(seen["feedback_combine"].result, total, rtol=1e-6, atol=1e-6)


def test_products_of_the_residual_input_run_on_the_integer_array():
    weight, x = _layer()
    solution = _solved(weight, x, rank=16, feedback=6)
    wide = run_layer(x, solution, lq.parse_split("W4A4+W8A8r16"), Datapath())
    assert {"feedback_down", "feedback_back", "feedback_up"} < wide.gemms.keys()
    assert all(seen.arithmetic == "bit exact" for seen in wide.gemms.values())
    narrow = Datapath(mac=MacArray(acc_bits=16, overflow="saturate"))
    tight = run_layer(x, solution, lq.parse_split("W4A4+W8A8r16"), narrow)
    assert tight.gemms["feedback_down"].overflow_count > 0
    assert wide.gemms["feedback_down"].overflow_count == 0


def test_rounding_of_p_is_fed_back():
    weight, x = _layer()
    solution = _solved(weight, x[::2], rank=16, feedback=8)
    eight = _error(solution, x[1::2], weight)
    four = _error(solution, x[1::2], weight, feedback_p_format="int4")
    assert four < 1.1 * eight
    # What the same rounding would cost if D were not formed of the rounded P_f.
    path = Datapath(feedback_p_format="int4")
    split = lq.parse_split("W4A4+W8A8r16")
    seen = {done.step.name: done for done in walk_steps(x[1::2], solution, split, path)}
    lost = seen["round_feedback_p"].result.dequantize() - seen["round_feedback_p"].inputs[0]
    change = lost @ solution.feedback_left.dequantize().T
    assert four < 0.5 * np.linalg.norm(change) / np.linalg.norm(x[1::2] @ weight.T)


def test_loud_directions_are_worth_a_part_of_the_rank():
    weight, x = _layer()
    plain = _solved(weight, None, rank=16)
    chosen = _solved(weight, x[::2], rank=16, feedback="auto")
    assert chosen.feedback_rank > 0
    assert _error(chosen, x[1::2], weight) < 0.6 * _error(plain, x[1::2], weight)


@pytest.mark.parametrize("tokens", [1, 7, 8, 32, 300])
def test_without_loud_directions_the_rank_stays_with_the_weight(tokens):
    weight, _ = _layer()
    x = np.random.default_rng(5).standard_normal((tokens, 192)).astype(np.float32)
    chosen = _solved(weight, x, rank=16, feedback="auto")
    assert chosen.feedback_rank == 0
    np.testing.assert_array_equal(chosen.main.codes, _solved(weight, None, rank=16).main.codes)


def test_spikes_that_deflation_would_spread_are_left_alone():
    """One loud channel in a few tokens: D of the others would be louder than X."""
    weight, _ = _layer()
    rng = np.random.default_rng(2)
    x = 0.01 * rng.standard_normal((400, 192))
    tokens, channels = rng.integers(400, size=800), rng.integers(192, size=800)
    x[tokens, channels] += 50 * rng.standard_normal(800)
    x = x.astype(np.float32)
    chosen = _solved(weight, x[::2], rank=16, feedback="auto")
    plain = _solved(weight, None, rank=16)
    assert _error(chosen, x[1::2], weight) <= 1.02 * _error(plain, x[1::2], weight)


@pytest.mark.parametrize("feedback", [5, "auto"])
@pytest.mark.parametrize("branch", ["int8/g64", "int6/g32", "int4/g64", "mxint8", "fp16", "nvfp4"])
def test_bytes_stay_within_the_budget(branch, feedback):
    weight, x = _layer(k=200)
    solution = _solved(weight, x, branch=branch, budget="fp16@8", feedback=feedback)
    spent = sum(solution.bytes_by_part[part] for part in solution.parts if part != "main")
    allowed = branch_bytes(96, 200, 8, lq.parse_format("fp16"))
    fmt = lq.parse_format(branch)
    assert spent == branch_bytes(96, 200, solution.rank, fmt, solution.feedback_rank) <= allowed
    more = branch_bytes(96, 200, solution.rank + 1, fmt, solution.feedback_rank)
    assert more > allowed or solution.rank == 96
    assert solution.feedback.format == feedback_format(fmt)
    assert solution.nbytes == sum(len(part.pack()) for part in solution.parts.values())


def test_few_components_take_no_scale_a_row_each():
    """Codes and one scale per block of 64 x 64: as many components as a branch without has."""
    weight, x = _layer(k=200)
    plain = _solved(weight, None, budget="fp16@4", branch="int8/g64")
    solution = _solved(weight, x, budget="fp16@4", branch="int8/g64", feedback=2)
    assert solution.rank == plain.rank
    bytes_of = solution.bytes_by_part
    assert bytes_of["feedback_left"] == 2 * 96 + 2 * 2


@pytest.mark.parametrize("branch", ["int6/g64", "int4/g64"])
def test_what_carries_loud_directions_has_eight_bits(branch):
    """P_f is loud, and the rounding of L_f is not fed back; V's is."""
    weight, x = _layer(k=200)
    solution = _solved(weight, x, rank=24, branch=branch, feedback=12)
    assert str(solution.feedback_left.format) == "int8/g64/fp16"
    assert solution.feedback.format == feedback_format(lq.parse_format(branch))
    wide = _solved(weight, x, rank=24, branch="int8/g64", feedback=12)
    # V of four bits leaves a tenth of what is loud to the main branch.
    allowed = 1.25 if branch == "int6/g64" else 1.5
    assert _error(solution, x, weight) < allowed * _error(wide, x, weight)
    bits = branch[3]
    split = lq.parse_split(f"W4A4~W{bits}A8r24f12")
    work = solved_workload(9, solution, split, Datapath(), fused=True)
    sizes = work.weight_bytes()
    for part in ("left", "right", "feedback", "feedback_left"):
        assert sizes[part] == solution.bytes_by_part[part]
    # P_f joins P in one sum, in a mode that takes the eight bits of L_f.
    assert mode_of(hwmodels.load_accelerator("aie2"), work, "branch_up").mode.weight_bits == 8


def test_all_of_the_rank_may_go_to_the_residual_input():
    weight, x = _layer()
    solution = _solved(weight, x, rank=8, feedback=8)
    assert solution.left is None
    assert solution.rank == 8
    assert _error(solution, x, weight) < _error(_solved(weight, None, rank=8), x, weight)


def test_written_and_read_again_it_is_the_same(tmp_path):
    weight, x = _layer()
    layers = {
        "a": _solved(weight, x, rank=16, feedback=6, rotate="hadamard"),
        "b": _solved(weight, x, rank=8, feedback=8, branch="mxint8"),
    }
    path = lq.write_quantized_model(tmp_path / "m.safetensors", layers)
    for name, solution in layers.items():
        read = lq.read_quantized_model(path)[name]
        np.testing.assert_array_equal(read.reconstruct(), solution.reconstruct())
        assert read.feedback.format == solution.feedback.format
        assert read.bytes_by_part == solution.bytes_by_part


def test_a_stored_layer_needs_both_parts_and_blocks(tmp_path):
    weight, x = _layer()
    good = _solved(weight, x, rank=16, feedback=6)
    rows = lq.quantize(good.feedback.dequantize(), "int8/g64")
    for broken, message in (
        (dataclasses.replace(good, feedback_left=None), "one factor of a residual input"),
        (dataclasses.replace(good, feedback=rows), "needs blocks, such as int8/b64"),
    ):
        path = tmp_path / "m.safetensors"
        lq.write_quantized_model(path, {"a": broken}, overwrite=True)
        with pytest.raises(lq.InputError, match=message):
            lq.read_quantized_model(path)["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": 4, "activations": None}, r"feedback=4 deflates .* give activations"),
        ({"feedback": 17}, r"feedback=17 is more than the rank 16"),
        ({"feedback": "half"}, r"None, 'auto' or a whole number .* got 'half'"),
        ({"feedback": True}, r"got True"),
        ({"feedback": -1}, r"got -1"),
        ({"feedback": 4, "method": "rtn", "rank": None}, r"method 'rtn' makes none"),
        ({"feedback": 4, "branch": None, "rank": None}, r"branch=None has none"),
        ({"feedback": 4, "method": "svdquant_tuned"}, r"give smooth= .* or drop feedback="),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, message):
    weight, x = _layer()
    with pytest.raises(lq.InputError, match=message) as raised:
        _solved(weight, x, **({"rank": 16} | options))
    assert "\n" not in str(raised.value)


def test_more_directions_than_rows_cannot_be_told():
    weight, x = _layer()
    with pytest.raises(lq.InputError, match="than 5 activation rows .* give feedback=5 at most"):
        _solved(weight, x[:5], rank=16, feedback=6)
