"""Two-level accumulation against the Python-integer reference, and against what it equals."""

import itertools
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loraq_sim.emulator.two_level as two_level
import loraq_sim.kernels.run_blocks as kernels
from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import OVERFLOW_RULES, MacArray, TwoLevelArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.reference import ReferenceTwoLevel, reference_two_level
from loraq_sim.emulator.requantize import srs
from loraq_sim.emulator.tile_job import checked_job
from loraq_sim.emulator.two_level import TwoLevelReport, emulate_two_level, emulate_two_level_report
from loraq_sim.errors import InputError
from loraq_sim.kernels.processor import PATH_VARIABLE, PATHS, choose_path

NARROW = MacArray(acc_bits=14, overflow="saturate", products_per_add=2)


def extreme_codes(shape, seed, low=-128, high=127):
    """Rows of extremes, alternating signs, ramps and random codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(low, high + 1, shape)
    extreme = rng.choice([low, high], shape)
    codes = np.where(rng.random(shape) < 0.6, extreme, codes)
    codes[0] = low
    codes[1 % shape[0]] = np.where(np.arange(shape[1]) % 2, low, high)
    return codes


def assert_matches_reference(a, w, array, init=None, **options):
    expected = reference_two_level(a, w, array, init)
    report = emulate_two_level_report(a, w, array, init=init, **options)
    for field in fields(ReferenceTwoLevel):
        np.testing.assert_array_equal(
            getattr(report, field.name), getattr(expected, field.name), err_msg=field.name
        )
    np.testing.assert_array_equal(emulate_two_level(a, w, array, init=init), expected.acc)
    return report


COLUMNS = {
    "wrap": MacArray(acc_bits=15),
    "wrap_tree": MacArray(acc_bits=16, products_per_add=3, tree_bits=13),
    "saturate": MacArray(acc_bits=14, overflow="saturate"),
    "saturate_c2_p2": MacArray(
        acc_bits=15, overflow="saturate", products_per_add=2, accumulators=2
    ),
    "symmetric_tree": MacArray(
        acc_bits=16,
        overflow="saturate_symmetric",
        products_per_add=4,
        tree_bits=14,
        tree_overflow="wrap",
    ),
    "never": MacArray(acc_bits=32),
}


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_and_rule_matches_the_reference(column, overflow):
    for column_k, acc_bits, k in itertools.product((1, 4, 7, 80), (8, 16, 20, 32), (1, 6, 29)):
        array = TwoLevelArray(
            column=COLUMNS[column], column_k=column_k, acc_bits=acc_bits, overflow=overflow
        )
        assert_matches_reference(extreme_codes((5, k), k), extreme_codes((4, k), acc_bits), array)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_any_array_matches_the_reference(data):
    column = MacArray(
        acc_bits=data.draw(st.integers(8, 24)),
        overflow=data.draw(st.sampled_from(OVERFLOW_RULES)),
        products_per_add=data.draw(st.integers(1, 6)),
        accumulators=data.draw(st.integers(1, 3)),
        tree_bits=data.draw(st.none() | st.integers(8, 18)),
    )
    array = TwoLevelArray(
        column=column,
        column_k=data.draw(st.integers(1, 12)),
        acc_bits=data.draw(st.integers(8, 24)),
        overflow=data.draw(st.sampled_from(OVERFLOW_RULES)),
    )
    m, n, k = (data.draw(st.integers(1, high)) for high in (3, 3, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    unsigned = data.draw(st.booleans())
    a = extreme_codes((m, k), rng, *((0, 255) if unsigned else (-128, 127)))
    init = rng.integers(array.lo, array.hi, (m, n), endpoint=True)
    assert_matches_reference(a, extreme_codes((n, k), rng), array, init)


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
def test_wide_accumulators_of_64_bits_overflow_by_their_rule(overflow):
    array = TwoLevelArray(column=NARROW, column_k=4, acc_bits=64, overflow=overflow)
    a, w = extreme_codes((4, 17), 1), extreme_codes((3, 17), 2)
    init = np.resize([array.hi, array.lo, array.hi - 3, array.lo + 1, 0], (4, 3))
    report = assert_matches_reference(a, w, array, init)
    assert report.overflow_count > 0
    assert report.safe_acc_bits == 65


def test_gemmini_columns_never_overflow_and_a_narrower_column_does():
    a = np.full((1, 64), -128)
    gemmini = TwoLevelArray(column=MacArray(acc_bits=20), column_k=16)
    report = assert_matches_reference(a, a, gemmini)
    assert report.column_overflow_count == 0
    assert report.guaranteed_column_bits == 20  # 16 * 2**14 = 2**18 is out of 19 bits
    assert report.guaranteed_acc_bits == report.safe_acc_bits == 22
    narrow = TwoLevelArray(column=MacArray(acc_bits=18), column_k=16)
    report = assert_matches_reference(a, a, narrow)
    # Every tile sums to 2**18, which is 0 in 18 bits.
    assert report.column_overflow_count > 0
    np.testing.assert_array_equal(report.acc, 0)


def test_a_wrapping_column_equals_one_level_with_a_wrapping_tree(monkeypatch):
    a, w = extreme_codes((6, 50), 3), extreme_codes((5, 50), 4)
    for overflow in OVERFLOW_RULES:
        array = TwoLevelArray(
            column=MacArray(acc_bits=17, products_per_add=2, accumulators=3),
            column_k=16,
            acc_bits=18,
            overflow=overflow,
        )
        quick = emulate_two_level(a, w, array)
        tree = MacArray(
            acc_bits=18, overflow=overflow, products_per_add=16, tree_bits=17, tree_overflow="wrap"
        )
        np.testing.assert_array_equal(quick, emulate_gemm(a, w, tree))
        with monkeypatch.context() as patch:
            patch.setattr(two_level, "_same_in_one_level", lambda *_: None)
            np.testing.assert_array_equal(emulate_two_level(a, w, array), quick)
            patch.setattr(two_level, "nested_fits", lambda *_, **__: False)
            np.testing.assert_array_equal(emulate_two_level(a, w, array), quick)


@pytest.mark.parametrize("column", ["saturate_c2_p2", "symmetric_tree"])
def test_columns_proved_not_to_overflow_run_in_one_level(monkeypatch, column):
    array = TwoLevelArray(column=COLUMNS[column], column_k=8, acc_bits=10, overflow="saturate")
    a = extreme_codes((6, 50), 12)
    for w, is_proved in (
        (extreme_codes((5, 50), 11, -7, 7), True),
        (extreme_codes((5, 50), 11), False),
    ):
        job = checked_job(a, w, array, None, 1)
        assert (two_level._same_in_one_level(job) is not None) == is_proved
        quick = emulate_two_level(a, w, array)
        np.testing.assert_array_equal(quick, reference_two_level(a, w, array).acc)
        with monkeypatch.context() as patch:
            patch.setattr(two_level, "_same_in_one_level", lambda *_: None)
            np.testing.assert_array_equal(emulate_two_level(a, w, array), quick)
            patch.setattr(two_level, "nested_fits", lambda *_, **__: False)
            np.testing.assert_array_equal(emulate_two_level(a, w, array), quick)


@pytest.mark.parametrize("path", PATHS[PATHS.index(choose_path()) :])
@pytest.mark.parametrize("threads", [1, 3])
def test_both_levels_in_registers_match_tile_by_tile_on_every_path(monkeypatch, path, threads):
    monkeypatch.setenv(PATH_VARIABLE, path)
    weight = pack_weight(extreme_codes((140, 77), 13))
    for overflow, column, column_k in itertools.product(
        OVERFLOW_RULES,
        (NARROW, COLUMNS["wrap"], COLUMNS["saturate"], MacArray(acc_bits=13, products_per_add=3)),
        (1, 5, 16, 4096),
    ):
        array = TwoLevelArray(column=column, column_k=column_k, acc_bits=16, overflow=overflow)
        a = extreme_codes((45, 77), 14)
        init = np.linspace(array.lo, array.hi, 140).astype(np.int64)
        reports = [emulate_two_level_report(a, weight, array, init=init, threads=threads)]
        acc = emulate_two_level(a, weight, array, init=init, threads=threads)
        with monkeypatch.context() as patch:
            patch.setattr(two_level, "nested_fits", lambda *_, **__: False)
            reports.append(emulate_two_level_report(a, weight, array, init=init))
        np.testing.assert_array_equal(acc, reports[1].acc)
        for field in fields(reports[0]):
            both = [getattr(report, field.name) for report in reports]
            np.testing.assert_array_equal(*both, err_msg=f"{array} {field.name}")


def test_the_one_level_functions_take_a_two_level_array():
    a, w = extreme_codes((5, 40), 15), extreme_codes((6, 40), 16)
    array = TwoLevelArray(column=NARROW, column_k=8, acc_bits=16, overflow="saturate")
    expected = reference_two_level(a, w, array, np.full((5, 6), 9)).acc
    np.testing.assert_array_equal(emulate_gemm(a, w, array, init=9), expected)
    report = emulate_gemm_report(a, pack_weight(w), array, init=9)
    assert isinstance(report, TwoLevelReport)
    np.testing.assert_array_equal(report.acc, expected)
    out = emulate_gemm_srs(a, w, array, 4, init=9, rounding="floor")
    np.testing.assert_array_equal(out, srs(expected, 4, rounding="floor"))


def test_what_is_no_two_level_array_is_sent_where_it_belongs():
    with pytest.raises(InputError, match="array must be a TwoLevelArray, .* runs in emulate_gemm"):
        emulate_two_level([[1]], [[1]], NARROW)


def test_a_column_as_long_as_k_leaves_one_add():
    a, w = extreme_codes((4, 30), 5), extreme_codes((4, 30), 6)
    array = TwoLevelArray(column=NARROW, column_k=30)
    np.testing.assert_array_equal(emulate_two_level(a, w, array), emulate_gemm(a, w, NARROW))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_the_guaranteed_width_holds_for_any_activations(column, unsigned):
    w = extreme_codes((3, 24), 7)
    array = TwoLevelArray(column=COLUMNS[column], column_k=6)
    low, high = (0, 15) if unsigned else (-8, 7)
    dtype = np.uint8 if unsigned else np.int8
    worst = 0
    for seed in range(60):
        a = extreme_codes((4, 24), seed, low, high).astype(dtype)
        # Aim at both ends of each column too.
        a[2] = np.where(w[seed % 3] > 0, high, low)
        a[3] = np.where(w[seed % 3] > 0, low, high)
        report = emulate_two_level_report(a, w, array, a_bits=4)
        assert report.safe_acc_bits <= report.guaranteed_acc_bits
        assert report.safe_column_bits <= report.guaranteed_column_bits
        worst = max(worst, report.safe_acc_bits)
    if column == "never":
        assert worst == report.guaranteed_acc_bits  # the bound is tight


def test_sizes_of_zero_give_the_initial_values():
    array = TwoLevelArray(column=NARROW)
    init = np.array([[5, -6]])
    report = assert_matches_reference(np.zeros((1, 0), int), np.zeros((2, 0), int), array, init)
    np.testing.assert_array_equal(report.acc, init)
    assert emulate_two_level(np.zeros((0, 9), int), np.zeros((2, 9), int), array).shape == (0, 2)
    assert emulate_two_level_report(
        np.zeros((0, 9), int), np.zeros((2, 9), int), array
    ).acc.shape == (0, 2)


@pytest.mark.parametrize(("acc_bits", "dtype"), [(32, np.int32), (33, np.int64)])
def test_the_result_dtype_follows_the_wide_accumulator(acc_bits, dtype):
    array = TwoLevelArray(column=NARROW, acc_bits=acc_bits)
    codes = np.ones((2, 40), np.int8)
    assert emulate_two_level(codes, codes, array).dtype == dtype
    assert emulate_two_level_report(codes, codes, array).acc.dtype == dtype


@pytest.mark.parametrize("overflow", OVERFLOW_RULES)
@pytest.mark.parametrize("acc_bits", [8, 64])
def test_compiled_and_plain_agree(monkeypatch, overflow, acc_bits):
    array = TwoLevelArray(column=NARROW, column_k=4, acc_bits=acc_bits, overflow=overflow)
    a, w = extreme_codes((4, 17), 8), extreme_codes((3, 17), 9)
    init = np.resize([array.hi, array.lo], (4, 3))
    registers = emulate_two_level_report(a, w, array, init=init)
    monkeypatch.setattr(two_level, "nested_fits", lambda *_, **__: False)
    compiled = emulate_two_level_report(a, w, array, init=init)
    for field in fields(compiled):
        np.testing.assert_array_equal(getattr(registers, field.name), getattr(compiled, field.name))
    monkeypatch.setattr(kernels, "add_partials", kernels.add_partials.py_func)
    # NumPy scalars warn of the int64 wrap that the kernel means.
    with np.errstate(over="ignore"):
        plain = emulate_two_level_report(a, w, array, init=init)
    for field in fields(plain):
        np.testing.assert_array_equal(getattr(plain, field.name), getattr(compiled, field.name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column_k": 0}, "column_k must be an integer from 1 to 4096, got 0"),
        ({"acc_bits": 70}, "acc_bits must be an integer from 8 to 64, got 70"),
        ({"overflow": "wrp"}, "unknown overflow 'wrp'; did you mean 'wrap'"),
        ({"column": "aie2"}, "column must be a MacArray, got 'aie2'"),
    ],
)
def test_a_field_outside_its_range_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TwoLevelArray(**({"column": NARROW} | changes))


def test_the_text_form_names_both_levels():
    text = str(TwoLevelArray(column=MacArray(acc_bits=20)))
    assert text == "acc32 wrap over columns of 16: acc20 wrap c1"


@pytest.mark.parametrize(
    ("a", "w", "init", "message"),
    [
        (np.zeros(3, int), np.zeros((1, 3), int), None, r"a must be a matrix .* shape \(3,\)"),
        (np.zeros((1, 3), int), np.zeros((1, 4), int), None, "got K=3 and K=4"),
        (np.zeros((1, 3)), np.zeros((1, 3), int), None, "a must hold integer codes"),
        (np.array([[-1, 200]]), np.zeros((1, 2), int), None, "a holds codes from -1 to 200"),
        (np.array([[1, 300]]), np.zeros((1, 2), int), None, "a holds codes from 1 to 300"),
        (np.zeros((1, 2), int), np.array([[1, 200]]), None, "w holds codes from 1 to 200"),
        (np.zeros((1, 2), int), np.zeros((1, 2), int), 2**40, "outside the 32-bit accumulator"),
        (np.zeros((1, 2), int), np.zeros((1, 2), int), 0.5, "init must hold integers"),
    ],
)
@pytest.mark.parametrize("call", [emulate_two_level, emulate_two_level_report])
def test_bad_operands_are_refused(call, a, w, init, message):
    with pytest.raises(InputError, match=message):
        call(a, w, TwoLevelArray(column=NARROW), init=init)


def test_a_code_outside_its_width_is_refused():
    with pytest.raises(InputError, match="outside a_bits=4"):
        emulate_two_level_report([[9]], [[1]], TwoLevelArray(column=NARROW), a_bits=4)


def test_the_guaranteed_width_knows_that_a_column_that_wraps_may_turn_its_sign():
    # 129 columns of one product each: 128 * 127 is -128 in 8 bits, so that the sum is -16512, where
    # 127 at most a column would need a bit less.
    array = TwoLevelArray(
        acc_bits=32, column_k=1, column=MacArray(acc_bits=8, overflow="wrap", products_per_add=1)
    )
    a, w = np.full((1, 129), 128, np.uint8), np.full((1, 129), 127, np.int8)
    report = emulate_two_level_report(a, w, array)
    assert report.acc.tolist() == [[-128 * 129]]
    assert (report.safe_acc_bits, report.guaranteed_acc_bits) == (16, 16)
