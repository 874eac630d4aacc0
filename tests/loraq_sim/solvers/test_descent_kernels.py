"""The two directions of a descent against plain NumPy in float64."""

import numpy as np
import pytest

from loraq_sim.kernels.quantize import range_direction, round_residual

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def pair(seed=0, shape=(6, 100)):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape, dtype=np.float32)
    return weight, 0.3 * rng.standard_normal(shape, dtype=np.float32)


def grouped(values, group):
    return [values[:, start : start + group] for start in range(0, values.shape[1], group)]


def range_measure(v, group, p, centers):
    parts = zip(grouped(v, group), centers.T, strict=True)
    return sum(
        0.5 * (np.abs(part - c[:, None]) ** p).sum(axis=1) ** (2 / p) for part, c in parts
    ).sum()


def centers_of(v, group, offset):
    highs = np.stack([part.max(axis=1) for part in grouped(v, group)], axis=1)
    lows = np.stack([part.min(axis=1) for part in grouped(v, group)], axis=1)
    return np.where(highs >= -lows, 1, -1) * offset * (highs - lows)


@pytest.mark.parametrize("group", [16, 32, 64, 100])
@pytest.mark.parametrize("doublings", [3, 4, 5])
@pytest.mark.parametrize("offset", [0.0, 1 / 32])
def test_range_direction_is_the_gradient_of_the_range_measure(group, doublings, offset):
    weight, product = pair()
    v = (weight - product).astype(np.float64)
    centers = centers_of(v, group, offset)
    direction = product.copy()
    range_direction(weight, direction, group, doublings, np.float32(offset))
    toward = np.random.default_rng(1).standard_normal(v.shape)
    step = 1e-5
    slope = (
        range_measure(v + step * toward, group, 2**doublings, centers)
        - range_measure(v - step * toward, group, 2**doublings, centers)
    ) / (2 * step)
    # Float32 powers: 32 times the relative rounding of 6e-8, and the truncation of small elements.
    assert np.sum(direction * toward) == pytest.approx(slope, rel=1e-3)


def test_range_direction_of_constant_zero_groups_is_zero():
    weight, _ = pair()
    direction = weight.copy()
    range_direction(weight, direction, 16, 3, np.float32(1 / 32))
    np.testing.assert_array_equal(direction, np.zeros_like(weight))


def nearest_integer(scaled, lo=-8, hi=7):
    return np.clip(np.rint(scaled), lo, hi)


def nearest_e2m1(scaled):
    levels = np.concatenate([-E2M1[:0:-1], E2M1])
    return levels[np.abs(scaled[..., None] - levels).argmin(axis=-1)]


def round_by(grid, weight, product, scales, *, fresh, steps, group, is_power=False):
    steps = np.array(steps, dtype=np.float32)
    ends, code = (), fresh
    if grid == "int4":
        ends, code = (np.float32(-8), np.float32(7)), -8 if fresh else 0
    how = np.float32(code), is_power, steps, scales
    return round_residual(weight, product, group, ends, *how)


@pytest.mark.parametrize("grid", ["int4", "e2m1"])
@pytest.mark.parametrize("group", [16, 32, 64, 100])
def test_what_rounding_leaves_is_the_distance_to_the_nearest_level(grid, group):
    weight, product = pair(2)
    v = weight - product
    left = product.copy()
    scales = np.zeros((6, -(-100 // group)), dtype=np.float32)
    total = round_by(grid, weight, left, scales, fresh=True, steps=[1.0], group=group)
    per_element = np.repeat(scales, group, axis=1)[:, :100].astype(np.float64)
    nearest = nearest_integer if grid == "int4" else nearest_e2m1
    expected = v - nearest(v / per_element) * per_element
    # Ties and float32 rounding: distances agree, signs of ties may not.
    np.testing.assert_allclose(np.abs(left), np.abs(expected), atol=1e-6)
    assert total == pytest.approx(np.square(expected).sum(), rel=1e-4)


@pytest.mark.parametrize("grid", ["int4", "e2m1"])
def test_repeated_calls_never_lose_on_a_product_that_stands_still(grid):
    weight, product = pair(3, (20, 128))
    scales = np.zeros((20, 4), dtype=np.float32)
    totals = [
        round_by(grid, weight, product.copy(), scales, fresh=False, steps=[1, s], group=32)
        for s in (0.97, 1.03, 0.97, 1.03, 0.97)
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("grid", ["int4", "e2m1"])
def test_power_of_two_scales_stay_powers_of_two(grid):
    weight, product = pair(4)
    scales = np.zeros((6, 4), dtype=np.float32)
    for step in (0.5, 2.0):
        round_by(
            grid,
            weight,
            product.copy(),
            scales,
            fresh=True,
            steps=[1, step],
            group=32,
            is_power=True,
        )
    mantissa, _ = np.frexp(scales)
    np.testing.assert_array_equal(mantissa, np.full_like(scales, 0.5))


def test_a_group_without_anything_left_keeps_its_zero_scale():
    weight, _ = pair(5)
    left = weight.copy()
    scales = np.zeros((6, 4), dtype=np.float32)
    assert round_by("int4", weight, left, scales, fresh=True, steps=[1], group=32) == 0.0
    np.testing.assert_array_equal(left, np.zeros_like(left))
    np.testing.assert_array_equal(scales, np.zeros_like(scales))
