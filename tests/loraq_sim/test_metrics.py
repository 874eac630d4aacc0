"""Error measures on cases worked out by hand."""

import math

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.metrics import output_error, relative_error


def test_measures_of_a_right_triangle():
    # y = (3, 4): norm 5. The miss (0, 1) has norm 1.
    error = output_error(np.array([[3.0, 5.0]]), np.array([[3.0, 4.0]]))
    assert error.relative == pytest.approx(0.2, rel=1e-15)
    assert error.sqnr_db == pytest.approx(20 * math.log10(5), rel=1e-15)
    assert error.max_abs == 1.0
    assert error.rms == pytest.approx(math.sqrt(12.5), rel=1e-15)
    assert error.cosine == pytest.approx(29 / (5 * math.sqrt(34)), rel=1e-15)


def test_an_exact_result_has_infinite_sqnr():
    y = np.array([[1.0, -2.0]], dtype=np.float32)
    error = output_error(y, y)
    assert (error.relative, error.sqnr_db, error.max_abs) == (0.0, math.inf, 0.0)


def test_a_zero_reference_gives_zero_or_infinite_error():
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    assert relative_error(zero, zero) == 0.0
    assert relative_error(one, zero) == math.inf
    assert output_error(one, zero).sqnr_db == -math.inf
    assert output_error(one, zero).cosine == 0.0


def test_float32_inputs_are_measured_in_float64():
    y = np.full((1, 1000), 1e30, dtype=np.float32)
    assert relative_error(np.zeros_like(y), y) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("shapes", [((1, 2), (2, 1)), ((0, 2), (0, 2))])
def test_shapes_must_agree_and_hold_values(shapes):
    with pytest.raises(InputError, match=r"shapes must agree and hold values"):
        relative_error(np.zeros(shapes[0]), np.zeros(shapes[1]))
