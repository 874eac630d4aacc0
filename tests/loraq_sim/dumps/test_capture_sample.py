import numpy as np
import pytest

from loraq_sim.dumps.capture_hooks import RowSample


def feed(sample, batches, first_firing=0):
    """Feed batches of rows whose only value is their place in the stream."""
    place = sample._n_seen
    for firing, count in enumerate(batches, start=first_firing):
        rows = np.arange(place, place + count, dtype=np.float32)[:, None]
        places, keys = sample.choose(count)
        sample.add(rows[places], places, keys, count=count, firing=firing, step=firing)
        place += count
    return sample


def kept(sample):
    return sample.in_order()[0][:, 0].astype(int)


def test_everything_is_kept_while_it_fits():
    rows, steps = feed(RowSample(10, 0, "a"), [3, 4]).in_order()
    np.testing.assert_array_equal(rows[:, 0], np.arange(7))
    np.testing.assert_array_equal(steps, [0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("batches", [[1000], [10] * 100, [1] * 1000, [990, 10], [3, 400, 597]])
def test_the_sample_does_not_depend_on_how_the_stream_is_cut(batches):
    np.testing.assert_array_equal(
        kept(feed(RowSample(50, 7, "a"), batches)), kept(feed(RowSample(50, 7, "a"), [500, 500]))
    )


def test_every_row_has_the_same_chance():
    n, budget, draws = 60, 15, 2000
    counts = np.zeros(n)
    for seed in range(draws):
        counts[kept(feed(RowSample(budget, seed, "a"), [20, 1, 39]))] += 1
    # Each count is binomial with p = 1/4: 5 standard deviations of 2000 trials are 97.
    assert np.abs(counts - draws * budget / n).max() < 97


def test_seed_and_name_change_the_sample():
    samples = [kept(feed(RowSample(20, s, n), [500])) for s, n in ((0, "a"), (1, "a"), (0, "b"))]
    assert len({tuple(sample) for sample in samples}) == 3


def test_a_copy_forgets_later_rows_and_stays_uniform():
    n, draws = 60, 2000
    counts = np.zeros(n)
    for seed in range(draws):
        shared = feed(RowSample(15, seed, "a"), [20, 20])
        own = feed(shared.before(1, seed, "b"), [40], first_firing=1)
        found = kept(own)
        assert len(found) <= 15
        # Rows 20 to 39 of the shared stream are forgotten; the copy's own stream starts at 40.
        assert not np.any((found >= 20) & (found < 40))
        counts[np.where(found >= 40, found - 20, found)] += 1
        assert len(kept(shared)) == 15
    # The bound that was lowered by forgotten rows thins all 60 rows alike, whatever the batch.
    expected = counts.mean()
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
