"""The emulated GEMM against Python integers: an adversarial grid, hypothesis, and every route."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import OVERFLOW_RULES, MacArray
from loraq_sim.emulator.reference import reference_gemm, reference_report
from loraq_sim.errors import InputError

ACC_BITS = (8, 9, 12, 15, 16, 17, 20, 24, 29, 30, 31, 32, 33, 48, 62, 63, 64)


def operands(pattern, m, n, k, rng):
    """Return (a, w) codes of one adversarial pattern, (m, k) and (n, k) int64."""
    if pattern == "all lowest":
        return np.full((m, k), -128), np.full((n, k), -128)
    if pattern == "opposite extremes":
        return np.full((m, k), 127), np.full((n, k), -128)
    if pattern == "alternating":
        signs = np.where(np.arange(k) % 2 == 0, 127, -128)
        return np.tile(signs, (m, 1)), np.full((n, k), 127)
    if pattern == "ramps":
        ramp = np.arange(k) % 256 - 128
        return np.tile(ramp, (m, 1)), np.tile(ramp[::-1], (n, 1))
    if pattern == "halves":
        half = np.where(np.arange(k) < k // 2, 127, -127)
        return np.tile(half, (m, 1)), np.full((n, k), 126)
    if pattern == "unsigned":
        return rng.integers(0, 256, (m, k)), rng.integers(-128, 128, (n, k))
    return rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (n, k))


PATTERNS = (
    "all lowest",
    "opposite extremes",
    "alternating",
    "ramps",
    "halves",
    "unsigned",
    "random",
)


def assert_matches_reference(a, w, mac, init=None):
    expected = reference_gemm(a, w, mac, init)
    np.testing.assert_array_equal(emulate_gemm(a, w, mac, init=init), expected)
    np.testing.assert_array_equal(emulate_gemm_report(a, w, mac, init=init).acc, expected)


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("acc_bits", ACC_BITS)
def test_every_width_and_pattern_matches_python_integers(acc_bits, pattern, overflow):
    rng = np.random.default_rng(acc_bits)
    for k, chunk in ((1, 1), (33, 1), (3, 8), (29, 3), (24, 4)):
        a, w = operands(pattern, 2, 3, k, rng)
        mac = MacArray(acc_bits=acc_bits, overflow=overflow, products_per_add=chunk)
        assert_matches_reference(a, w, mac)


@pytest.mark.parametrize("accumulators", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 8, 16, 33, 64])
def test_chunks_and_accumulators_match_python_integers(chunk, accumulators):
    rng = np.random.default_rng(chunk * 10 + accumulators)
    for k in (1, chunk, chunk + 1, 4 * chunk * accumulators + 3):
        for overflow in OVERFLOW_RULES:
            a, w = operands("random", 2, 5, k, rng)
            mac = MacArray(
                acc_bits=16, overflow=overflow, products_per_add=chunk, accumulators=accumulators
            )
            init = rng.integers(mac.lo, mac.hi + 1, (2, 5))
            assert_matches_reference(a, w, mac, init)


@pytest.mark.parametrize("tree_overflow", [None, *OVERFLOW_RULES])
@pytest.mark.parametrize("tree_bits", [2, 8, 14, 15, 16, 17, 31, 32, 33, 64])
def test_a_tree_of_every_width_matches_python_integers(tree_bits, tree_overflow):
    rng = np.random.default_rng(tree_bits)
    for acc_bits in (8, 20, 30, 31, 32, 40):
        mac = MacArray(
            acc_bits=acc_bits,
            overflow="saturate",
            products_per_add=4,
            tree_bits=tree_bits,
            tree_overflow=tree_overflow,
        )
        for pattern in ("all lowest", "random"):
            assert_matches_reference(*operands(pattern, 2, 3, 30, rng), mac)


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("acc_bits", ACC_BITS)
def test_init_at_the_limits_matches_python_integers(acc_bits, overflow):
    mac = MacArray(acc_bits=acc_bits, overflow=overflow, accumulators=2)
    a = np.array([[1, 0, -1, 1], [-1, -1, 1, -1]])
    w = np.array([[1, 1, 1, 1], [-128, 127, -1, 0]])
    for start in (mac.lo, mac.lo + 1, mac.hi - 1, mac.hi, 0):
        assert_matches_reference(a, w, mac, np.full((2, 2), start))


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
def test_a_sum_exactly_at_the_limit_does_not_overflow(overflow):
    mac = MacArray(acc_bits=8, overflow=overflow)
    report = emulate_gemm_report([[127, 0]], [[1, 1]], mac)
    assert (report.acc[0, 0], report.overflow_count) == (127, 0)
    report = emulate_gemm_report([[mac.lo, 0]], [[1, 1]], mac)
    assert (report.acc[0, 0], report.overflow_count) == (mac.lo, 0)
    report = emulate_gemm_report([[127, 1]], [[1, 1]], mac)
    assert (report.acc[0, 0], report.overflow_count) == (-128 if overflow == "wrap" else 127, 1)


@st.composite
def gemm_cases(draw):
    acc_bits = draw(st.sampled_from(ACC_BITS) | st.integers(8, 64))
    tree_bits = draw(st.none() | st.integers(2, 64))
    mac = MacArray(
        acc_bits=acc_bits,
        overflow=draw(st.sampled_from(OVERFLOW_RULES)),
        products_per_add=draw(st.integers(1, 64)),
        accumulators=draw(st.integers(1, 9)),
        tree_bits=tree_bits,
        tree_overflow=None if tree_bits is None else draw(st.sampled_from(OVERFLOW_RULES)),
    )
    m, n, k = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(0, 40))
    low, high = draw(st.sampled_from([(-128, 127), (0, 255), (-8, 7), (-32, 31)]))
    codes = st.sampled_from((low, high)) | st.integers(low, high)
    a = draw(st.lists(codes, min_size=m * k, max_size=m * k))
    w = draw(st.lists(st.integers(-128, 127), min_size=n * k, max_size=n * k))
    edges = st.sampled_from((mac.lo, mac.hi, 0)) | st.integers(mac.lo, mac.hi)
    init = draw(st.none() | st.lists(edges, min_size=n, max_size=n))
    return (
        np.array(a, np.int64).reshape(m, k),
        np.array(w, np.int64).reshape(n, k),
        mac,
        None if init is None else np.array(init, np.int64),
    )


@settings(deadline=None, derandomize=True, max_examples=300)
@given(gemm_cases())
def test_anything_an_architect_may_draw_matches_python_integers(case):
    a, w, mac, init = case
    expected = reference_report(a, w, mac, init)
    report = emulate_gemm_report(a, w, mac, init=init)
    np.testing.assert_array_equal(emulate_gemm(a, w, mac, init=init), expected.acc)
    np.testing.assert_array_equal(report.acc, expected.acc)
    assert report.overflow_count == expected.overflow_count
    assert report.tree_overflow_count == expected.tree_overflow_count
    assert report.outputs_affected == expected.outputs_affected
    assert report.first_overflow_k == expected.first_overflow_k
    if expected.acc.size:
        assert report.safe_acc_bits == expected.safe_acc_bits


@pytest.mark.parametrize(
    ("acc_bits", "dtype"), [(8, np.int32), (32, np.int32), (33, np.int64), (64, np.int64)]
)
def test_the_result_dtype_follows_the_accumulator(acc_bits, dtype):
    acc = emulate_gemm([[1, 2]], [[3, 4]], MacArray(acc_bits=acc_bits))
    assert acc.dtype == dtype
    np.testing.assert_array_equal(acc, [[11]])


def test_operands_are_not_modified_and_may_be_strided():
    rng = np.random.default_rng(5)
    a = rng.integers(-128, 128, (40, 6)).astype(np.int8).T
    w = rng.integers(-128, 128, (7, 80)).astype(np.int8)[:, ::2]
    a_before, w_before = a.copy(), w.copy()
    mac = MacArray(acc_bits=16, overflow="saturate", products_per_add=2)
    assert_matches_reference(a, w, mac)
    np.testing.assert_array_equal(a, a_before)
    np.testing.assert_array_equal(w, w_before)


def test_no_products_give_init_or_zeros():
    a, w = np.zeros((2, 0), np.int8), np.zeros((3, 0), np.int8)
    np.testing.assert_array_equal(emulate_gemm(a, w, MacArray()), np.zeros((2, 3)))
    init = np.array([4, 5, 6])
    np.testing.assert_array_equal(emulate_gemm(a, w, MacArray(), init=init), [init, init])


def test_the_exact_route_is_exact_where_float32_alone_is_not():
    # 2048 products of 128 * 128 pass 2**24, and the odd product would be lost in one float32 sum.
    a, w = np.full((1, 2049), -128), np.full((1, 2049), -128)
    a[0, -1] = w[0, -1] = 1
    report = emulate_gemm_report(a, w, MacArray(acc_bits=32), statistics=False)
    assert report.route == "exact"
    assert report.acc[0, 0] == 2048 * 2**14 + 1


@pytest.mark.parametrize(
    ("mac", "expected"),
    [
        (MacArray(acc_bits=40), 2**31 + 5 * 2**14),
        (MacArray(acc_bits=32), 5 * 2**14 - 2**31),
        (MacArray(acc_bits=32, overflow="saturate"), 2**31 - 1),
    ],
    ids=str,
)
def test_sums_beyond_int32_are_exact(mac, expected):
    codes = np.full((1, 2**17 + 5), -128, np.int8)  # products of 2**14
    assert int(emulate_gemm(codes, codes, mac)[0, 0]) == expected
    assert int(emulate_gemm_report(codes, codes, mac).acc[0, 0]) == expected


@pytest.mark.parametrize("mac", ["aie2", None, 20, {"acc_bits": 20}])
@pytest.mark.parametrize(
    "call", [emulate_gemm, emulate_gemm_report, lambda a, w, mac: emulate_gemm_srs(a, w, mac, 2)]
)
def test_what_is_no_array_is_refused(call, mac):
    with pytest.raises(InputError, match="mac must be a MacArray or a TwoLevelArray, got"):
        call([[1]], [[1]], mac)
