"""Named arrays: every one has a source, and the ones we can check behave as it says."""

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.presets import CONFIDENCES, REQUANTIZERS, array_preset, list_array_presets
from loraq_sim.emulator.runtimes import list_runtimes, runtime_of
from loraq_sim.emulator.two_level import emulate_two_level_report
from loraq_sim.errors import InputError
from loraq_sim.formats import parse_rounding, parse_saturation


@pytest.mark.parametrize("name", list_array_presets())
def test_every_preset_has_a_source_and_known_modes(name):
    record = array_preset(name)
    assert record.name == name
    assert len(record.source) > 40
    assert record.confidence in CONFIDENCES
    assert record.requantize in REQUANTIZERS
    parse_rounding(record.rounding)
    parse_saturation(record.saturation)
    assert isinstance(record.array, MacArray | TwoLevelArray)


@pytest.mark.parametrize("name", list_array_presets())
def test_a_preset_says_what_it_multiplies_and_where_zero_points_enter(name):
    record = array_preset(name)
    assert " x " in record.operands
    assert record.zero_point in ("initial", "after")
    if record.runtime is not None:
        runtime = runtime_of(record.runtime)
        assert (record.requantize, record.zero_point) == (runtime.rule, runtime.zero_correction)
    a, w = np.array([[1, 2, 3]]), np.array([[4, 5, 6]])
    zeros = {"a_zero": 2, "w_zero": 1, "zero_point": record.zero_point}
    assert emulate_gemm(a, w, record.array, **zeros)[0, 0] == (a - 2)[0] @ (w - 1)[0]


def test_every_runtime_is_a_preset_and_nvdla_and_xmos_saturate():
    assert set(list_runtimes()) <= set(list_array_presets())
    a, w = np.full((1, 64), 127), np.full((1, 64), 127)
    ends = {"nvdla": 2**33 - 1, "xmos": 2**31 - 1}
    for name, end in ends.items():
        array = array_preset(name).array
        assert emulate_gemm(a, w, array, init=np.array([[end]]))[0, 0] == end
    lowest = emulate_gemm(-a, w, array_preset("xmos").array, init=np.array([[-(2**31) + 1]]))
    assert lowest[0, 0] == -(2**31) + 1


def test_the_names_an_architect_looks_for_are_there():
    wanted = {"aie1", "aie2", "aie2_int4", "aie2p", "imma", "imma_satfinite", "mfma", "gemmini"}
    assert wanted <= set(list_array_presets())
    assert len(set(list_array_presets())) == len(list_array_presets())


@pytest.mark.parametrize("name", list_array_presets())
def test_a_preset_multiplies_as_it_should_where_nothing_overflows(name):
    rng = np.random.default_rng(3)
    a, w = rng.integers(-8, 8, (4, 40)), rng.integers(-8, 8, (3, 40))
    array = array_preset(name).array
    if isinstance(array, TwoLevelArray):
        acc = emulate_two_level_report(a, w, array).acc
    else:
        acc = emulate_gemm(a, w, array)
    np.testing.assert_array_equal(acc, a @ w.T)


def test_vpmaddubsw_saturates_a_pair_of_large_products():
    a, w = np.array([[255, 255, 1, 1]]), np.array([[127, 127, 1, 1]])
    acc = emulate_gemm(a, w, array_preset("avx2_maddubs").array)
    np.testing.assert_array_equal(acc, [[2**15 - 1 + 2]])


@pytest.mark.parametrize(
    ("wraps", "saturates"),
    [("imma", "imma_satfinite"), ("wmma", "wmma_clamp"), ("vnni", "vnni_saturate")],
)
def test_the_clamping_variant_gives_int_max_where_the_plain_one_wraps(wraps, saturates):
    a = w = np.array([[100]])
    init = np.array([[2**31 - 1]])
    assert emulate_gemm(a, w, array_preset(wraps).array, init=init)[0, 0] == -(2**31) + 9999
    assert emulate_gemm(a, w, array_preset(saturates).array, init=init)[0, 0] == 2**31 - 1


def test_the_shape_of_known_arrays_is_that_of_their_accelerator_files():
    import hwmodels

    for name, preset_name in (("aie2", "aie2"), ("a100", "imma")):
        datapath, mac = hwmodels.load_accelerator(name).datapath, array_preset(preset_name).array
        assert (datapath.acc_bits, datapath.overflow) == (mac.acc_bits, mac.overflow)
        assert datapath.products_per_add == mac.products_per_add


@pytest.mark.parametrize(
    ("name", "message"),
    [("aie3", "unknown array preset 'aie3'; did you mean 'aie"), ("IMMA_sat", "'imma_satfinite'")],
)
def test_an_unknown_name_gets_the_nearest(name, message):
    with pytest.raises(InputError, match=message):
        array_preset(name)
