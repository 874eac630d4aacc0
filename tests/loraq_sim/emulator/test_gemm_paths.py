"""Every kernel path, forced on the same input, against Python integers and the naive kernel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.emulator.accumulation import run_wide
from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import OVERFLOW_RULES, MacArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.reference import reference_report
from loraq_sim.emulator.requantize import srs
from loraq_sim.kernels.processor import PATH_VARIABLE, PATHS, choose_path
from loraq_sim.kernels.tiles import tile_kernels

HERE = PATHS[PATHS.index(choose_path()) :]  # a path's instructions exist on the faster ones too
# Where one kernel hands over to the next: 12-bit INT6 and 8-bit INT4 alignment, 16-bit lanes, the
# aligned lane at 16 and 17 bits (signed and unsigned 8-bit codes), the last width of the clamps.
EDGES = (8, 11, 12, 15, 16, 17, 24, 30, 31, 32, 33)
CODES = {"int8": (-128, 127), "uint8": (0, 255), "int6": (-32, 31), "int4": (-8, 7)}


@pytest.fixture(params=HERE)
def path(request, monkeypatch):
    monkeypatch.setenv(PATH_VARIABLE, request.param)
    return request.param


def assert_like_reference(a, w, mac, init=None):
    expected = reference_report(a, w, mac, init)
    report = emulate_gemm_report(a, w, mac, init=init)
    np.testing.assert_array_equal(emulate_gemm(a, w, mac, init=init), expected.acc)
    np.testing.assert_array_equal(report.acc, expected.acc)
    for field in ("overflow_count", "outputs_affected", "first_overflow_k", "safe_acc_bits"):
        assert getattr(report, field) == getattr(expected, field), field
    return expected


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("acc_bits", EDGES)
def test_paths_match_python_integers_at_every_dispatch_edge(path, acc_bits, overflow, kind):
    rng = np.random.default_rng(acc_bits)
    low, high = CODES[kind]
    for chunk, k in ((1, 13), (2, 9), (3, 10), (4, 8), (8, 19)):
        a = rng.choice([low, high, 0, 1], (2, k), p=[0.4, 0.4, 0.1, 0.1])
        w = rng.choice([max(low, -128), min(high, 127)], (3, k))
        mac = MacArray(acc_bits=acc_bits, overflow=overflow, products_per_add=chunk)
        assert_like_reference(a, w, mac, rng.choice([mac.lo, 0, mac.hi], (2, 3)))


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("accumulators", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 16])
def test_paths_match_python_integers_for_chunks_and_accumulators(
    path, chunk, accumulators, overflow
):
    rng = np.random.default_rng(chunk + accumulators)
    for k in (1, chunk, chunk * accumulators + 1, 37):
        a, w = rng.integers(-128, 128, (3, k)), rng.integers(-128, 128, (2, k))
        mac = MacArray(
            acc_bits=16, overflow=overflow, products_per_add=chunk, accumulators=accumulators
        )
        assert_like_reference(a, w, mac, rng.integers(mac.lo, mac.hi, (3, 2)))


# Sizes around the 4 to 12 rows and 16 to 64 columns of a tile.
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 31), (12, 64), (13, 33), (25, 65), (36, 96)], ids=str
)
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_whole_matrices_match_the_naive_kernel(path, shape, kind):
    rng = np.random.default_rng(shape[0])
    low, high = CODES[kind]
    dtype = np.uint8 if low == 0 else np.int8
    a = rng.integers(low, high + 1, (shape[0], 150)).astype(dtype)
    w = rng.integers(-128, 128, (shape[1], 150)).astype(np.int8)
    weight = pack_weight(w)
    for overflow in OVERFLOW_RULES:
        for acc_bits, chunk, accumulators in ((16, 1, 1), (18, 2, 2), (17, 6, 1), (12, 1, 3)):
            mac = MacArray(
                acc_bits=acc_bits,
                overflow=overflow,
                products_per_add=chunk,
                accumulators=accumulators,
            )
            naive = run_wide(a, w, mac, None)
            report = emulate_gemm_report(a, weight, mac)
            np.testing.assert_array_equal(report.acc, naive.acc)
            np.testing.assert_array_equal(emulate_gemm(a, weight, mac), naive.acc)
            assert report.overflow_count == naive.overflow_count
            assert report.outputs_affected == naive.outputs_affected
            assert report.first_overflow_k == naive.first_overflow_k


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_rows_give_the_same_bits_on_any_number_of_threads(path, threads):
    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (700, 130)).astype(np.int8)
    w = rng.integers(-128, 128, (200, 130)).astype(np.int8)
    for mac in (
        MacArray(),
        MacArray(acc_bits=16, overflow="saturate", products_per_add=2),
        MacArray(acc_bits=17, overflow="saturate_symmetric", products_per_add=4, accumulators=2),
    ):
        naive = run_wide(a, w, mac, None)
        np.testing.assert_array_equal(emulate_gemm(a, w, mac, threads=threads), naive.acc)
        report = emulate_gemm_report(a, w, mac, threads=threads)
        np.testing.assert_array_equal(report.acc, naive.acc)
        assert report.overflow_count == naive.overflow_count
        assert report.first_overflow_k == naive.first_overflow_k


def test_proved_tiles_leave_only_the_others_to_the_overflow_rule(path):
    rng = np.random.default_rng(1)
    a = rng.integers(-8, 8, (60, 200)).astype(np.int8)
    w = rng.integers(-8, 8, (200, 200)).astype(np.int8)
    a[41], w[70] = 127, 127  # one row and one column of tiles can overflow
    for overflow in ("saturate", "saturate_symmetric"):
        for chunk, accumulators in ((1, 1), (2, 1), (8, 1), (1, 3)):
            mac = MacArray(
                acc_bits=20,
                overflow=overflow,
                products_per_add=chunk,
                accumulators=accumulators,
            )
            report = emulate_gemm_report(a, w, mac, statistics=False)
            assert report.route == "exact+tiles"
            naive = run_wide(a, w, mac, None)
            assert naive.overflow_count > 0
            np.testing.assert_array_equal(report.acc, naive.acc)


@pytest.mark.parametrize("tree_overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
def test_trees_that_overflow_match_python_integers(path, overflow, tree_overflow):
    rng = np.random.default_rng(3)
    for acc_bits, tree_bits, chunk, accumulators in (
        *((16, 12, 1, 1), (12, 5, 2, 1), (31, 16, 5, 1), (31, 2, 3, 1)),
        *((32, 14, 8, 1), (40, 14, 4, 1), (18, 15, 4, 2), (13, 32, 7, 3)),
    ):
        mac = MacArray(
            acc_bits=acc_bits,
            overflow=overflow,
            products_per_add=chunk,
            accumulators=accumulators,
            tree_bits=tree_bits,
            tree_overflow=tree_overflow,
        )
        for low, high in (CODES["int8"], CODES["uint8"]):
            a, w = rng.choice([low, high], (7, 29)), rng.choice([-128, 127, 1], (19, 29))
            init = rng.choice([max(mac.lo, -(2**40)), 0, min(mac.hi, 2**40)], (7, 19))
            expected = assert_like_reference(a, w, mac, init)
            report = emulate_gemm_report(a, w, mac, init=init)
            assert report.tree_overflow_count == expected.tree_overflow_count
            out = emulate_gemm_srs(a, w, mac, 5, init=init)
            np.testing.assert_array_equal(out, srs(expected.acc, 5))


@pytest.mark.parametrize("threads", [1, 3])
def test_whole_matrices_under_trees_match_the_naive_kernel(path, threads):
    rng = np.random.default_rng(4)
    a = rng.integers(-128, 128, (150, 300)).astype(np.int8)
    w = rng.integers(-128, 128, (400, 300)).astype(np.int8)
    for overflow, tree_overflow in (("saturate", "wrap"), ("wrap", "saturate_symmetric")):
        mac = MacArray(
            acc_bits=19,
            overflow=overflow,
            products_per_add=6,
            tree_bits=15,
            tree_overflow=tree_overflow,
        )
        naive = run_wide(a, w, mac, None)
        report = emulate_gemm_report(a, w, mac, threads=threads)
        assert report.route == "tiles"
        np.testing.assert_array_equal(emulate_gemm(a, w, mac, threads=threads), naive.acc)
        np.testing.assert_array_equal(report.acc, naive.acc)
        for field in ("overflow_count", "tree_overflow_count", "outputs_affected"):
            assert getattr(report, field) == getattr(naive, field) > 0, field
        assert report.first_overflow_k == naive.first_overflow_k


@st.composite
def cases(draw):
    mac = MacArray(
        acc_bits=draw(st.sampled_from(EDGES)),
        overflow=draw(st.sampled_from(OVERFLOW_RULES)),
        products_per_add=draw(st.integers(1, 20)),
        accumulators=draw(st.integers(1, 4)),
    )
    m, n, k = draw(st.integers(1, 15)), draw(st.integers(1, 40)), draw(st.integers(1, 30))
    low, high = draw(st.sampled_from(sorted(CODES.values())))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    edge = draw(st.booleans())
    a = rng.choice([low, high], (m, k)) if edge else rng.integers(low, high + 1, (m, k))
    return a, rng.integers(-128, 128, (n, k)), mac


@pytest.mark.parametrize("forced", HERE)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(case=cases())
def test_any_case_matches_python_integers_on_any_path(forced, case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PATH_VARIABLE, forced)
        assert_like_reference(*case)


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv(PATH_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="LORAQ_SIM_KERNELS must be one of avx512, avx2, portable"):
        emulate_gemm([[1]], [[1]], MacArray())


@pytest.mark.parametrize("name", PATHS)
def test_every_path_offers_the_kernels_that_any_array_needs(name):
    needed = {"exact", "clamp_single", "clamp_words", "clamp_halves"}
    needed |= {"nested", "nested_report"}
    needed |= {"measure_single", "measure_words", "count_clamp_single", "count_wrap_words"}
    assert needed <= set(tile_kernels(name))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_a_thread_count_that_is_none_is_refused(threads):
    with pytest.raises(ValueError, match="threads must be an integer of 1 or more, got"):
        emulate_gemm([[1]], [[1]], MacArray(), threads=threads)
