"""Parts of the solvers, each against numbers worked out another way."""

import dataclasses

import numpy as np
import pytest

from loraq_sim.conditioning import smoothing_vector
from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import quantize
from loraq_sim.solvers import SharedStages, solve, solve_many
from loraq_sim.solvers import branch as branch_module
from loraq_sim.solvers import problem as effort_module
from loraq_sim.solvers.branch import FrozenBranch, round_branch
from loraq_sim.solvers.low_rank import descend, principal_factors
from loraq_sim.solvers.problem import relative_distance
from loraq_sim.split import branch_bytes, rank_for_budget


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "int8/g64", "int4/g32", "mxfp4"])
@pytest.mark.parametrize("rank", [1, 7, 32])
def test_a_budget_in_the_branch_s_own_format_is_its_rank(fmt, rank):
    assert rank_for_budget(96, 160, parse_format(fmt), f"{fmt}@{rank}") == rank
    assert solve(normal(96, 160), "svdquant", branch=fmt, budget=f"{fmt}@{rank}").rank == rank


@pytest.mark.parametrize("fmt", ["int8/g64", "int6/g32", "int4/g64", "mxfp8_e4m3"])
def test_a_budget_is_spent_and_not_overspent(fmt):
    fmt = parse_format(fmt)
    allowed = branch_bytes(120, 200, 8, parse_format("fp16"))
    rank = rank_for_budget(120, 200, fmt, "fp16@8")
    assert branch_bytes(120, 200, rank, fmt) <= allowed < branch_bytes(120, 200, rank + 1, fmt)


def test_a_budget_one_byte_short_of_a_rank_is_refused():
    # int8 with one fp16 scale a row: four rows of 1 + 2 bytes, one of 6 + 2.
    needed = branch_bytes(4, 6, 1, parse_format("int8/row"))
    assert needed == 4 * 3 + 8
    assert rank_for_budget(4, 6, parse_format("int8/row"), "fp16@1") == 1  # 20 bytes
    with pytest.raises(InputError, match="is 20 bytes .* less than the 40 bytes of a rank-1"):
        rank_for_budget(4, 6, parse_format("fp32"), "fp16@1")


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.8, 1.0])
def test_smoothing_by_strength_is_smoothquant_s_formula(alpha):
    weight, x = normal(9, 12) * np.linspace(1, 3, 12, dtype=np.float32), normal(20, 12, seed=1)
    x *= np.linspace(4, 0.5, 12, dtype=np.float32)
    expected = np.abs(x).max(0) ** alpha / np.abs(weight).max(0) ** (1 - alpha)
    expected = expected / np.exp(np.log(expected).mean())
    # Stored as float16: half a unit in its last place, 2**-11.
    np.testing.assert_allclose(smoothing_vector(alpha, weight, x), expected, rtol=2.0**-11 * 1.01)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 130, 256, 257])
def test_every_row_counts_in_the_weight_error(rows):
    weight = normal(rows, 5).astype(np.float64)
    for wrong in {0, rows // 2, rows - 1}:
        stored = weight.copy()
        stored[wrong] += 1.0
        expected = np.sqrt(5.0) / np.sqrt(np.square(weight).sum())
        # Doubles, summed in another order.
        assert relative_distance(weight, stored) == pytest.approx(expected, rel=1e-12)
    assert relative_distance(np.zeros((rows, 2)), np.zeros((rows, 2))) == 0.0
    assert relative_distance(np.zeros((rows, 2)), np.eye(rows, 2)) == np.inf


def test_shared_stages_are_kept_apart_by_preset_method_and_branch():
    weight = normal(48, 64)
    specs = [
        {"preset": preset, "branch": branch, "method": method, "rank": rank}
        for preset in ("fast", "balanced")
        for branch in ("int8/g32", "int4/g32")
        for method in ("loraq", "alternating")
        for rank in (4, 5)
    ]
    for spec, shared in zip(specs, solve_many(weight, specs), strict=True):
        alone = solve(weight, **spec)
        assert shared.weight_error == alone.weight_error, spec
        assert shared.left.pack() == alone.left.pack()


def test_shared_stages_are_kept_apart_by_main_format_and_rotation():
    weight, shared = normal(32, 64), SharedStages()
    for options in ({"main": "int4/g64"}, {"main": "int4/g32"}, {"rotate": "hadamard"}):
        options |= {"rank": 4, "preset": "fast"}
        together = solve(weight, shared=shared, **options)
        np.testing.assert_array_equal(
            together.reconstruct(), solve(weight, **options).reconstruct()
        )


@pytest.mark.parametrize("method", ["loraq", "lqer", "svdquant", "alternating", "loftq"])
def test_the_seed_enters_where_the_factorization_is_randomized(method):
    weight = normal(80, 96)
    one, same, other = (
        solve(weight, method, rank=4, preset="fast", seed=seed) for seed in (1, 1, 2)
    )
    assert one.left.pack() == same.left.pack()
    assert one.left.pack() + one.right.pack() != other.left.pack() + other.right.pack()
    # Another sketch of the same matrix: errors stay close.
    assert one.weight_error == pytest.approx(other.weight_error, rel=0.02)


def distance(left, right, target):
    return float(np.linalg.norm(target - left.dequantize() @ right.dequantize()))


def once_rounded(left, right, fmt, rule="mse"):
    """R rounded, L the least squares fit to it, rounded: no refit of R."""
    rows = quantize(right, fmt, rule=rule)
    r_hat = rows.dequantize().astype(np.float64)
    columns = (left.astype(np.float64) @ right) @ np.linalg.pinv(r_hat)
    return quantize(columns.astype(np.float32), fmt, rule=rule), rows


@pytest.mark.parametrize("fmt", ["int3/g32", "int4/g32", "mxfp4"])
def test_refits_bring_the_stored_branch_closer(fmt):
    left, right = normal(96, 6), normal(6, 64, seed=1)
    fmt, target = parse_format(fmt), left @ right
    once = distance(*once_rounded(left, right, fmt), target)
    assert distance(*round_branch(target, right, fmt), target) < 0.97 * once


def test_freezing_refits_too():
    left, right = normal(96, 6), normal(6, 64, seed=1)
    fmt, target = parse_format("int4/g32"), left @ right
    branch = FrozenBranch(96, 6, fmt, 1.0)
    branch.freeze(left, right, 6)
    missed = distance(*branch.stored(), target)
    assert branch.noise == pytest.approx(missed, rel=1e-3)
    once = distance(*once_rounded(*principal_factors(left, right), fmt, "signed_mse"), target)
    assert missed < 0.97 * once


@pytest.mark.parametrize(("branch", "gain"), [("int4/g32", 0.985), ("int6/g32", 0.99)])
def test_settling_a_branch_of_few_bits_lowers_the_error(branch, gain, monkeypatch):
    weight = normal(96, 128)
    options = {"rank": 24, "branch": branch, "main": "int4/g32"}
    settled = solve(weight, **options)
    assert "settle" in {entry.stage for entry in settled.trace}
    unsettled = dataclasses.replace(effort_module.EFFORTS["balanced"], settle_steps=0)
    monkeypatch.setitem(effort_module.EFFORTS, "balanced", unsettled)
    assert settled.weight_error < gain * solve(weight, **options).weight_error


def reference_descent(left, right, directions, stride):
    """The rule of the module's docstring in float64, by SVD and eigenvalues instead of Cholesky."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    means = [np.zeros_like(left), np.zeros_like(right)]
    for step, toward in enumerate(directions):
        size = stride * max(0.02, 1 - step / len(directions))
        ascents = toward @ right.T, left.T @ toward
        # Nesterov: the mean takes in the ascent, then looks ahead by the same rule once more.
        means = [0.9 * m + 0.1 * a for m, a in zip(means, ascents, strict=True)]
        ahead_left, ahead_right = (0.9 * m + 0.1 * a for m, a in zip(means, ascents, strict=True))
        root_r, root_l = inverse_root(right @ right.T), inverse_root(left.T @ left)
        new_left = left + size * polar(ahead_left @ root_r) @ root_r
        right = right + size * root_l @ polar(root_l @ ahead_right)
        left = new_left
    return left, right


def inverse_root(gram):
    values, vectors = np.linalg.eigh(gram)
    return (vectors / np.sqrt(values)) @ vectors.T


def polar(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def test_steps_follow_the_published_rule_with_nesterov_s_momentum():
    left, right = normal(20, 3), normal(3, 16, seed=1)
    directions = [normal(20, 16, seed=2 + step) for step in range(5)]
    expected = reference_descent(left, right, directions, 0.3)
    moved = left.copy(), right.copy()
    descend(*moved, lambda _l, _r, step: directions[step], steps=5, stride=0.3)
    # Any root of the Gram matrix gives the same product; single precision, ridge of 1e-6.
    np.testing.assert_allclose(moved[0] @ moved[1], expected[0] @ expected[1], atol=2e-3)
    still = left.copy(), right.copy()
    descend(*still, lambda _l, _r, step: directions[step], steps=5, stride=0.3, moving=(1,))
    np.testing.assert_array_equal(still[0], left)
    assert not np.array_equal(still[1], right)


def steep(seed=0, shape=(160, 192)):
    """A weight whose components differ in size, as those of trained layers do."""
    u, v = (np.linalg.qr(normal(size, 64, seed=seed + i))[0] for i, size in enumerate(shape))
    sizes = (40 * np.arange(1, 65) ** -0.9).astype(np.float32)
    return (u * sizes) @ v.T + 0.1 * normal(*shape, seed=seed + 2)


def errors_of_weight_and_output(weight, fmt, bits):
    """Relative errors, with X and P rounded to `bits` in groups of 64 as the data path does."""
    solved = solve(weight, branch=fmt, rank=32, preset="fast")
    x = normal(200, weight.shape[1], seed=9)
    left, right, main = (
        part.dequantize().astype(np.float64) for part in (solved.left, solved.right, solved.main)
    )
    wide, narrow = (quantize(x, f"int{b}/g64").dequantize() for b in (8, bits))
    p = quantize((narrow @ right.T).astype(np.float32), f"int{bits}/g64").dequantize()
    miss = wide @ main.T + p @ left.T - x @ weight.T.astype(np.float64)
    return solved.weight_error, np.linalg.norm(miss) / np.linalg.norm(x @ weight.T)


@pytest.mark.parametrize(("fmt", "bits"), [("int8/g64", 8), ("int6/g64", 6), ("mxint8", 8)])
def test_sizes_of_components_in_l_lower_the_error_of_outputs_at_the_same_weight_error(
    fmt, bits, monkeypatch
):
    with_gauge = [errors_of_weight_and_output(steep(s), fmt, bits) for s in (0, 10)]
    monkeypatch.setattr(branch_module, "_GAUGES", ())
    without = [errors_of_weight_and_output(steep(s), fmt, bits) for s in (0, 10)]
    ratios = np.mean(np.divide(with_gauge, without), axis=0)
    # Descents that differ by rounding noise end within a percent of each other.
    assert ratios[0] < 1.01
    assert ratios[1] < 0.95


@pytest.mark.parametrize(("fmt", "power"), [("int8/g64", 0.75), ("int6/g64", 0.5), ("fp16", 0)])
def test_rows_of_r_keep_the_rest_of_the_size(fmt, power, monkeypatch):
    if power:
        monkeypatch.setattr(branch_module, "_GAUGES", (power,))
        monkeypatch.setattr(branch_module, "_GAUGE_NOISE", 10.0)
    left, right = principal_factors(normal(96, 6), normal(6, 128, seed=1))
    right *= np.float32(2.0) ** -np.arange(6, dtype=np.float32)[:, None]
    branch = FrozenBranch(96, 6, parse_format(fmt), unit=1.0)
    # In two parts: the second keeps to the unit of the first.
    _, _, first_free, rest = branch.freeze(left, right, 2)
    branch.freeze(*principal_factors(first_free, rest), 4)
    sizes, stored = (
        np.linalg.norm(rows.astype(np.float64), axis=1)
        for rows in (right, branch.stored()[1].dequantize())
    )
    # Rows are refitted to an L of six bits: a few percent.
    np.testing.assert_allclose(stored / stored[0], (sizes / sizes[0]) ** (1 - power), rtol=0.1)


def test_sizes_stay_in_r_where_l_has_no_bits_for_them():
    # int2 codes in one group: a column a hundred times as small as the first is lost.
    left, right = principal_factors(normal(96, 6), normal(6, 128, seed=1))
    right *= np.float32(4.0) ** -np.arange(6, dtype=np.float32)[:, None]
    branch = FrozenBranch(96, 6, parse_format("int2/g64"), unit=1.0)
    branch.freeze(left, right, 6)
    assert branch.noise < 1.05 * plain_noise(left, right, "int2/g64")


def plain_noise(left, right, fmt):
    """||L^ R^ - L R||_F of both factors rounded as they are."""
    rows, columns = (quantize(part, fmt, rule="signed_mse").dequantize() for part in (right, left))
    return np.linalg.norm(columns.astype(np.float64) @ rows - left.astype(np.float64) @ right)
