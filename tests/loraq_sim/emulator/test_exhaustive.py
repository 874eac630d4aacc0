"""Every input of tiny arrays, against Python integers that share nothing with the emulator."""

import itertools

import numpy as np
import pytest

from loraq_sim.emulator.bounds import Bounds
from loraq_sim.emulator.gemm import emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray

RULES = ("wrap", "saturate", "saturate_symmetric")
CODES = (-128, -1, 0, 99, 127)


def held(value, bits, rule):
    """`value` in a register of `bits` under an overflow rule."""
    if rule == "wrap":
        return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    top = 2 ** (bits - 1) - 1
    return max(-top if rule == "saturate_symmetric" else -top - 1, min(top, value))


def width(value):
    return next(b for b in range(1, 99) if -(2 ** (b - 1)) <= value < 2 ** (b - 1))


def one_output(row, column, mac, init=0):
    """(overflows, tree overflows, widest exact prefix, accumulator) of one output."""
    registers, exact = [init] + [0] * (mac.accumulators - 1), [init] + [0] * (mac.accumulators - 1)
    overflows = trees = 0
    widest = width(init)

    def add(p, amount, exact_amount):
        nonlocal overflows, widest
        kept = held(registers[p] + amount, mac.acc_bits, mac.overflow)
        overflows += kept != registers[p] + amount
        registers[p] = kept
        exact[p] += exact_amount
        widest = max(widest, width(exact[p]))

    for i, start in enumerate(range(0, len(row), mac.products_per_add)):
        stop = start + mac.products_per_add
        chunk = sum(x * y for x, y in zip(row[start:stop], column[start:stop], strict=True))
        if mac.tree_bits is not None:
            kept = held(chunk, mac.tree_bits, mac.tree_rule)
            trees += kept != chunk
            chunk = kept
        add(i % mac.accumulators, chunk, chunk)
    for p in range(1, mac.accumulators):
        add(0, registers[p], exact[p])
    return overflows, trees, widest, registers[0]


ARRAYS = [
    MacArray(acc_bits=8, overflow=overflow, products_per_add=c, accumulators=p, **tree)
    for overflow in RULES
    for c, p in ((1, 1), (2, 1), (1, 2), (2, 2))
    for tree in ({}, *({"tree_bits": 8, "tree_overflow": rule} for rule in RULES))
]


@pytest.mark.parametrize("mac", ARRAYS, ids=str)
@pytest.mark.parametrize("init", [None, -128, 127])
def test_every_count_is_what_integers_say_or_unknown(mac, init):
    if init == -128 and mac.lo > init:
        init = -127
    rows = np.array(list(itertools.product(CODES, repeat=3)), np.int8)
    for column in ([1, 1, 1], [1, -1, 2], [0, -2, 1]):
        expected = [one_output(row, column, mac, init or 0) for row in rows.tolist()]
        overflows, trees, widths, values = zip(*expected, strict=True)
        affected = sum(o + t > 0 for o, t in zip(overflows, trees, strict=True))
        start = None if init is None else np.array(init)
        told = emulate_gemm_report(rows, np.array([column]), mac, init=start)
        quick = emulate_gemm_report(rows, np.array([column]), mac, init=start, statistics=False)
        assert told.acc.reshape(-1).tolist() == quick.acc.reshape(-1).tolist() == list(values)
        counts = (sum(overflows), sum(trees), affected)
        assert (told.overflow_count, told.tree_overflow_count, told.outputs_affected) == counts
        known = (quick.overflow_count, quick.tree_overflow_count, quick.outputs_affected)
        for said, true in zip(known, counts, strict=True):
            assert said is None or said == true
        assert told.safe_acc_bits == max(widths)
        assert told.guaranteed_acc_bits >= told.safe_acc_bits


@pytest.mark.parametrize("mac", ARRAYS, ids=str)
@pytest.mark.parametrize("init", [0, -7, 100])
def test_the_guaranteed_width_holds_all_activations_and_no_more_than_needed(mac, init):
    codes = range(-8, 8)  # all 4-bit activations
    for column in ([90, -3], [-1, 1], [127, 127]):
        widest = max(
            one_output(row, column, mac, init)[2] for row in itertools.product(codes, codes)
        )
        report = emulate_gemm_report(
            np.zeros((1, 2), np.int8), np.array([column]), mac, init=np.array(init), a_bits=4
        )
        assert report.guaranteed_acc_bits >= widest
        if mac.tree_bits is None and mac.accumulators == 1:
            # Without a tree each product takes its own extreme, and some activations reach it.
            low = init + sum(min(c * x for x in codes) for c in column)
            high = init + sum(max(c * x for x in codes) for c in column)
            assert report.guaranteed_acc_bits == max(width(low), width(high))


def test_initial_values_count_for_the_first_of_several_accumulators_only():
    a, w = np.array([[0, 255]], np.uint8), np.array([[0, -127]])
    # The second accumulator starts at zero and reaches 255 * -127 = -32385, which takes 16 bits;
    # from 16200 on it would be -16185, which takes 15.
    mac = MacArray(accumulators=2)
    report = emulate_gemm_report(a, w, mac, init=np.array([16200]))
    assert (report.safe_acc_bits, report.guaranteed_acc_bits) == (16, 16)
    one = emulate_gemm_report(a, w, MacArray(), init=np.array([16200]))
    assert (one.safe_acc_bits, one.guaranteed_acc_bits) == (15, 15)


@pytest.mark.parametrize(
    ("a", "w", "init", "fits"),
    [
        ([-128, 0], [1, 1], None, True),
        ([-128, -1], [1, 1], None, False),
        ([127, 0], [1, 1], None, True),
        ([127, 1], [1, 1], None, False),
        ([-127, 0], [1, 1], -1, True),
        ([-128, 0], [1, 1], -1, False),
        ([126, 0], [1, 1], 1, True),
        ([127, 0], [1, 1], 1, False),
    ],
)
@pytest.mark.parametrize("overflow", RULES)
@pytest.mark.parametrize("statistics", [True, False])
def test_sums_at_either_limit_of_the_accumulator(a, w, init, fits, overflow, statistics):
    mac = MacArray(acc_bits=8, overflow=overflow)
    start = None if init is None else np.array([[init]])
    report = emulate_gemm_report(
        np.array([a], np.int8), np.array([w]), mac, init=start, statistics=statistics
    )
    expected = one_output(a, w, mac, init or 0)
    assert report.acc.item() == expected[3]
    assert (expected[0] == 0) == (fits and (overflow != "saturate_symmetric" or sum(a) > -127))
    if statistics:
        assert report.overflow_count == expected[0]


@pytest.mark.parametrize("total", [126, 127, 128, 129])
@pytest.mark.parametrize("overflow", RULES)
def test_bounds_prove_what_fits_and_nothing_beyond(total, overflow):
    mac = MacArray(acc_bits=8, overflow=overflow)
    for low, high in ((0, 0), (-1, 0), (0, 1), (-2, 2)):
        bounds = Bounds(product=1, total=total, init_low=low, init_high=high)
        fits = low - total >= mac.lo and high + total <= mac.hi
        assert bounds.accumulator_fits(mac) == fits
        # One more at either end would leave the range exactly where the proof stops.
        values = [low - total, high + total]
        assert fits == all(held(v, 8, overflow) == v for v in values)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("column", [[1, 1], [1, -1], [-2, 3]])
def test_the_guaranteed_width_counts_what_a_narrow_tree_makes_of_unsigned_codes(rule, column):
    mac = MacArray(acc_bits=16, tree_bits=8, tree_overflow=rule)
    rows = list(itertools.product(range(0, 256, 5), (0, 100, 200, 255)))
    for init in (-128, 0, 127):
        report = emulate_gemm_report(
            np.array(rows, np.uint8), np.array([column]), mac, init=np.array(init)
        )
        widest = max(one_output(row, column, mac, init)[2] for row in rows)
        assert report.safe_acc_bits == widest <= report.guaranteed_acc_bits
