"""Zero points, unsigned and 16-bit codes: the emulated GEMM against Python integers."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.emulator.gemm import emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import TwoLevelArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.reference import reference_report, reference_srs, reference_two_level
from loraq_sim.emulator.scaled_gemm import BIT_EXACT, scaled_gemm
from loraq_sim.errors import InputError
from loraq_sim.quantizers import quantize

CODES = {
    "int8": (-128, 127, np.int8),
    "uint8": (0, 255, np.uint8),
    "uint4": (0, 15, np.uint8),
    "int4": (-8, 7, np.int8),
    "int16": (-32768, 32767, np.int16),
}
ARRAYS = {
    "wide": lq.MacArray(acc_bits=32),
    "narrow wrap": lq.MacArray(acc_bits=12, products_per_add=3),
    "saturate": lq.MacArray(acc_bits=16, overflow="saturate", products_per_add=4),
    "symmetric": lq.MacArray(acc_bits=20, overflow="saturate_symmetric", accumulators=3),
    "long": lq.MacArray(acc_bits=48, overflow="saturate"),
    "tree": lq.MacArray(acc_bits=18, overflow="saturate", products_per_add=4, tree_bits=10),
    "two levels": TwoLevelArray(
        column=lq.MacArray(acc_bits=14, overflow="saturate"), column_k=5, acc_bits=16
    ),
}


def codes(rng, kind, shape):
    low, high, dtype = CODES[kind]
    ends = rng.choice([low, high], shape)
    return np.where(rng.random(shape) < 0.4, ends, rng.integers(low, high + 1, shape)).astype(dtype)


@pytest.mark.parametrize("place", ["initial", "after"])
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("kinds", [("uint4", "int4"), ("uint8", "uint8"), ("int16", "int8")])
def test_zero_points_match_python_integers(kinds, array, place):
    rng = np.random.default_rng(3)
    for k in (0, 1, 17, 40):
        a, w = codes(rng, kinds[0], (3, k)), codes(rng, kinds[1], (4, k))
        zeros = {
            "a_zero": codes(rng, kinds[0], (3,)),
            "w_zero": codes(rng, kinds[1], (4,)),
            "zero_point": place,
        }
        init = rng.integers(-100, 100, (3, 4))
        bits = 16 if kinds[0] == "int16" else 8
        found = emulate_gemm_report(a, w, array, init=init, a_bits=bits, **zeros)
        is_nested = isinstance(array, TwoLevelArray)
        reference = reference_two_level if is_nested else reference_report
        expected = reference(a, w, array, init, **zeros)
        np.testing.assert_array_equal(found.acc, expected.acc)
        np.testing.assert_array_equal(
            lq.emulate_gemm(a, w, array, init=init, **zeros), expected.acc
        )
        for name in ("overflow_count", "outputs_affected", "first_overflow_k", "safe_acc_bits"):
            assert getattr(found, name) == getattr(expected, name), (name, k)
        assert found.guaranteed_acc_bits >= found.safe_acc_bits
        narrow = emulate_gemm_srs(a, w, array, 3, init=init, **zeros)
        np.testing.assert_array_equal(narrow, reference_srs(expected.acc, 3))


def test_the_correction_overflows_as_initial_value_and_not_behind():
    a, w = np.full((1, 64), 15, np.uint8), np.full((1, 64), 7, np.int8)
    array = lq.MacArray(acc_bits=12, overflow="saturate")
    # 64 * 8 * 7 = 3584 is beyond 2047: as initial value -3584 becomes -2048, and 6720 is added.
    report = emulate_gemm_report(a, w, array, a_zero=8)
    assert (report.acc[0, 0], report.first_overflow_k) == (2047, 0)
    after = emulate_gemm_report(a, w, array, a_zero=8, zero_point="after")
    assert after.acc[0, 0] == 2047 - 3584
    assert after.acc.dtype == np.int64
    small = lq.emulate_gemm(a[:, :1], w[:, :1], array, a_zero=8)
    assert small[0, 0] == (15 - 8) * 7


def test_widths_hold_for_any_activations_of_the_zero_point():
    rng = np.random.default_rng(5)
    w, zero = codes(rng, "uint8", (5, 33)), codes(rng, "uint8", (5,))
    a = codes(rng, "uint8", (2, 33))
    known = emulate_gemm_report(a, w, lq.MacArray(), a_zero=7, w_zero=zero).guaranteed_acc_bits
    for _ in range(50):
        other = codes(rng, "uint8", (8, 33))
        seen = emulate_gemm_report(other, w, lq.MacArray(), a_zero=7, w_zero=zero)
        assert seen.safe_acc_bits <= known


def test_long_sums_of_extremes_are_exact():
    for k in (65_536, 70_000):
        a, w = np.full((1, k), 255, np.uint8), np.full((2, k), 255, np.uint8)
        w[1] = 0
        found = lq.emulate_gemm(a, w, lq.MacArray(acc_bits=48), a_zero=128, w_zero=[0, 255])
        assert found.tolist() == [[k * 127 * 255, -k * 127 * 255]]
        words = np.full((1, k), -32768, np.int16)
        found = lq.emulate_gemm(words, w, lq.MacArray(acc_bits=64), a_zero=32767, w_zero=128)
        assert found.tolist() == [[-k * 65535 * 127, k * 65535 * 128]]


@pytest.mark.parametrize("scale", ["fp16", "e8m0"])
def test_group_zero_points_are_integer_arithmetic_in_a_scaled_gemm(scale):
    rng = np.random.default_rng(1)
    x = quantize(rng.gamma(2, size=(4, 70)).astype(np.float32), f"uint4/g32/{scale}")
    w = quantize(rng.standard_normal((5, 70)).astype(np.float32), f"uint8/g32/{scale}")
    y, seen = scaled_gemm(x, w, lq.MacArray(), "fp32")
    assert seen.arithmetic == BIT_EXACT
    expected = np.zeros((4, 5), np.float32)
    for g, start in enumerate(range(0, 70, 32)):
        part = slice(start, start + 32)
        levels = [
            t.codes[:, part].astype(int) - t.zero_points[:, g : g + 1].astype(int) for t in (x, w)
        ]
        acc = (levels[0] @ levels[1].T).astype(np.float32)
        expected += acc * (x.scales[:, g : g + 1] * w.scales[:, g])
    np.testing.assert_array_equal(y, expected)


OK = np.ones((2, 3), np.uint8)


@pytest.mark.parametrize(
    ("zeros", "message"),
    [
        (
            {"a_zero": 256},
            r"a_zero holds values from 256 to 256, outside the codes of a \(0..255\)",
        ),
        ({"a_zero": -1}, r"outside the codes of a \(0..255\); a zero point is the code"),
        ({"a_zero": 1.0}, "a_zero must hold integers, got dtype float64"),
        ({"a_zero": [1, 2, 3]}, r"a_zero has shape \(3,\); give one .* shape \(2,\)"),
        ({"w_zero": np.zeros((1, 2), int)}, r"w_zero has shape \(1, 2\)"),
        ({"a_zero": 1, "zero_point": "before"}, "unknown zero_point 'before'"),
    ],
)
def test_wrong_zero_points_are_refused_in_one_line(zeros, message):
    with pytest.raises(InputError, match=message) as caught:
        lq.emulate_gemm(OK, OK, lq.MacArray(), **zeros)
    assert "\n" not in str(caught.value)


def test_a_zero_point_outside_the_stated_width_is_refused():
    with pytest.raises(InputError, match=r"a_zero holds values from 16 to 16, outside a_bits=4"):
        emulate_gemm_report(OK, OK, lq.MacArray(), a_zero=16, a_bits=4)


def test_unsigned_weights_are_meant_by_their_dtype_or_a_zero_point():
    w = np.array([[200, 3, 4]])
    with pytest.raises(InputError, match=r"w holds codes from 3 to 200; .* \(unsigned, as uint8\)"):
        lq.emulate_gemm(OK, w, lq.MacArray())
    assert lq.emulate_gemm(OK, w.astype(np.uint8), lq.MacArray())[0, 0] == 207
    assert lq.emulate_gemm(OK, w, lq.MacArray(), w_zero=100)[0, 0] == -93


def test_packed_weights_keep_the_range_of_the_codes_that_they_came_in():
    w, a = np.array([[3, 100]], np.uint8), np.array([[2, -1]], np.int8)
    # 2 * (3 - 200) - (100 - 200)
    assert lq.emulate_gemm(a, pack_weight(w), lq.MacArray(), w_zero=200) == -294
    assert lq.emulate_gemm(a, pack_weight(w.astype(np.int64)), lq.MacArray(), w_zero=200) == -294
    with pytest.raises(lq.InputError, match=r"outside the codes of w \(-128..127\)"):
        lq.emulate_gemm(a, pack_weight(w.astype(np.int8)), lq.MacArray(), w_zero=200)
