"""One step for GEMM and shift-round-saturate: the same bits and the same refusals as two."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_srs
from loraq_sim.emulator.mac_array import OVERFLOW_RULES, MacArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.requantize import srs
from loraq_sim.emulator.tile_route import srs_output
from loraq_sim.formats import Rounding, Saturation
from loraq_sim.kernels.processor import PATH_VARIABLE, PATHS, choose_path

HERE = PATHS[PATHS.index(choose_path()) :]
OUTPUTS = [(bits, signed) for bits in (2, 5, 8, 12, 16, 24, 32) for signed in (True, False)]


def assert_one_step_is_two(a, w, mac, shift, init=None, threads=1, **options):
    expected = srs(emulate_gemm(a, w, mac, init=init), shift, **options)
    out = emulate_gemm_srs(a, w, mac, shift, init=init, threads=threads, **options)
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_every_mode_and_output_gives_the_bits_of_two_steps(monkeypatch, path, rounding):
    monkeypatch.setenv(PATH_VARIABLE, path)
    rng = np.random.default_rng(3)
    a = rng.integers(-128, 128, (14, 40)).astype(np.int8)
    weight = pack_weight(rng.integers(-128, 128, (35, 40)))
    mac = MacArray(acc_bits=18, overflow="saturate", products_per_add=4)
    for saturation in Saturation:
        for out_bits, signed in OUTPUTS:
            for shift in (-4, -1, 0, 1, 7, 30, 31, 59):
                assert_one_step_is_two(
                    a, weight, mac, shift,
                    out_bits=out_bits, signed=signed, rounding=rounding, saturation=saturation,
                )  # fmt: skip


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_ties_and_the_ends_of_int32_round_as_in_two_steps(monkeypatch, path, rounding):
    monkeypatch.setenv(PATH_VARIABLE, path)
    ends = [-(2**31), -(2**31) + 1, 2**31 - 1, 2**31 - 2, -(2**30), 2**30, 0, -1, 1]
    ties = [(2 * odd + 1) << 9 for odd in range(-4, 4)]
    init = np.array([*ends, *ties, *(tie - 1 for tie in ties), *(tie + 1 for tie in ties)])
    a, w = np.zeros((2, 4), np.int8), np.zeros((init.size, 4), np.int8)
    for shift in (0, 1, 10, 29, 30):
        for out_bits in (8, 16, 32):
            for saturation in Saturation:
                assert_one_step_is_two(
                    a, w, MacArray(), shift, init,
                    out_bits=out_bits, rounding=rounding, saturation=saturation,
                )  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    overflow=st.sampled_from(OVERFLOW_RULES),
    acc_bits=st.sampled_from([8, 12, 16, 20, 31, 32, 33, 64]),
    chunk=st.integers(1, 9),
    accumulators=st.integers(1, 3),
    tree_bits=st.sampled_from([None, 14]),
    shift=st.integers(0, 12),
    threads=st.integers(1, 3),
    output=st.sampled_from(OUTPUTS),
)
def test_any_array_gives_the_bits_of_two_steps(
    seed, overflow, acc_bits, chunk, accumulators, tree_bits, shift, threads, output
):
    rng = np.random.default_rng(seed)
    m, n, k = rng.integers(0, 40, 3)
    mac = MacArray(
        acc_bits=acc_bits,
        overflow=overflow,
        products_per_add=chunk,
        accumulators=accumulators,
        tree_bits=tree_bits,
    )
    low = int(rng.choice([-128, 0]))
    a, w = rng.integers(low, low + 256, (m, k)), rng.integers(-128, 128, (n, k))
    init = rng.integers(-100, 100, (m, n))
    out_bits, signed = output
    assert_one_step_is_two(a, w, mac, shift, init, threads, out_bits=out_bits, signed=signed)


def test_proved_and_ruled_tiles_round_alike():
    rng = np.random.default_rng(1)
    a = rng.integers(-8, 8, (60, 200)).astype(np.int8)
    w = rng.integers(-8, 8, (200, 200)).astype(np.int8)
    a[41], w[70] = 127, 127
    mac = MacArray(acc_bits=20, overflow="saturate")
    assert_one_step_is_two(a, w, mac, 6)


def test_tiles_round_by_themselves_where_32_bits_hold_it():
    options = {"out_bits": 8, "signed": True, "rounding": "floor", "saturation": "saturate"}
    assert srs_output(30, **options) is not None
    assert srs_output(31, **options) is None
    assert srs_output(-1, **options) is None
    assert srs_output(4, **(options | {"saturation": "none"})) is not None
    assert srs_output(4, **(options | {"saturation": "none", "out_bits": 7})) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shift": 60}, "shift must be an integer from -4 to 59, got 60"),
        ({"shift": True}, "shift must be an integer from -4 to 59, got True"),
        ({"shift": [1]}, r"shift must be an integer from -4 to 59, got \[1\]"),
        ({"out_bits": 33}, "out_bits must be an integer from 2 to 32, got 33"),
        ({"rounding": "up"}, "unknown rounding"),
        ({"saturation": "clip"}, "unknown saturation"),
        ({"threads": 0}, "threads must be an integer of 1 or more, got 0"),
    ],
)
def test_what_either_step_refuses_is_refused(change, match):
    options = {"shift": 1} | change
    with pytest.raises(ValueError, match=match):
        emulate_gemm_srs([[1]], [[1]], MacArray(), **options)
