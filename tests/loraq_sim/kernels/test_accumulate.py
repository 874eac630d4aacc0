"""The kernels themselves: plain Python and compiled code agree, and both kernels agree."""

import numpy as np
import pytest

import loraq_sim.kernels.accumulate as lanes
import loraq_sim.kernels.accumulate as wide
from loraq_sim.emulator.accumulation import run_lanes, run_wide
from loraq_sim.emulator.bounds import Bounds
from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report
from loraq_sim.emulator.mac_array import OVERFLOW_RULES, MacArray

LANE_KERNELS = (
    "_chunk_sums",
    "_fit_tree",
    "_add_exact",
    "_add_clamped",
    "_add_clamped_counted",
    "_add_wrapped_counted",
    "_merge",
    "accumulate_lanes",
)


def codes(m, n, k, seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(-128, 128, (m, k)).astype(np.int8)
    return a, rng.integers(-128, 128, (n, k)).astype(np.int8)


def assert_same_report(first, second):
    np.testing.assert_array_equal(first.acc, second.acc)
    assert first.overflow_count == second.overflow_count
    assert first.tree_overflow_count == second.tree_overflow_count
    assert first.outputs_affected == second.outputs_affected


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize(("chunk", "tree_bits"), [(1, None), (2, 15), (7, 16), (64, None)])
def test_lane_kernels_compiled_and_plain_agree(monkeypatch, overflow, chunk, tree_bits):
    a, w = codes(2, 3, 70, 0)
    mac = MacArray(
        acc_bits=17,
        overflow=overflow,
        products_per_add=chunk,
        accumulators=2,
        tree_bits=tree_bits,
    )
    compiled = emulate_gemm_report(a, w, mac), emulate_gemm(a, w, mac)
    for name in LANE_KERNELS:
        monkeypatch.setattr(lanes, name, getattr(lanes, name).py_func)
    plain = emulate_gemm_report(a, w, mac), emulate_gemm(a, w, mac)
    assert_same_report(compiled[0], plain[0])
    assert compiled[0].safe_acc_bits == plain[0].safe_acc_bits
    np.testing.assert_array_equal(compiled[1], plain[1])


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("acc_bits", [8, 31, 32, 33, 62, 63, 64])
def test_wide_kernel_compiled_and_plain_agree(monkeypatch, overflow, acc_bits):
    a, w = codes(3, 4, 40, acc_bits)
    mac = MacArray(acc_bits=acc_bits, overflow=overflow, products_per_add=3, accumulators=3)
    start = np.random.default_rng(1).choice([mac.lo, mac.hi, 0], (3, 4)).astype(np.int64)
    compiled = run_wide(a, w, mac, start)
    for name in ("_add", "accumulate_wide"):
        monkeypatch.setattr(wide, name, getattr(wide, name).py_func)
    plain = run_wide(a, w, mac, start)
    assert_same_report(compiled, plain)
    assert compiled.extremes == plain.extremes


# The wide kernel walks K in order for one output at a time: it is the naive loop.
@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize(
    ("acc_bits", "chunk", "accumulators", "tree_bits"),
    [
        (16, 1, 1, None),
        (18, 2, 1, None),
        (20, 3, 2, None),
        (20, 8, 1, 17),
        (12, 16, 5, 15),
        (30, 64, 1, 18),
        (22, 5, 4, None),
    ],
)
def test_whole_matrices_match_the_naive_kernel(overflow, acc_bits, chunk, accumulators, tree_bits):
    a, w = codes(24, 300, 517, 3)
    mac = MacArray(
        acc_bits=acc_bits,
        overflow=overflow,
        products_per_add=chunk,
        accumulators=accumulators,
        tree_bits=tree_bits,
    )
    bounds = Bounds.of(a, w, None)
    assert bounds.lanes_fit(mac)
    fast = run_lanes(a, w, mac, None, bounds, True)
    naive = run_wide(a, w, mac, None)
    assert_same_report(fast, naive)
    assert fast.extremes == naive.extremes
    quick = run_lanes(a, w, mac, None, bounds, False)
    np.testing.assert_array_equal(quick.acc, naive.acc)


def test_more_columns_than_one_panel_match_the_naive_kernel():
    a, w = codes(2, 4100, 20, 4)
    mac = MacArray(acc_bits=16, overflow="saturate")
    bounds = Bounds.of(a, w, None)
    fast = run_lanes(a, w, mac, None, bounds, True)
    assert_same_report(fast, run_wide(a, w, mac, None))


@pytest.mark.parametrize("low", [-128, 0], ids=["signed", "unsigned"])
@pytest.mark.parametrize("statistics", [True, False])
def test_more_rows_than_columns_match_the_naive_kernel(low, statistics):
    rng = np.random.default_rng(6)
    a, w = rng.integers(low, low + 256, (70, 40)), rng.integers(-128, 128, (3, 40))
    mac = MacArray(acc_bits=16, overflow="saturate", products_per_add=3, accumulators=2)
    init = rng.integers(mac.lo, mac.hi, (70, 3))
    bounds = Bounds.of(a, w, init)
    fast = run_lanes(a, w, mac, init, bounds, statistics)
    naive = run_wide(a, w, mac, init)
    np.testing.assert_array_equal(fast.acc, naive.acc)
    if statistics:
        assert_same_report(fast, naive)
        assert fast.extremes == naive.extremes
