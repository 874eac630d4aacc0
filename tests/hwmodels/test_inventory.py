"""Models as shapes: their MACs are those of the published networks."""

import pytest

from hwmodels import AcceleratorError, list_accelerators, list_models, load_accelerator, load_model
from hwmodels.inventory import product_cost

# MACs of one denoising step: linear and convolution layers, attention products.
PUBLISHED = {
    ("pixart-sigma", 512): (1_113_770_852_352, 174_927_642_624),
    ("pixart-sigma", 1024): (4_310_371_565_568, 2_323_208_208_384),
    ("flux.1-dev", 1024): (29_756_127_707_136, 7_436_199_002_112),
    ("sd3.5-medium", 1024): (7_017_040_969_728, 4_232_532_738_048),
    ("sana-1.6b", 1024): (2_905_555_394_560, 61_105_766_400),
    ("sana-1.6b", 512): (821_339_545_600, 15_276_441_600),
}
PRODUCTS = ("attention", "linear_attention")


def test_the_shipped_models_are_listed():
    assert list_models() == ["flux.1-dev", "pixart-sigma", "sana-0.6b", "sana-1.6b", "sd3.5-medium"]


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
    assert split > 0.9 * sum(e.macs for e in entries)


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
