"""Ticks are round, few and inside the axis."""

import numpy as np
import pytest

from loraq_sim.reporting.panels import nice_log_ticks, tick_texts


@pytest.mark.parametrize(
    ("low", "high"), [(1.6, 24), (18, 20), (0.01, 3000), (9.9, 10.1), (5.0, 5.0001), (1e-7, 2e-7)]
)
def test_log_ticks_are_few_sorted_and_inside(low, high):
    ticks = nice_log_ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(ticks)
    assert all(low <= tick <= high for tick in ticks)


def test_log_ticks_over_a_decade_are_the_usual_ones():
    np.testing.assert_allclose(nice_log_ticks(1.6, 24), [2, 3, 5, 7, 10, 15, 20], rtol=1e-12)


def test_labels_have_separators_and_no_needless_zeros():
    assert tick_texts([0.5, 1.0, 1500.0, 0.00002]) == ["0.5", "1", "1,500", "0.00002"]


def test_even_labels_share_their_decimals():
    assert tick_texts([1.5, 2.0, 2.5], even=True) == ["1.5", "2.0", "2.5"]


def test_float_dust_does_not_reach_a_label():
    assert tick_texts([0.1 + 0.2]) == ["0.3"]
