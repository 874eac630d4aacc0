"""Truncated factorization against the Eckart-Young optimum."""

import ml_dtypes
import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.solvers import low_rank
from loraq_sim.solvers.low_rank import balanced_factors, principal_factors, truncated_svd
from loraq_sim.solvers.main_grid import MainGrid


def flat_spectrum(seed=0, shape=(300, 400)):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def optimum(matrix, rank):
    tail = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[rank:]
    return float(np.sqrt(np.square(tail).sum()))


def decaying_spectrum(seed=0, shape=(300, 400)):
    u, _, vt = np.linalg.svd(flat_spectrum(seed, shape), full_matrices=False)
    return (u * np.float32(0.9) ** np.arange(shape[0], dtype=np.float32)) @ vt


@pytest.mark.parametrize("rank", [1, 8, 32, 90, 300])
def test_factors_have_the_promised_shape_and_orthonormal_columns(rank):
    left, right = truncated_svd(flat_spectrum(), rank, rng=np.random.default_rng(1))
    assert left.shape == (300, rank)
    assert right.shape == (rank, 400)
    # Householder QR and SVD are orthonormal to a few units of float32 rounding per column.
    np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=300 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_eckart_young_optimum_of_a_decaying_spectrum(rank):
    # With 8 extra columns and two power iterations the sketch misses the wanted directions by
    # 0.9 ** (8 * 5) = 1.5 % in angle, so by 0.02 % in the norm of the residual.
    matrix = decaying_spectrum()
    left, right = truncated_svd(matrix, rank, rng=np.random.default_rng(1))
    assert np.linalg.norm(matrix - left @ right) <= 1.001 * optimum(matrix, rank)


@pytest.mark.parametrize("rank", [8, 32, 90])
def test_a_flat_spectrum_stays_within_the_bound_of_halko_theorem_10_5(rank):
    # Without power iterations the expected residual is sqrt(1 + r / (p - 1)) of the optimum.
    matrix = flat_spectrum()
    residuals = [
        np.linalg.norm(
            matrix
            - np.matmul(
                *truncated_svd(matrix, rank, rng=np.random.default_rng(1), power_iterations=q)
            )
        )
        for q in (0, 2, 6)
    ]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] <= np.sqrt(1 + rank / 7) * optimum(matrix, rank)


def test_a_large_rank_is_exact():
    matrix = flat_spectrum()
    left, right = truncated_svd(matrix, 150, rng=np.random.default_rng(1))
    # Backward error of a float32 decomposition: a small multiple of eps times the norm.
    slack = 30 * np.finfo(np.float32).eps * np.linalg.norm(matrix)
    assert np.linalg.norm(matrix - left @ right) <= optimum(matrix, 150) + slack


def test_a_warm_start_is_at_least_as_good_as_a_cold_one_with_one_pass():
    matrix = flat_spectrum(3)
    _, rows = truncated_svd(matrix, 20, rng=np.random.default_rng(1), power_iterations=3)
    residuals = [
        np.linalg.norm(matrix - np.matmul(*fit))
        for fit in (
            truncated_svd(matrix, 20, rng=np.random.default_rng(2), power_iterations=1),
            truncated_svd(matrix, 20, rng=np.random.default_rng(2), power_iterations=1, start=rows),
        )
    ]
    assert residuals[1] <= residuals[0]


def test_same_generator_state_gives_the_same_factors():
    matrix = flat_spectrum(4)
    fits = [truncated_svd(matrix, 5, rng=np.random.default_rng(7)) for _ in range(2)]
    np.testing.assert_array_equal(fits[0][1], fits[1][1])


@pytest.fixture
def mixed():
    """Factors of rank 5 whose columns are neither orthonormal nor in order of size."""
    rng = np.random.default_rng(5)
    sizes = np.array([1, 9, 3, 27, 0.5], np.float32)
    left = rng.standard_normal((40, 5), dtype=np.float32) * sizes
    return left, rng.standard_normal((5, 60), dtype=np.float32)


def test_principal_factors_are_those_of_the_product(mixed):
    left, right = principal_factors(*mixed)
    exact = mixed[0].astype(np.float64) @ mixed[1]
    # QR and SVD of (r, .) matrices: a small multiple of eps times the norm.
    slack = 30 * np.finfo(np.float32).eps * np.linalg.norm(exact)
    np.testing.assert_allclose(left @ right, exact, rtol=0, atol=slack)
    np.testing.assert_allclose(left.T @ left, np.eye(5), atol=40 * np.finfo(np.float32).eps)
    sizes = np.linalg.svd(exact, compute_uv=False)[:5]
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), sizes, rtol=0, atol=slack)


def test_balanced_factors_have_the_same_product_and_equal_sizes(mixed):
    left, right = principal_factors(*mixed)
    one, other = balanced_factors(left, right)
    slack = 30 * np.finfo(np.float32).eps * np.linalg.norm(right)
    np.testing.assert_allclose(one @ other, left @ right, rtol=0, atol=slack)
    np.testing.assert_allclose(
        np.linalg.norm(one, axis=0), np.linalg.norm(other, axis=1), rtol=1e-5
    )


def test_a_component_that_vanished_stays_zero(mixed):
    left, right = principal_factors(*mixed)
    right[4] = 0
    one, other = balanced_factors(left, right)
    assert not one[:, 4].any()
    assert not other[4].any()
    np.testing.assert_allclose(one @ other, left @ right, rtol=0, atol=1e-3)


@pytest.mark.parametrize("main", ["int4/g32", "int4/tensor", "mxfp4"])
@pytest.mark.parametrize("holds", [False, True])
def test_directions_in_bf16_are_those_of_rounded_factors(main, holds):
    rng = np.random.default_rng(3)
    # More rows than are rounded at once, and not a whole number of times.
    weight, left, right = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((600, 96), (600, 5), (5, 96))
    )
    left *= np.float32(0.1)
    grids = [MainGrid(lq.parse_format(main), weight.shape) for _ in range(2)]
    coarse = low_rank.DirectionsInBf16(weight, grids[0], holds, (0, 1))
    exact = low_rank._CpuDirections(weight, grids[1], holds)
    assert coarse.distance(left, right) == exact.distance(left, right)

    def bf16(values):
        return np.asarray(values).astype(ml_dtypes.bfloat16).astype(np.float32)

    columns, rows = bf16(left), bf16(right)
    for step in range(2):
        # What the exact ones make of the rounded product.
        exact._through = lambda a, b, turn: (p := bf16(columns @ rows), turn(slice(None), p))
        expected = exact.leave(left, right, step).astype(np.float64)
        found = coarse.project(left, right, coarse.leave(left, right, step), (0, 1))
        for ours, theirs in zip(found, (rows @ expected.T, columns.T @ expected), strict=True):
            assert ours.dtype == np.float32
            # Directions of 8 bits, sums of them in float32, results of 8 bits.
            assert np.linalg.norm(ours - theirs) <= 2.0**-8 * np.linalg.norm(theirs)
        assert coarse.finish()[step] == pytest.approx(exact.finish()[step], rel=1e-6)
    np.testing.assert_array_equal(grids[0].scales, grids[1].scales)
    assert coarse.project(left, right, ("only", None), (0,)) == ["only"]


def test_products_have_all_bits_where_next_to_nothing_is_left():
    rng = np.random.default_rng(6)
    left, right = rng.standard_normal((80, 5), np.float32), rng.standard_normal((5, 96), np.float32)
    weight = left @ right + np.float32(1e-3) * rng.standard_normal((80, 96), np.float32)
    grid = MainGrid(lq.parse_format("int4/g32"), weight.shape)
    directions = low_rank.DirectionsInBf16(weight, grid, False, (0, 1))
    left_over = directions.distance(left, right)
    directions.leave(left, right, 0)
    # Rounding to four bits leaves a tenth; noise of 2**-9 of the weight would be more than all.
    assert directions.finish()[0] < 0.15 * left_over


def test_descents_in_bf16_end_at_the_same_error(monkeypatch):
    rng = np.random.default_rng(4)
    weight = rng.standard_t(6, (192, 256)) + rng.standard_normal((192, 9)) @ rng.standard_normal(
        (9, 256)
    )
    monkeypatch.setattr(low_rank, "_LEAST_IN_BF16", 0)
    errors = []
    for is_native in (False, True):
        monkeypatch.setattr(low_rank, "multiplies_bf16", lambda is_native=is_native: is_native)
        errors.append(lq.solve(weight.astype(np.float32), rank=24).weight_error)
    assert errors[0] != errors[1]
    assert -0.02 < errors[1] / errors[0] - 1 < 0.005
