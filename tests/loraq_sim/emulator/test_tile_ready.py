"""A weight made ready once runs any later activations as if it met them for the first time."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from loraq_sim.emulator import accumulation
from loraq_sim.emulator.accumulation import run_wide
from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import OVERFLOW_RULES, MacArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.requantize import srs
from loraq_sim.errors import InputError
from loraq_sim.kernels.processor import PATH_VARIABLE, PATHS, choose_path

HERE = PATHS[PATHS.index(choose_path()) :]
ARRAYS = [
    MacArray(acc_bits=bits, overflow=overflow, products_per_add=chunk, accumulators=accumulators)
    for bits in (9, 16, 18, 31, 32, 40)
    for overflow in OVERFLOW_RULES
    for chunk, accumulators in ((1, 1), (2, 1), (3, 1), (8, 1), (4, 2))
]


@pytest.mark.parametrize("path", HERE)
def test_a_weight_met_before_gives_the_bits_of_the_naive_kernel(monkeypatch, path):
    monkeypatch.setenv(PATH_VARIABLE, path)
    rng = np.random.default_rng(0)
    w = rng.integers(-128, 128, (70, 50)).astype(np.int8)
    weight = pack_weight(w)
    # From one call to the next, proofs hold and fail, and the sign and the height change.
    drawn = [
        rng.integers(low, high, (rows, 50)).astype(dtype)
        for rows, low, high, dtype in (
            (30, -128, 128, np.int8),
            (1, -1, 2, np.int8),
            (25, 0, 256, np.uint8),
            (13, 0, 1, np.int8),
            (30, -128, 128, np.int8),
        )
    ]
    for mac in ARRAYS:
        for a in drawn:
            naive = run_wide(a, w, mac, None)
            np.testing.assert_array_equal(emulate_gemm(a, weight, mac), naive.acc)


def test_both_ways_to_the_same_route_agree(monkeypatch):
    rng = np.random.default_rng(1)
    a = rng.integers(-128, 128, (40, 200)).astype(np.int8)
    weight = pack_weight(rng.integers(-128, 128, (50, 200)))
    for mac in ARRAYS:
        ready = emulate_gemm(a, weight, mac)
        with monkeypatch.context() as patch:
            patch.setattr(accumulation, "run_ready", lambda job: None)
            np.testing.assert_array_equal(ready, emulate_gemm(a, weight, mac))


def test_calm_activations_still_reach_the_proofs():
    rng = np.random.default_rng(2)
    weight = pack_weight(rng.integers(-128, 128, (64, 300)))
    loud = rng.integers(-128, 128, (36, 300)).astype(np.int8)
    mac = MacArray(acc_bits=18, overflow="saturate", products_per_add=8)
    routes = [
        emulate_gemm_report(a, weight, mac, statistics=False).route
        for a in (loud, loud // 100, loud)
    ]
    assert routes == ["tiles", "exact", "tiles"]


def test_a_weight_keeps_what_it_is_ready_for_within_bounds():
    weight = pack_weight([[1, 2, 3, 4]])
    for seed in range(300):
        mac = MacArray(acc_bits=8 + seed % 25, products_per_add=1 + seed // 25)
        emulate_gemm([[1, 1, 1, 1]], weight, mac)
    assert 0 < len(weight.ready) <= 256


def test_the_widest_codes_and_read_only_operands_run():
    a = np.full((5, 7), -128, np.int8)
    a.flags.writeable = False
    mac = MacArray(acc_bits=16, overflow="saturate", products_per_add=4)
    assert (emulate_gemm(a, a, mac) == 2**15 - 1).all()


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_products_of_a_few_rows_made_ready_have_the_bits_of_the_naive_kernel(
    monkeypatch, path, dtype
):
    monkeypatch.setenv(PATH_VARIABLE, path)
    rng = np.random.default_rng(3)
    info = np.iinfo(dtype)
    for k in (30, 64):
        w = rng.integers(-128, 128, (70, k)).astype(np.int8)
        weight = pack_weight(w)
        for mac in ARRAYS[:: 7 if path == "avx512" else 23]:
            for rows in (1, 12, 17):
                # Loud, calm, and loud again: what the first call proved need not hold later.
                for divisor in (1, 1, 100, 1):
                    a = (rng.integers(info.min, info.max + 1, (rows, k)) // divisor).astype(dtype)
                    kept = emulate_gemm(a, weight, mac)
                    naive = run_wide(a, w, mac, None).acc
                    np.testing.assert_array_equal(kept, naive)
                    assert kept.dtype == (np.int32 if mac.acc_bits <= 32 else np.int64)
                    # A result is its own: the next call does not write into it.
                    emulate_gemm(a[::-1], weight, mac)
                    np.testing.assert_array_equal(kept, naive)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_products_made_ready_have_the_bits_of_the_naive_kernel_in_every_shape(dtype):
    rng = np.random.default_rng(5)
    info = np.iinfo(dtype)
    arrays = [
        MacArray(),
        MacArray(acc_bits=20),
        MacArray(acc_bits=32, overflow="saturate", products_per_add=4),
        MacArray(acc_bits=40, overflow="saturate_symmetric"),
        MacArray(acc_bits=16, overflow="saturate", products_per_add=8),
        MacArray(acc_bits=18, overflow="saturate", products_per_add=2),
    ]
    # Rows: one tile, some, some and a rest, several blocks. K: whole dwords or not, and one whose
    # rows begin in the same lines of a cache. N: whole tiles or not.
    for m, k, n in ((12, 64, 64), (50, 32, 96), (49, 50, 64), (25, 64, 70), (13, 4096, 32)):
        for mac in arrays:
            first = rng.integers(-128, 128, (n, k)).astype(np.int8)
            weight = pack_weight(first)
            for turn in range(4):
                w = first if turn < 2 else rng.integers(-128, 128, (n, k)).astype(np.int8)
                w.flags.writeable = turn != 3
                a = rng.integers(info.min, info.max + 1, (m, k)).astype(dtype)
                exact = run_wide(a, w, mac, None).acc
                turned = np.asfortranarray(a) if turn == 1 else a
                if turn < 2:
                    np.testing.assert_array_equal(emulate_gemm(turned, weight, mac), exact)
                    rounded = emulate_gemm_srs(turned, weight, mac, 7, out_bits=8)
                    np.testing.assert_array_equal(rounded, srs(exact, 7, out_bits=8))
                np.testing.assert_array_equal(emulate_gemm(turned, w, mac), exact)
                np.testing.assert_array_equal(emulate_gemm(a, np.asfortranarray(w), mac), exact)


def test_a_weight_that_came_as_an_array_is_not_held_on_to():
    a = np.ones((3, 20), np.int8)
    for _ in range(3):
        w = np.ones((7, 20), np.int8)
        known = weakref.ref(w)
        assert (emulate_gemm(a, w, MacArray()) == 20).all()
        del w
        assert known() is None


def test_a_ready_product_of_a_few_rows_still_refuses_what_is_wrong(monkeypatch):
    weight, mac = pack_weight(np.ones((5, 8), np.int8)), MacArray()
    a = np.ones((2, 8), np.int8)
    for _ in range(3):
        assert (emulate_gemm(a, weight, mac) == 8).all()
    assert weight.kept
    for given, options, message in (
        (a[:, :7], {}, r"same K, got K=7 and K=8"),
        (a.astype(np.float32), {}, "a must hold integer codes"),
        (a, {"threads": True}, "threads must be an integer of 1 or more, got True"),
        (a, {"zero_point": "later"}, "later"),
    ):
        with pytest.raises(InputError, match=message):
            emulate_gemm(given, weight, mac, **options)
    monkeypatch.setenv(PATH_VARIABLE, "nothing")
    with pytest.raises(InputError, match="must be one of"):
        emulate_gemm(a, weight, mac)


def test_threads_that_share_a_weight_each_have_room_of_their_own():
    rng = np.random.default_rng(4)
    weight = pack_weight(rng.integers(-128, 128, (64, 64)))
    mac = MacArray(acc_bits=32)
    drawn = [rng.integers(-128, 128, (3, 64)).astype(np.int8) for _ in range(400)]
    expected = [a.astype(np.int64) @ weight.codes.astype(np.int64).T for a in drawn]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda a: emulate_gemm(a, weight, mac), drawn))
        np.testing.assert_array_equal(found, expected)
        found = list(pool.map(lambda a: emulate_gemm(a, weight.codes, mac), drawn))
    np.testing.assert_array_equal(found, expected)
