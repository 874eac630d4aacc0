import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraq_sim.errors import InputError
from loraq_sim.evaluate import sample_rows
from loraq_sim.time_steps.errors import rows_of_steps


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), st.data())
def test_every_step_keeps_rows_and_the_number_of_rows_is_the_one_asked_for(counts, data):
    n_rows, n_steps = sum(counts), sum(count > 0 for count in counts)
    tokens = data.draw(st.integers(n_steps, n_rows))
    index = rows_of_steps(np.array(counts), tokens)
    assert len(index) == tokens
    assert index[0] >= 0
    assert index[-1] < n_rows
    assert (np.diff(index) > 0).all()
    taken = np.bincount(np.repeat(np.arange(len(counts)), counts)[index], minlength=len(counts))
    np.testing.assert_array_equal(taken > 0, np.array(counts) > 0)


def test_the_rows_are_those_of_evaluate_layer_where_these_miss_no_step():
    x = np.arange(60, dtype=np.float32)[:, None]
    index = rows_of_steps(np.array([20, 20, 20]), 7)
    np.testing.assert_array_equal(x[index], sample_rows(x, 7))


def test_rare_steps_are_kept_and_the_rest_is_shared_out_in_proportion():
    # Evenly spread rows 0, 25, 50, 75 would miss the second step.
    index = rows_of_steps(np.array([60, 1, 39]), 4)
    np.testing.assert_array_equal(index, [0, 30, 60, 61])


def test_all_rows_by_default_and_if_more_are_asked_for_than_there_are():
    for tokens in (None, 6, 99):
        np.testing.assert_array_equal(rows_of_steps(np.array([1, 0, 5]), tokens), np.arange(6))


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True])
def test_tokens_must_be_a_positive_integer(tokens):
    with pytest.raises(InputError, match="tokens must be a positive integer"):
        rows_of_steps(np.array([3, 3]), tokens)


def test_fewer_rows_than_steps_are_refused():
    with pytest.raises(InputError, match="tokens=2 cannot represent 3 time steps; use 3 or more"):
        rows_of_steps(np.array([3, 3, 3]), 2)
