"""Standing threads: every caller gets all of its work done, and the bits of one thread."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from loraq_sim.emulator import tile_ready, tile_run
from loraq_sim.emulator.accumulation import run_wide
from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_srs
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.requantize import srs
from loraq_sim.emulator.tile_run import run_together
from loraq_sim.kernels.processor import PATH_VARIABLE, PATHS, choose_path

HERE = PATHS[PATHS.index(choose_path()) :]
SATURATE = {"overflow": "saturate"}
ARRAYS = [
    MacArray(),
    MacArray(acc_bits=16, **SATURATE),
    MacArray(acc_bits=12, **SATURATE),
    MacArray(acc_bits=18, products_per_add=2, **SATURATE),
    MacArray(acc_bits=18, products_per_add=3, **SATURATE),
    MacArray(acc_bits=17, products_per_add=4, accumulators=3, **SATURATE),
    MacArray(acc_bits=16, accumulators=2, **SATURATE),
    MacArray(acc_bits=16, overflow="saturate_symmetric"),
]


@pytest.fixture(autouse=True)
def threads_for_small_work(monkeypatch):
    monkeypatch.setattr(tile_ready, "WORTH_THREADS", 1)
    monkeypatch.setattr(tile_run, "WORTH_THREADS", 1)
    monkeypatch.setattr(tile_ready, "_UNIT", 1)  # a panel of columns at a time


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("start", ["none", "bias", "matrix", "column"])
def test_any_number_of_threads_gives_the_bits_of_the_naive_kernel(monkeypatch, path, start):
    monkeypatch.setenv(PATH_VARIABLE, path)
    rng = np.random.default_rng(0)
    # Neither rows, columns nor K fill their last tile.
    a = rng.integers(-128, 128, (53, 61)).astype(np.int8)
    w = rng.integers(-128, 128, (141, 61)).astype(np.int8)
    weight = pack_weight(w)
    shape = {"none": None, "bias": (141,), "matrix": (53, 141), "column": (53, 1)}[start]
    init = None if shape is None else rng.integers(-1500, 1500, shape)
    full = None if init is None else np.broadcast_to(init, (53, 141)).astype(np.int64)
    for mac in ARRAYS:
        naive = run_wide(a, w, mac, full).acc
        for threads in (1, 2, 3, 16):
            acc = emulate_gemm(a, weight, mac, init=init, threads=threads)
            np.testing.assert_array_equal(acc, naive)
            out = emulate_gemm_srs(a, weight, mac, 7, init=init, threads=threads)
            np.testing.assert_array_equal(out, srs(naive, 7))


def test_narrow_codes_that_one_weight_was_made_ready_for_may_be_followed_by_wide_ones():
    rng = np.random.default_rng(1)
    w = rng.integers(-8, 8, (70, 90)).astype(np.int8)
    weight = pack_weight(w)
    for chunk in (1, 2):
        mac = MacArray(acc_bits=10, overflow="saturate", products_per_add=chunk)
        for high in (8, 128, 20, 33, 32, 8):
            a = rng.integers(-high, high, (40, 90)).astype(np.int8)
            naive = run_wide(a, w, mac, None).acc
            for threads in (1, 2):
                acc = emulate_gemm(a, weight, mac, threads=threads)
                np.testing.assert_array_equal(acc, naive)


def test_callers_at_the_same_time_do_not_meet():
    rng = np.random.default_rng(2)
    weight = pack_weight(rng.integers(-128, 128, (100, 64)))
    operands = [rng.integers(-128, 128, (rows, 64)).astype(np.int8) for rows in range(1, 60)]
    mac = MacArray(acc_bits=16, overflow="saturate")
    alone = [emulate_gemm(a, weight, mac) for a in operands]
    with ThreadPoolExecutor(4) as callers:
        together = list(
            callers.map(lambda a: emulate_gemm(a, weight, mac, threads=3), operands * 3)
        )
    for one, other in zip(alone * 3, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_work_is_done_once_and_a_thread_that_never_starts_is_not_waited_for():
    left, done = iter(range(1000)), []
    block = threading.Event()
    run_together(2, lambda: None)  # one standing thread, which now gets stuck
    stuck = threading.Thread(target=run_together, args=(2, lambda: block.wait(10)), daemon=True)
    stuck.start()
    run_together(2, lambda: done.extend(left))
    block.set()
    stuck.join(10)
    assert not stuck.is_alive()
    assert sorted(done) == list(range(1000))


def test_an_error_in_a_standing_thread_reaches_the_caller():
    met = threading.Barrier(2, timeout=300)

    def run() -> None:
        met.wait()
        if threading.current_thread().name.startswith("loraq-sim-tiles"):
            raise RuntimeError("no tile")

    with pytest.raises(RuntimeError, match="no tile"):
        run_together(2, run)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no safe fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own():
    run_together(2, lambda: None)
    child = os.fork()
    if child == 0:
        met = threading.Barrier(2, timeout=300)
        try:
            run_together(2, met.wait)
        except BaseException:  # noqa: BLE001 (the exit status is all a forked test may say)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
