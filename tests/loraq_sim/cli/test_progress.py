"""Progress on stderr: lines now and then off a terminal, none when nobody wants them."""

import inspect

import pytest
import typer

from loraq_sim.cli import output as progress
from loraq_sim.cli.app import app
from loraq_sim.cli.output import layer_progress
from loraq_sim.sweeps.progress import SweepEvent


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; ``clock.now += 3`` lets three seconds pass."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_long_run_says_now_and_then_how_far_it_is(clock, capsys):
    for _ in progress.tracked(range(10), "solving", quiet=False):
        clock.now += 2.0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "solving: 3 of 10, ETA 0:14",
        "solving: 6 of 10, ETA 0:08",
        "solving: 9 of 10, ETA 0:02",
        "solving: 10 of 10",
    ]
    assert said.out == ""


def test_a_short_run_says_nothing(clock, capsys):
    for _ in progress.tracked(range(10), "solving", quiet=False):
        clock.now += 0.4
    assert capsys.readouterr().err == ""


def test_nobody_is_told_who_does_not_want_it(clock, capsys):
    for _ in progress.tracked(range(10), "solving", quiet=True):
        clock.now += 60.0
    assert capsys.readouterr().err == ""


def test_written_layers_are_counted_as_they_are_done(clock, capsys):
    with layer_progress(["a", "b"], "writing layers", quiet=False) as on_layer:
        for name in ("a", "b"):
            clock.now += 6.0
            on_layer(name)
    assert capsys.readouterr().err.splitlines() == [
        "writing layers: 1 of 2, ETA 0:06",
        "writing layers: 2 of 2",
    ]


def sweep_events(clock, **wanted):
    with progress.sweep_progress(**wanted) as listener:
        listener(SweepEvent(kind="start", total=2))
        clock.now += 6.0
        listener(SweepEvent(kind="case", total=2, done=1, eta_s=6.0, status="ok", layer="a"))
        failed = {"status": "failed", "message": "why", "layer": "b", "split": "W4A4"}
        listener(SweepEvent(kind="case", total=2, done=2, failed=1, eta_s=0.0, **failed))
        listener(SweepEvent(kind="end", total=2, done=2, failed=1, eta_s=0.0))


def test_a_sweep_without_progress_still_tells_of_failures(clock, capsys):
    sweep_events(clock, counts=False, quiet=False)
    assert capsys.readouterr().err == "b W4A4 failed: why\n"
    sweep_events(clock, counts=True, quiet=False)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 2 cases, ETA about 0:06",
        "b W4A4 failed: why",
        "2 of 2 cases, 1 failed",
    ]
    sweep_events(clock, counts=True, quiet=True)
    assert capsys.readouterr().err == ""


def commands(command=None, path=()):
    command = command or typer.main.get_command(app)
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), command


def names_used(function):
    """Names that a function uses, and those used by functions and classes of its own module."""
    function = inspect.unwrap(function)
    own, found, left = vars(inspect.getmodule(function)), set(), [function.__code__]
    while left:
        code = left.pop()
        left += [inner for inner in code.co_consts if inspect.iscode(inner)]
        for name in set(code.co_names) - found:
            found.add(name)
            value = inspect.unwrap(own[name]) if name in own else None
            if getattr(value, "__module__", "") != function.__module__:
                continue
            parts = vars(value).values() if inspect.isclass(value) else [value]
            left += [part.__code__ for part in parts if inspect.isfunction(part)]
    return found


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda value: str(value)[:24])
def test_commands_that_show_progress_can_be_told_not_to(name, command):
    if not {"tracked", "layer_progress", "sweep_progress"} & names_used(command.callback):
        return
    assert "--no-progress" in {word for option in command.params for word in option.opts}, name
