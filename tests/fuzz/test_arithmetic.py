"""A fiftieth of the random cases of `benchmarks/fuzz_arithmetic.py`; an oracle that can fail."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASES, SEED = 1000, 20


@pytest.fixture(scope="module")
def arithmetic():
    """The benchmark's module."""
    sys.path.insert(0, str(BENCHMARKS))
    import fuzz_arithmetic

    yield fuzz_arithmetic
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("kind", ["gemm", "long", "scaled", "quantize"])
def test_random_cases_agree_with_python_integers(arithmetic, kind):
    share, _ = arithmetic.KINDS[kind]
    counts, differences = arithmetic.run(max(1, round(share * CASES)), SEED, kind)
    assert differences == []
    assert sum(counts.values()) == max(1, round(share * CASES))


def test_a_wrong_sum_is_noticed(arithmetic, monkeypatch):
    exact = arithmetic.lq.emulate_gemm

    def off_by_one(*operands, **options):
        return exact(*operands, **options) + np.int64(1)

    monkeypatch.setattr(arithmetic.lq, "emulate_gemm", off_by_one)
    _, differences = arithmetic.run(3, SEED, "gemm")
    assert differences
    assert all("accumulators" in text for text in differences)
