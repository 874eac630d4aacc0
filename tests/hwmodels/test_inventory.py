"""Models as shapes: their MACs are those of the published networks."""

import pytest

from hwmodels import (
    AcceleratorError,
    list_accelerators,
    list_models,
    load_accelerator,
    load_model,
    validate_elementwise,
)
from hwmodels.inventory import WORKS, InventoryEntry, product_cost
from loraq_sim.machine import model_step
from loraq_sim.split import parse_split

# MACs of one denoising step: linear and convolution layers, attention products.
PUBLISHED = {
    ("pixart-sigma", 512): (1_113_770_852_352, 174_927_642_624),
    ("pixart-sigma", 1024): (4_310_371_565_568, 2_323_208_208_384),
    ("flux.1-dev", 1024): (29_756_127_707_136, 7_436_199_002_112),
    ("sd3.5-medium", 1024): (7_017_040_969_728, 4_232_532_738_048),
    ("sana-1.6b", 1024): (2_905_555_394_560, 61_105_766_400),
    ("sana-1.6b", 512): (821_339_545_600, 15_276_441_600),
    # Attention worked out from heads, tokens and blocks: queries x keys x width, twice, a block.
    ("qwen-image", 1024): (62_648_766_431_232 // 2, 60 * 2 * 4608**2 * 3072),
    ("wan2.1-1.3b", 512): (
        53_940_662_304_768 // 2,
        30 * 2 * 21504 * (21504 + 512) * 1536,
    ),
    ("z-image", 1024): (
        26_099_225_919_488,
        2 * 3840 * (2 * 4096**2 + 2 * 512**2 + 30 * 4608**2),
    ),
    # Two and ten blocks of a transformer at 64 x 64 and 32 x 32, twice and three times, and so on.
    ("sdxl", 1024): (
        5_977_320_980_480,
        2 * 2 * (10 * 4096 * (4096 + 77) * 640 + 60 * 1024 * (1024 + 77) * 1280),
    ),
}
PRODUCTS = ("attention", "linear_attention")


def test_the_shipped_models_are_listed():
    assert list_models() == [
        *("flux.1-dev", "pixart-sigma", "qwen-image", "sana-0.6b", "sana-1.6b", "sd3.5-medium"),
        *("sdxl", "wan2.1-1.3b", "wan2.1-14b", "z-image"),
    ]


@pytest.mark.parametrize(("key", "macs"), PUBLISHED.items(), ids=str)
def test_macs_of_a_step_are_the_networks(key, macs):
    entries = load_model(*key).entries
    layers = sum(e.macs for e in entries if e.op not in PRODUCTS)
    products = sum(e.macs for e in entries if e.op in PRODUCTS)
    assert (layers, products) == macs


@pytest.mark.parametrize("name", list_models())
def test_most_macs_of_layers_are_in_the_split(name):
    entries = [e for e in load_model(name).entries if e.op not in PRODUCTS]
    split = sum(e.macs for e in entries if e.precision == "split")
    # A U-Net's convolutions stay at 16 bits.
    assert split > (0.7 if name == "sdxl" else 0.9) * sum(e.macs for e in entries)


@pytest.mark.parametrize("name", list_accelerators())
def test_attention_is_never_faster_than_its_macs_at_peak(name):
    hw = load_accelerator(name)
    entry = next(e for e in load_model("pixart-sigma").entries if e.op == "attention")
    cost = product_cost(entry, hw)
    peak = max(m.macs_per_cycle for m in hw.modes if m.is_wide_float)
    assert cost.latency_s * hw.units.count * hw.units.clock_hz * peak >= entry.macs / entry.calls
    assert cost.dram_bytes == 2 * 16 * 72 * (2 * 4096 + 2 * 4096) * 2
    assert cost.bound in ("compute", "vector", "dram", "dispatch")


def test_depthwise_convolutions_keep_their_taps():
    entry = next(e for e in load_model("sana-1.6b").entries if e.op == "depthwise")
    cost = product_cost(entry, load_accelerator("a100"))
    assert cost.weight_bytes == 11200 * 9 * 2
    assert cost.dram_bytes == 2 * 2048 * 11200 * 2 + cost.weight_bytes


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(AcceleratorError, match=r"unknown model 'pixart'; did you mean"):
        load_model("pixart")
    with pytest.raises(AcceleratorError, match="resolution must be 512 or 1024 pixels, got 768"):
        load_model("pixart-sigma", 768)


def test_elementwise_work_is_within_a_tenth_of_what_was_measured():
    rows = validate_elementwise()
    assert len(rows) == 20
    assert sum(row["held_out"] for row in rows) == 10
    errors = [abs(row["error"]) for row in rows]
    assert sum(errors) / len(errors) <= 0.05
    assert max(errors) <= 0.1
    family = next(f for f in load_accelerator("aie2p").kernels if f.name == "elementwise")
    assert family.mean_error == pytest.approx(sum(errors) / len(errors), abs=6e-4)
    assert family.worst_error == pytest.approx(max(errors), abs=6e-4)
    # 256 x 960 elements are fewer than any row behind the rates.
    assert [r["rows"] for r in rows if r["confidence"] != "measured"] == [256]


def _elementwise(work, m=2048, n=1024):
    return InventoryEntry(
        kind="x", op="elementwise", m=m, n=n, k=1, calls=1, precision="A16", work=work
    )


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("name", ["aie2", "aie2p", "a100"])
def test_elementwise_work_is_never_faster_than_its_bytes(name, work):
    hw = load_accelerator(name)
    small, large = product_cost(_elementwise(work), hw), product_cost(_elementwise(work, 4096), hw)
    moved = (WORKS[work][0] + 1) * 2048 * 1024 * 2
    assert small.dram_bytes == moved
    assert small.latency_s > moved / hw.memories.dram.bandwidth_bytes_per_s
    assert small.latency_s < large.latency_s < 2 * small.latency_s
    assert sum(small.parts.values()) == pytest.approx(small.latency_s, rel=1e-12)


def test_work_nobody_measured_is_assumed_and_unknown_work_refused():
    hw = load_accelerator("aie2p")
    assert product_cost(_elementwise("gelu"), hw).confidence == "measured"
    assert product_cost(_elementwise("rope"), hw).confidence == "assumed"
    with pytest.raises(AcceleratorError, match=r"unknown work 'gelo'; did you mean 'gelu'"):
        product_cost(_elementwise("gelo"), hw)
    with pytest.raises(AcceleratorError, match="'mlir_air' of aie2p does not serve elementwise"):
        product_cost(_elementwise("gelu"), hw, kernel="mlir_air")


def test_narrow_attention_is_named_by_its_formats():
    entry = next(e for e in load_model("pixart-sigma").entries if e.op == "attention")
    hw = load_accelerator("h100")
    by_name = product_cost(entry, hw, qk="int8", pv="fp8")
    wide = product_cost(entry, hw)
    assert by_name.parts["compute"] < 0.6 * wide.parts["compute"]
    same = product_cost(entry, hw, qk="W8A8", pv="W8A8", element="mxfp")
    assert product_cost(entry, hw, qk="fp8", pv="fp8") == same


@pytest.mark.parametrize("name", ["pixart-sigma", "wan2.1-1.3b"])
def test_parts_of_a_step_are_those_of_the_step_that_is_priced_whole(name):
    """The step of `cost --model`, which sums rows of kinds; one of them has two calls a step."""
    hw, split = load_accelerator("aie2"), parse_split("W4A4+W8A8r64")
    rows = model_step(name, split, hw, resolution=512).rows
    layers = [row for row in rows if row["precision"] == split.text]
    parts = load_model(name, 512).latency_parts(hw, main="W4A4", branch="W8A8", rank=64)
    assert layers
    assert sum(parts.values()) == pytest.approx(sum(row["latency_s"] for row in layers), rel=1e-9)
    assert min(parts.values()) >= 0
