"""Time two threads against one, by the clock, with the exact product of PyTorch beside them.

The clock also counts what other programs take: a busy machine has no second core to give. So the
calls take turns, each counts by the best of a few rounds, and `torch._int_mm` says in the same
minute what two threads can gain here.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

from loraq_sim.cli.bench_emulator import BENCH_COLUMNS, Operands, timed_medians
from loraq_sim.emulator.gemm import emulate_gemm_srs
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.kernels.processor import choose_path

__all__ = ["thread_rows"]

_ROUNDS = 3
_MUST = 1.8
_SHIFT = 10
_ARRAYS = (
    MacArray(acc_bits=20),
    MacArray(acc_bits=16, overflow="saturate"),
    MacArray(acc_bits=18, overflow="saturate", products_per_add=2),
    MacArray(acc_bits=18, overflow="saturate", products_per_add=4),
    MacArray(acc_bits=18, overflow="saturate", products_per_add=32),
)


def thread_rows(operands: Operands, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each array: `ratio` is one thread's time over two threads'."""
    if (os.cpu_count() or 1) < 2:
        return
    a, weight = operands.a, operands.weight
    for mac in _ARRAYS:

        def run(threads: int, mac: MacArray = mac) -> Callable:
            return lambda: emulate_gemm_srs(a, weight, mac, _SHIFT, threads=threads)

        ratio, seconds = _best(run(1), run(2), repeats)
        verdict = "missed" if ratio < _MUST else "must"
        found = {"mac": str(mac), "path": choose_path(), "must": _MUST, "verdict": verdict}
        yield _row(operands, "emulate_gemm_srs, 2 threads / 1", ratio, seconds) | found
    if (products := _products(operands)) is not None:
        yield _row(operands, "torch._int_mm, 2 threads / 1", *_best(*products, repeats))


def _best(one: Callable, two: Callable, repeats: int) -> tuple[float, float]:
    """(one thread's time over two threads', two threads' seconds), medians of their best rounds."""
    each = max(1, repeats // _ROUNDS)
    rounds = [timed_medians([one, two], each, wall=True) for _ in range(_ROUNDS)]
    # Each by its own best round: one round's disturbed single thread would flatter the ratio.
    single, double = (min(medians) for medians in zip(*rounds, strict=True))
    return single / double, double


def _products(operands: Operands) -> tuple[Callable, Callable] | None:
    try:
        import torch
    except ImportError:
        return None
    a, w = torch.from_numpy(operands.a), torch.from_numpy(operands.w).T.contiguous()

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        torch._int_mm(a, w)
        torch.set_num_threads(1)

    return lambda: run(1), lambda: run(2)


def _row(operands: Operands, what: str, ratio: float, seconds: float) -> dict[str, Any]:
    m, k, n = operands.shape
    return dict.fromkeys(BENCH_COLUMNS) | {
        "shape": f"{m}x{k}x{n}",
        "codes": "int8",
        "what": what,
        "gmacs": 1e-9 * m * k * n / seconds,
        "ratio": ratio,
        "ms": 1e3 * seconds,
    }
