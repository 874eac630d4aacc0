"""A weight packed once gives the bits of one packed each time, and refuses what is no weight."""

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import Order, pack_weight
from loraq_sim.errors import InputError

MACS = [
    MacArray(),
    MacArray(acc_bits=16, overflow="saturate"),
    MacArray(acc_bits=30, overflow="saturate", products_per_add=2),
    MacArray(acc_bits=18, overflow="saturate_symmetric", products_per_add=5, accumulators=3),
    MacArray(acc_bits=64, overflow="saturate", tree_bits=12, products_per_add=4),
]


def codes(shape, seed):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("mac", MACS, ids=str)
def test_a_packed_weight_gives_the_same_report(mac):
    a, w = codes((7, 61), 0), codes((35, 61), 1)
    packed = pack_weight(w)
    for _ in range(2):
        first, second = emulate_gemm_report(a, w, mac), emulate_gemm_report(a, packed, mac)
        np.testing.assert_array_equal(first.acc, second.acc)
        assert first.safe_acc_bits == second.safe_acc_bits
        assert first.guaranteed_acc_bits == second.guaranteed_acc_bits


def test_layouts_are_packed_once_and_shared_between_widths():
    a, packed = codes((7, 61), 2), pack_weight(codes((35, 61), 3))
    for acc_bits in (8, 16, 24, 32):
        emulate_gemm(a, packed, MacArray(acc_bits=acc_bits))
    assert "layouts=1" in repr(packed)


def test_a_packed_weight_keeps_its_own_copy():
    w = codes((3, 8), 4)
    packed, before = pack_weight(w), w.copy()
    w[:] = 0
    np.testing.assert_array_equal(packed.codes, before)
    assert packed.shape == (3, 8)


def test_a_weight_that_is_no_code_matrix_is_refused():
    with pytest.raises(InputError, match=r"w must be a matrix .* its rows differ in length"):
        pack_weight([[1, 2], [3]])
    with pytest.raises(InputError, match=r"w must be a matrix \(rows, K\), got shape \(3,\)"):
        pack_weight([1, 2, 3])
    with pytest.raises(InputError, match=r"w holds codes from 0 to 128; .* -128..127"):
        pack_weight([[0, 128]])


def test_a_packed_weight_of_another_k_is_refused():
    with pytest.raises(InputError, match="same K, got K=9 and K=8"):
        emulate_gemm(codes((2, 9), 5), pack_weight(codes((3, 8), 6)), MacArray())


@pytest.mark.parametrize("kind", ["bytes", "words", "halves"])
@pytest.mark.parametrize("accumulators", [1, 2, 3])
@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 4, 6])
def test_an_order_deals_whole_chunks_to_accumulators_in_turn(kind, chunk, accumulators):
    accumulators = accumulators if chunk else 1
    order = Order(kind, chunk, accumulators)
    for k in (1, 4, 11, 24):
        row = np.arange(1, k + 1, dtype=np.int8)[None, :]
        laid, ends = order.apply(row)[0], order.ends(k)
        assert len(laid) == ends[-1]
        assert np.all(ends % order.group == 0)
        for p, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            own = [x for x in row[0] if chunk == 0 or (x - 1) // chunk % accumulators == p]
            np.testing.assert_array_equal([x for x in laid[start:end] if x], own)
