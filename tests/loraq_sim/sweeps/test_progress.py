import pytest

from loraq_sim.sweeps import run as progress
from loraq_sim.sweeps.run import ProgressClock, SweepOutcome


@pytest.fixture
def clock(monkeypatch):
    """A settable clock in place of the system's."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_learned_by_effort(clock):
    work = [("quick", 1.0), ("quick", 3.0), ("slow", 2.0), ("slow", 2.0)]
    progress_clock = ProgressClock(work, jobs=2)
    assert progress_clock.eta_s is None
    clock[0] += 60.0  # Workers start and compile: this says nothing about the rest.
    progress_clock.advance("quick", 1.0, 0.5)
    assert progress_clock.eta_s is None  # nobody knows yet how slow the slow ones are
    progress_clock.advance("slow", 2.0, 200.0)
    assert progress_clock.eta_s == (3.0 * 0.5 + 200.0) / 2
    assert progress_clock.elapsed_s == 60.0


def test_a_failed_case_teaches_nothing(clock):
    progress_clock = ProgressClock([("a", 1.0)] * 3)
    progress_clock.advance("a", 1.0, None)
    assert progress_clock.eta_s is None
    progress_clock.advance("a", 1.0, 4.0)
    assert progress_clock.eta_s == 4.0


def test_no_time_is_left_at_the_end(clock):
    progress_clock = ProgressClock([("a", 0.1)] * 10)
    for _ in range(10):
        progress_clock.advance("a", 0.1, 1.0)
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
