"""The search for the best of several scales skips work, never a better candidate."""

import numpy as np
import pytest

from loraq_sim.kernels.quantize import best_scales
from loraq_sim.quantizers.tensor import group_ends

_LANES = 32


def searched_in_full(values, candidates, lo, hi):
    """Scales of groups (G, n) by trying all candidates (G, C), the first on ties."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        inverse = np.float32(1) / candidates
        codes = np.rint(np.clip(values[:, None] * inverse[:, :, None], lo, hi))
        squares = np.square(values[:, None] - codes * candidates[:, :, None])
        # Sums in the order that decides: 32 lanes, added up one after another, then the rest.
        full = values.shape[1] // _LANES * _LANES
        lanes = np.zeros((*candidates.shape, _LANES), dtype=np.float32)
        for start in range(0, full, _LANES):
            lanes += squares[:, :, start : start + _LANES]
        errors = np.zeros(candidates.shape, dtype=np.float32)
        for terms in (lanes, squares[:, :, full:]):
            for i in range(terms.shape[2]):
                errors += terms[:, :, i]
        best = np.argmin(np.where(np.isnan(errors), np.inf, errors), axis=1)
    return np.take_along_axis(candidates, best[:, None], axis=1)[:, 0]


def drawn(kind, shape, rng):
    values = rng.standard_normal(shape)
    if kind == "on the grid":
        values = np.rint(3 * values)
    elif kind == "mostly zero":
        values[rng.random(shape) < 0.9] = 0
    elif kind == "subnormal":
        values *= 1e-42
    elif kind == "squares underflow":
        values *= 1e-22
    elif kind == "squares overflow":
        values *= 1e20
    return values.astype(np.float32)


KINDS = ("normal", "on the grid", "mostly zero", "subnormal", "squares underflow")


@pytest.mark.parametrize("group", [7, 32, 64, 100, 5601])
@pytest.mark.parametrize("kind", [*KINDS, "squares overflow"])
def test_a_search_gives_what_trying_all_candidates_gives(kind, group):
    rng = np.random.default_rng([group, len(kind)])
    values = drawn(kind, (40, group), rng)
    extremes = group_ends(values, group).extremes
    steps = extremes / np.float32(7)
    ratios = np.linspace(1.0, 0.6, 17, dtype=np.float32)
    mirrored = extremes / np.float32(-8) * ratios
    # Repeated candidates: the first of equals must win.
    candidates = np.concatenate([steps * ratios, mirrored, steps * ratios[::-1]], axis=1)
    candidates[extremes[:, 0] == 0] = 0
    scales = np.empty((40, 1), np.float32)
    best_scales(values, candidates[:, None], group, np.float32(-8), np.float32(7), scales)
    np.testing.assert_array_equal(scales[:, 0], searched_in_full(values, candidates, -8, 7))


def test_extremes_keep_their_sign_and_prefer_the_positive():
    rows = np.float32([[1, -2, 2, 0, -3, 1, 0, 0, -4]])
    np.testing.assert_array_equal(group_ends(rows, 4).extremes, [[2, -3, -4]])
