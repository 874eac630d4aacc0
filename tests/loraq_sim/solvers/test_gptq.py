"""GPTQ against its published loop in float64, and what finishing with data promises."""

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import quantize
from loraq_sim.solvers import solve
from loraq_sim.solvers.gptq import finish_with_data, round_in_metric
from loraq_sim.solvers.problem import Branches


def heavy_tailed(seed=0, shape=(64, 96)):
    rng = np.random.default_rng(seed)
    low_rank = rng.standard_normal((shape[0], 8)) @ rng.standard_normal((8, shape[1]))
    return (rng.standard_t(6, shape) + 0.3 * low_rank).astype(np.float32)


def correlated_inputs(k=96, tokens=300, seed=1):
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((tokens, 12)) @ rng.standard_normal((12, k))
    return ((factors + rng.standard_normal((tokens, k))) * np.exp(rng.standard_normal(k))).astype(
        np.float32
    )


def published_loop(weight, metric, damping, nearest):
    """Algorithm 1 with act-order, one column at a time, nothing blocked; codes and values."""
    k = len(metric)
    order = np.argsort(-np.diag(metric), kind="stable")
    damped = metric[np.ix_(order, order)] + damping * np.trace(metric) / k * np.eye(k)
    inverse = np.linalg.inv(damped)
    rest, rounded = weight.astype(np.float64)[:, order], np.zeros(weight.shape)
    for j in range(k):
        rounded[:, order[j]] = nearest(rest[:, j], order[j])
        error = (rest[:, j] - rounded[:, order[j]]) / inverse[0, 0]
        rest[:, j:] -= np.outer(error, inverse[0])
        # What is left once this column is fixed: the inverse of the metric without it.
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return rounded


@pytest.mark.parametrize("k", [40, 128, 150])
@pytest.mark.parametrize("fmt", ["int4/g32", "uint4/g64", "int3/row", "int8/tensor"])
def test_columns_are_rounded_as_published(fmt, k):
    weight, x = heavy_tailed(2, (12, k)), correlated_inputs(k)
    metric = x.T.astype(np.float64) @ x
    grid = quantize(weight, fmt)
    width = {"int4/g32": 32, "uint4/g64": 64}.get(fmt, k)

    def spread(per_group):
        wide = np.repeat(per_group.astype(np.float64), width, axis=1)[:, :k]
        return np.broadcast_to(wide, weight.shape)

    steps = spread(grid.scales)
    zeros = np.zeros(weight.shape) if grid.zero_points is None else spread(grid.zero_points)
    lo, hi = parse_format(fmt).element.lo, parse_format(fmt).element.hi

    def nearest(column, j):
        step = steps[:, j]
        codes = np.clip(np.rint(column / step) + zeros[:, j], lo, hi)
        return (codes - zeros[:, j]) * step

    expected = published_loop(weight, metric, 0.01, nearest)
    found = round_in_metric(weight, metric, grid).dequantize()
    # float32 sums move a value near the middle of two codes to the other one now and then, and
    # what follows it in its row; most rows agree entirely.
    same = np.isclose(found, expected, rtol=1e-6, atol=1e-12).all(axis=1)
    assert same.mean() >= 0.75

    def loss(values):
        return np.trace((values - weight) @ metric @ (values - weight).T)

    assert loss(found) == pytest.approx(loss(expected), rel=0.02)


@pytest.mark.parametrize("main", ["int4/g32", "uint4/g32", "mxfp4", "nvfp4", "int4/g32/e4m3"])
def test_gptq_loses_less_of_the_output_than_rounding_to_nearest(main):
    weight, x = heavy_tailed(3), correlated_inputs()
    seen, unseen = x[::2], x[1::2]
    errors = [
        np.linalg.norm(unseen @ (weight - solution.reconstruct()).T)
        for solution in (
            solve(weight, "rtn", main=main),
            solve(weight, "gptq", main=main, branch=None, activations=seen),
        )
    ]
    assert errors[1] < 0.8 * errors[0]


def test_gptq_has_no_branch_and_asks_for_activations():
    solution = solve(heavy_tailed(), "gptq", rank=8, activations=correlated_inputs())
    assert (solution.method, solution.rank, solution.trace[-1].stage) == ("gptq", 0, "gptq")
    with pytest.raises(InputError, match="method 'gptq' needs activations"):
        solve(heavy_tailed(), "gptq")


def test_without_correlations_columns_are_rounded_to_nearest():
    weight = heavy_tailed(4)
    grid = quantize(weight, "int4/g32")
    found = round_in_metric(weight, np.diag(np.linspace(1, 9, 96)), grid)
    np.testing.assert_array_equal(found.codes, grid.codes)


@pytest.mark.parametrize("zeros", ["inputs", "weight", "channels"])
def test_zeros_are_no_obstacle(zeros):
    weight, x = heavy_tailed(5), correlated_inputs()
    if zeros == "inputs":
        x = np.zeros_like(x)
    elif zeros == "weight":
        weight = np.zeros_like(weight)
    else:
        x[:, ::3] = 0
    for options in ({"method": "gptq"}, {"rank": 4, "preset": "fast", "finish": "data"}):
        solution = solve(weight, activations=x, main="int4/g32", **options)
        assert np.isfinite(solution.weight_error)


# ---------------------------------------------------------------- finish="data"


def output_error(weight, solution, x):
    x = x if solution.smooth is None else x / solution.smooth
    assert solution.rotation is None
    entering = quantize(x, "int8/g64").dequantize()
    p = quantize(entering @ solution.right.dequantize().T, "int8/g64").dequantize()
    y = entering @ solution.main.dequantize().T + p @ solution.left.dequantize().T
    scaled = weight if solution.smooth is None else weight * solution.smooth
    return np.linalg.norm(y - x @ scaled.T)


@pytest.mark.parametrize("main", ["int4/g32", "mxfp4"])
@pytest.mark.parametrize("method", ["loraq", "svdquant", "lqer"])
def test_a_finish_lowers_the_error_of_unseen_outputs(method, main):
    weight, x = heavy_tailed(6, (96, 128)), correlated_inputs(128, 400)
    options = {"main": main, "branch": "int8/g64", "rank": 12, "activations": x[::2]}
    plain, finished = (
        solve(weight, method, finish=finish, main_activation="int8/g64", preset="fast", **options)
        for finish in (None, "data")
    )
    assert output_error(weight, finished, x[1::2]) < 0.9 * output_error(weight, plain, x[1::2])
    np.testing.assert_array_equal(finished.right.codes, plain.right.codes)
    np.testing.assert_array_equal(finished.main.scales, plain.main.scales)
    assert finished.nbytes == plain.nbytes
    assert finished.trace[-1].stage == "data"
    assert finished.weight_error == finished.trace[-1].weight_error


def test_a_finish_is_as_good_as_one_in_float64():
    weight, x = heavy_tailed(7), correlated_inputs()
    plain = solve(weight, rank=8, branch="fp16", preset="fast")
    stored = Branches(main=plain.main, left=plain.left, right=plain.right)
    grid = (parse_format("fp16"), "absmax")
    finished = finish_with_data(weight, stored, x, into_main=grid, into_branch=grid)
    moment = x.T.astype(np.float64) @ x / len(x)
    metric = moment + np.trace(moment) / len(moment) * np.eye(len(moment))
    rows = plain.right.dequantize().astype(np.float64)
    missed = weight - finished.main.dequantize().astype(np.float64)
    best = missed @ metric @ rows.T @ np.linalg.inv(rows @ metric @ rows.T)
    # fp16 factors: each element is off by up to 2**-11 of itself.
    np.testing.assert_allclose(
        finished.left.dequantize(), best, rtol=2.0**-10, atol=1e-3 * np.abs(best).max()
    )


@pytest.mark.parametrize("tokens", [2, 15, 24, 64])
def test_a_finish_does_no_harm_beyond_noise(tokens):
    ratios = []
    for seed in range(3):
        weight, x = heavy_tailed(seed, (64, 128)), correlated_inputs(128, 600, seed)
        options = {"rank": 8, "preset": "fast", "activations": x[:tokens]}
        options |= {"main_activation": "int8/g64", "branch": "int8/g64"}
        plain, finished = (solve(weight, finish=finish, **options) for finish in (None, "data"))
        ratios.append(
            output_error(weight, finished, x[300:]) / output_error(weight, plain, x[300:])
        )
    assert max(ratios) < 1.03


def test_a_finish_is_compared_with_the_rule_of_its_scales(monkeypatch):
    rules = []

    def noted(values, fmt, *, rule=None):
        rules.append((str(fmt), rule))
        return quantize(values, fmt, rule=rule)

    monkeypatch.setattr("loraq_sim.solvers.residual.quantize", noted)
    options = {"rank": 8, "preset": "fast", "activations": correlated_inputs(), "finish": "data"}
    solve(heavy_tailed(3), main_rule="signed_absmax", main_activation="int4/g64", **options)
    assert ("int4/g64/fp16", "signed_absmax") in rules
    assert ("int4/g64/fp16", None) not in rules


def test_a_finish_without_activations_is_refused_with_the_way_out():
    with pytest.raises(InputError, match="finish='data' .*: give activations, or leave finish out"):
        solve(heavy_tailed(), finish="data")
    with pytest.raises(InputError, match="unknown finish 'date'"):
        solve(heavy_tailed(), finish="date", activations=correlated_inputs())
