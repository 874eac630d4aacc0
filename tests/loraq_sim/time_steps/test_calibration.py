import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.time_steps.errors import chosen_steps

VALUES = np.array([1000.0, 750.0, 500.0, 250.5, 1.0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("first", [0]),
        ("last", [4]),
        ("first:2", [0, 1]),
        ("last:2", [3, 4]),
        ("first:99", [0, 1, 2, 3, 4]),
        ("500", [2]),
        ("250.5", [3]),
        ("1000..500", [0, 1, 2]),
        ("300..800", [1, 2]),
        ("first+1", [0, 4]),
        (" 750 + 250..260 ", [1, 3]),
    ],
)
def test_steps_are_chosen_by_place_value_and_range(text, expected):
    np.testing.assert_array_equal(np.flatnonzero(chosen_steps(text, VALUES)), expected)


@pytest.mark.parametrize(
    "text", ["", "early", "first:", "first:0", "first:-1", "1..", "..", "nan", "all+", "1e999", "²"]
)
def test_text_that_names_no_choice_is_refused(text):
    with pytest.raises(InputError, match="not understood; use all, first"):
        chosen_steps(text, VALUES)


def test_a_step_that_is_not_recorded_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"no time step '999' is recorded; there are 1000, 750"):
        chosen_steps("first+999", VALUES)
    with pytest.raises(InputError, match=r"there are 0, 1, 2, 3, 4, \.\.\., 29$"):
        chosen_steps("40..50", np.arange(30.0))
