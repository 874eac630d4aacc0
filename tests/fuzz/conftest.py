"""The fuzzer of `benchmarks/`, imported under its own names."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def guard():
    """The guard of this process: an audit hook stays for its life, so one serves all tests."""
    sys.path.insert(0, str(BENCHMARKS))
    from fuzz_guard import Guard

    yield Guard()
    sys.path.remove(str(BENCHMARKS))
