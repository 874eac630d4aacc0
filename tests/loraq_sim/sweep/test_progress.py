import pytest

from loraq_sim.sweep import progress
from loraq_sim.sweep.progress import ProgressClock, SweepOutcome


@pytest.fixture
def clock(monkeypatch):
    """A settable clock in place of the system's."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_follows_the_pace_after_the_first_case(clock):
    progress_clock = ProgressClock(work=10.0)
    assert progress_clock.eta_s is None
    clock[0] += 60.0  # Workers start and compile: this says nothing about the pace.
    progress_clock.advance(1.0)
    assert progress_clock.eta_s is None
    clock[0] += 6.0
    progress_clock.advance(3.0)
    assert progress_clock.eta_s == 12.0
    assert progress_clock.elapsed_s == 66.0


def test_no_time_is_left_at_the_end(clock):
    progress_clock = ProgressClock(work=2.0)
    progress_clock.advance(1.0)
    clock[0] += 1.0
    progress_clock.advance(1.0)
    assert progress_clock.eta_s == 0.0


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({}, 0),
        ({"n_failed": 1}, 1),
        ({"n_failed": 1, "is_unreadable": True}, 2),
        ({"n_failed": 1, "is_unreadable": True, "interrupted": True}, 130),
    ],
)
def test_the_exit_code_says_how_it_ended(facts, code):
    base = {"n_ok": 1, "n_failed": 0, "n_skipped": 0, "n_left": 0, "seconds": 1.0}
    base |= {"interrupted": False, "is_unreadable": False}
    assert SweepOutcome(**(base | facts)).exit_code == code
