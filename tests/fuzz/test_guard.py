"""The guard of the fuzzer sees what it is to see: a blind one would pass every reader."""

import os
import pickle
import warnings

import pytest


@pytest.fixture
def guarded(guard, tmp_path):
    """Runs a reader of one file under the guard; raises what the guard finds."""
    guard.scratch = tmp_path / "scratch"
    guard.scratch.mkdir()
    (guard.scratch / "file").write_bytes(pickle.dumps(print))
    return lambda read: guard.check(read, (ValueError,), guard.scratch / "file")


def _raise(error):
    raise error


def _open_elsewhere(path):
    (path.parent.parent / "elsewhere").write_text("x")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda path: _raise(KeyError("x")), "KeyError at"),
        (lambda path: _raise(ValueError("two\nlines")), "no printable line"),
        (lambda path: _raise(ValueError("\x1b[31m")), "no printable line"),
        (lambda path: _raise(ValueError("x" * 5000)), "has 5000 characters"),
        (lambda path: warnings.warn("w", stacklevel=1), "warned: UserWarning"),
        (lambda path: pickle.loads(path.read_bytes()), "did pickle.find_class"),
        (lambda path: os.system("true"), "did os.system"),
        (_open_elsewhere, "did open"),
    ],
    ids=[
        "other error",
        "two lines",
        "escape",
        "long",
        "warning",
        "pickle",
        "shell",
        "file",
    ],
)
def test_the_guard_sees_every_broken_rule(read, message, guarded):
    from fuzz_guard import Defect

    with pytest.raises(Defect, match=message):
        guarded(read)


def test_the_guard_sees_a_memory_peak_and_a_long_case(guarded, monkeypatch):
    import fuzz_guard

    with monkeypatch.context() as patch:
        patch.setattr(fuzz_guard, "_peak_bytes", iter([0, 2**30]).__next__)
        with pytest.raises(fuzz_guard.Defect, match="took 1024 MiB"):
            guarded(lambda path: None)
    monkeypatch.setattr(fuzz_guard, "MAX_CPU_S", -1.0)
    with pytest.raises(fuzz_guard.Defect, match="took 0 s"):
        guarded(lambda path: None)


def test_the_guard_lets_a_good_reader_pass(guarded):
    assert guarded(lambda path: path.read_bytes()) == "read"
    assert guarded(lambda path: _raise(ValueError("bad file"))) == "refused"
