"""The shipped files: sourced, loadable under every name, and equal to the facts they cite."""

import pytest

from hwmodels import (
    AcceleratorError,
    GemmWorkload,
    describe,
    estimate_cost,
    list_accelerators,
    load_accelerator,
)

CONFIDENCES = {"vendor", "measured", "inferred", "estimate"}


def test_the_shipped_accelerators_are_listed():
    assert list_accelerators() == [
        *("a100", "aie2", "aie2p", "aie_mlv2", "ascend910b", "b200", "h100", "h200", "intel_npu4"),
        *("l40s", "mi300x", "mi350x", "mi355x", "rtx4090", "rtx_pro_6000", "sm120", "systolic"),
        *("t4", "tpu_v5e", "trainium2", "ve2802"),
    ]


@pytest.mark.parametrize("name", list_accelerators())
def test_every_number_has_a_unit_a_source_and_a_confidence(name):
    unitless_words = (
        "organization", "units.rows", "units.columns", ".name", ".kind", "instruction_",
        "register_block_", "partials", "tile_k_", "overlaps", "load_widens", "_buffers",
        "fill_channels", "datapath.", ".scope", "dataflow", "families", "mixes_widths", ".unsigned",
        "variant ", "transforms",
    )  # fmt: skip
    for row in describe(load_accelerator(name)):
        assert len(row["source"]) > 10, row["key"]
        assert row["confidence"] in CONFIDENCES, row["key"]
        assert row["unit"] or any(word in row["key"] for word in unitless_words), row["key"]


@pytest.mark.parametrize("alias", ["xdna1", "npu1", "XDNA1", "aie2"])
def test_aliases_load_the_same_machine(alias):
    assert load_accelerator(alias).name == "aie2"


@pytest.mark.parametrize("name", list_accelerators())
def test_file_name_and_name_agree(name):
    assert load_accelerator(name).name == name


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(
        AcceleratorError, match=r"unknown accelerator 'aie3'; did you mean 'aie2'\?"
    ):
        load_accelerator("aie3")


def test_aie2_peak_is_the_arithmetic_of_the_data_book():
    hw = load_accelerator("aie2")
    int8 = next(mode for mode in hw.modes if mode.name == "int8")
    tops = 2 * int8.macs_per_cycle * hw.units.count * hw.units.clock_hz / 1e12
    assert tops == pytest.approx(8.19, abs=0.005)  # hardware manual: 2 * 256 * 16 * 1.0 GHz


@pytest.mark.parametrize(("mode", "tops"), [("int4", 1248), ("int8", 624), ("fp16", 312)])
def test_a100_peaks_are_those_of_the_data_sheet(mode, tops):
    hw = load_accelerator("a100")
    rate = next(m.macs_per_cycle for m in hw.modes if m.name == mode)
    peak = 2 * rate * hw.units.count * hw.units.clock_hz / 1e12
    assert peak == pytest.approx(tops, rel=0.002)  # data sheets round to whole TOPS


@pytest.mark.parametrize(
    ("name", "mode", "tops"),
    [
        ("tpu_v5e", "bf16", 197),
        ("tpu_v5e", "int8", 393),
        ("trainium2@data_sheet", "bf16", 667),
        ("trainium2", "fp8", 8 * 158),
        ("ascend910b@910b4", "fp16", 245.76),
        ("ascend910b@910b4", "int8", 491.52),
        ("intel_npu4", "int8", 48),
        ("ve2802", "int8", 165 / 0.85),  # 85 % of the peak, GAMA
        ("ve2802@ve2302", "int8", 34 * 512 * 1.25e-3),
        ("l40s", "int4", 1466),
    ],
)
def test_peaks_are_those_that_makers_and_measurers_state(name, mode, tops):
    hw = load_accelerator(name)
    rate = next(m.macs_per_cycle for m in hw.modes if m.name == mode)
    assert 2 * rate * hw.units.count * hw.units.clock_hz / 1e12 == pytest.approx(tops, rel=0.005)


def test_digest_changes_with_content_only():
    hw = load_accelerator("aie2")
    other = hw.model_copy(update={"title": "another title"})
    assert hw.digest() == load_accelerator("npu1").digest()
    assert hw.digest() != other.digest()
    assert len(hw.digest()) == 64


def test_datapath_says_what_the_emulator_needs():
    datapath = load_accelerator("aie2").datapath
    assert (datapath.acc_bits, datapath.overflow, datapath.products_per_add) == (32, "wrap", 8)
    assert (datapath.rounding, datapath.saturation) == ("conv_even", "saturate")
    # Turing has no bfloat16; the kernels of later GPUs write it.
    assert load_accelerator("t4").datapath.out_format == "fp16"
    assert load_accelerator("a100").datapath.out_format == "bf16"
    assert load_accelerator("a100").datapath.p_format == "bf16"


@pytest.mark.parametrize("name", list_accelerators())
def test_every_file_says_with_a_source_what_floats_do_beyond_their_range(name):
    overflow = load_accelerator(name).datapath.float_overflow
    assert "not stated" not in overflow.source
    assert overflow.rules["fp16"] == "infinity"
    assert overflow.rules["fp8_e4m3"] == "saturate"


def test_a_block_inside_a_block_is_described_key_by_key():
    rows = {row["key"]: row for row in describe(load_accelerator("h100"))}
    assert rows["datapath.float_overflow.fp16"]["value"] == "infinity"
    assert "satfinite" in rows["datapath.float_overflow.fp8_e4m3"]["source"]
    assert "datapath.float_overflow" not in rows


_PRECISIONS = [
    ("W4A4", "int"),
    ("W4A4", "mxfp"),
    ("W8A8", "int"),
    ("W8A8", "mxfp"),
    ("W16A16", "int"),
]


@pytest.mark.parametrize("main", _PRECISIONS, ids=" ".join)
@pytest.mark.parametrize(
    "name", [n for n in list_accelerators() if load_accelerator(n).energy.tdp_w]
)
def test_a_large_gemm_takes_no_more_power_than_the_board(name, main):
    hw = load_accelerator(name)
    precision, family = main
    work = GemmWorkload(
        m=8192, n=8192, k=8192, main=precision, family=family, group=None, rounds_x=False
    )
    cost = estimate_cost(work, hw)
    assert hw.energy.static_w < cost.energy_j / cost.latency_s <= 1.05 * hw.energy.tdp_w
