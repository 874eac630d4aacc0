"""GPTQ against its published loop in float64, and what finishing with data promises."""

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import quantize
from loraq_sim.solvers import solve
from loraq_sim.solvers.gptq import finish_with_data, round_in_metric, second_moment
from loraq_sim.solvers.problem import Branches
from loraq_sim.solvers.residual import dequantized, simulated_output


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
    rows = plain.right.dequantize().astype(np.float64)
    missed = weight - finished.main.dequantize().astype(np.float64)
    misses = []
    for shrinkage in (1.0, 0.1, 0.01):
        metric = moment + shrinkage * np.trace(moment) / len(moment) * np.eye(len(moment))
        best = missed @ metric @ rows.T @ np.linalg.inv(rows @ metric @ rows.T)
        misses.append(np.abs(finished.left.dequantize() - best).max() / np.abs(best).max())
    # fp16 factors: each element is off by up to 2**-11 of itself.
    assert min(misses) < 1e-3


def quiet_channels(seed, rows=1200):
    """Inputs of few loud directions, spread over all channels; what else is in them is faint."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(1, 1e-4, 64)
    turn = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    return ((rng.standard_normal((rows, 64)) * sizes) @ turn).astype(np.float32)


def test_a_finish_does_not_pass_on_the_noise_of_rounded_inputs():
    # Most directions are quieter than 4 bits can tell: passing them on adds noise alone.
    x, grid = quiet_channels(8), (parse_format("int4/g64"), "absmax")
    weight = np.random.default_rng(9).standard_normal((48, 64), dtype=np.float32)
    plain = solve(weight, rank=2, branch="int8/g64", preset="fast")
    stored = Branches(main=plain.main, left=plain.left, right=plain.right)
    branch = (parse_format("int8/g64"), "absmax")

    def missed(solved):
        y = simulated_output(x[1::2], dequantized(solved), None, grid, branch)
        return np.linalg.norm(y - x[1::2] @ weight.T)

    fine = (parse_format("int16/g64"), "absmax")
    knowing, blind = (
        finish_with_data(weight, stored, x[::2], into_main=each, into_branch=branch)
        for each in (grid, fine)
    )
    assert missed(knowing) < 0.87 * missed(blind)
    # Of the quietest directions it passes on less than the weight does, the blind one all of it.
    # Not nothing: shrinkage, here a hundredth of the mean power, stands for inputs not seen.
    quiet = np.linalg.svd(x[::2], full_matrices=False)[2][-16:]
    kept = [np.linalg.norm(each.main.dequantize() @ quiet.T) for each in (knowing, blind, stored)]
    assert kept[0] < 0.8 * kept[2] < kept[1]


def test_few_rows_are_shrunk_more_than_many():
    # Fewer rows than channels: less shrinkage would fit the noise of the sample.
    weight, x = heavy_tailed(7), correlated_inputs(96, 2000)
    plain = solve(weight, rank=8, branch="fp16", preset="fast")
    stored = Branches(main=plain.main, left=plain.left, right=plain.right)
    grid = (parse_format("int8/g32"), "absmax")
    errors = []
    for rows in (24, 1000):
        finished = finish_with_data(weight, stored, x[:rows], into_main=grid, into_branch=grid)
        y = simulated_output(x[1000:], dequantized(finished), None, grid, grid)
        errors.append(np.linalg.norm(y - x[1000:] @ weight.T))
    assert errors[1] < errors[0]


# ---------------------------------------------------------------- LRC, QUAD, ResQ


def test_lrc_corrects_what_rounded_inputs_lose():
    weight, x = heavy_tailed(10, (64, 96)), correlated_inputs(96, 800)
    options = {"main": "int4/g32", "branch": "fp16", "rank": 8, "activations": x[::2]}
    options |= {"main_activation": "int4/g32", "preset": "fast"}
    grids = (parse_format("int4/g32"), "absmax"), (parse_format("fp16"), "absmax")
    errors = {}
    for method in ("gptq", "svdquant", "qera", "lrc"):
        alone = {"branch": None, "rank": None} if method == "gptq" else {}
        found = solve(weight, method, **(options | alone))
        parts = Branches(main=found.main, left=found.left, right=found.right)
        y = simulated_output(x[1::2], dequantized(parts), None, *grids)
        errors[method] = np.linalg.norm(y - x[1::2] @ weight.T)
    assert errors["lrc"] < 0.9 * min(errors[each] for each in ("gptq", "svdquant", "qera"))
    with pytest.raises(InputError, match="'lrc' needs activations"):
        solve(weight, "lrc", rank=8)


@pytest.mark.parametrize("method", ["quad", "resq"])
def test_quad_and_resq_spend_the_whole_branch_on_directions_of_the_inputs(method):
    weight, x = heavy_tailed(11, (64, 96)), correlated_inputs(96, 400)
    options = {"main": "int4/g32", "branch": "int8/g32", "preset": "fast", "activations": x[::2]}
    found = solve(weight, method, rank=8, feedback="auto", **options)
    assert (found.method, found.rank, found.feedback_rank, found.left) == (method, 8, 8, None)
    # The main branch is what GPTQ makes of the rest, for the shrinkage of one of three.
    d = x[::2] - x[::2] @ found.feedback.dequantize().T @ found.feedback.dequantize()
    grid = quantize(weight, "int4/g32", rule="signed_mse")
    allowed = [round_in_metric(weight, second_moment(d, s), grid).codes for s in (1.0, 0.1, 0.01)]
    assert any((found.main.codes == codes).mean() > 0.99 for codes in allowed)
    sizes = np.linalg.norm(x[::2] @ found.feedback.dequantize().T, axis=0)
    # ResQ shares the sizes of the components out.
    assert (sizes.max() < 2.5 * sizes.min()) == (method == "resq")
    with pytest.raises(InputError, match="write the split with ~"):
        solve(weight, method, rank=8, **options)
    with pytest.raises(InputError, match="whole branch of rank 8 .* got feedback=4"):
        solve(weight, method, rank=8, feedback=4, **options)


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
