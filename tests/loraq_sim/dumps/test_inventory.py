import pytest

from loraq_sim.dumps.kinds import list_models, load_inventory
from loraq_sim.errors import InputError

# Weights that SVDQuant stores in 4 bits, and values of all linear layers and convolutions, counted
# on the diffusers models themselves.
PARAMETERS = {
    "flux.1-dev": (8_606_711_808, 11_901_388_864),
    "pixart-sigma": (520_224_768, 610_660_256),
    "qwen-image": (13_589_544_960, 20_430_366_784),
    "sana-0.6b": (501_645_312, 591_550_880),
    "sana-1.6b": (1_354_752_000, 1_604_187_232),
    "sd3.5-medium": (1_460_404_224, 2_243_163_712),
    "sdxl": (1_843_200_000, 2_566_875_524),
    "wan2.1-1.3b": (1_250_426_880, 1_418_440_768),
    "wan2.1-14b": (11_953_766_400, 14_286_023_744),
    "z-image": (6_016_204_800, 6_154_367_552),
}
# Multiply-adds in 1e9 of one denoising step of all these layers at 1024 and at 512 pixels.
GMACS = {
    "flux.1-dev": (29_756, 9_925),
    "pixart-sigma": (4_310, 1_114),
    "qwen-image": (62_649, 20_899),
    "sana-0.6b": (1_077, 305),
    "sana-1.6b": (2_906, 821),
    "sd3.5-medium": (7_017, 2_087),
    "sdxl": (5_977, 1_534),
    # Of 81 frames.
    "wan2.1-1.3b": (215_301, 53_941),
    "wan2.1-14b": (2_058_739, 516_332),
    "z-image": (26_099, 8_703),
}


def test_all_models_are_listed():
    assert list_models() == sorted(PARAMETERS)


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters_and_multiply_adds_are_those_of_the_models(model):
    for resolution, gmacs in zip((1024, 512), GMACS[model], strict=True):
        layers = load_inventory(model, resolution=resolution).layers
        quantized = sum(layer.n * layer.k for layer in layers if layer.is_quantized)
        values = sum(layer.n * (layer.k + layer.has_bias) for layer in layers)
        assert (quantized, values) == PARAMETERS[model]
        macs = sum(x.n * x.k * x.rows_per_call * x.calls_per_step for x in layers)
        assert macs / 1e9 == pytest.approx(gmacs, abs=0.5)


def test_pixart_self_attention_and_ffn_match_the_published_count():
    # DiT-XL/2 at 512 pixels: 524.6 GMAC a sample, attention products included.
    layers = load_inventory("pixart-sigma", resolution=512).layers
    kinds = {"self_q", "self_k", "self_v", "self_out", "ffn_up", "ffn_down"}
    linear = sum(x.n * x.k * x.rows_per_call / 2 for x in layers if x.kind in kinds)
    attention = 28 * 2 * 1024**2 * 1152
    assert (linear + attention) / 1e9 == pytest.approx(524.6, rel=0.005)


@pytest.mark.parametrize("model", PARAMETERS)
def test_layers_of_a_group_have_one_input(model):
    layers = load_inventory(model).layers
    assert len({layer.name for layer in layers}) == len(layers)
    assert not any("{" in layer.name + layer.group for layer in layers)
    inputs = {}
    for layer in layers:
        assert inputs.setdefault(layer.group, (layer.k, layer.rows_per_call)) == (
            layer.k,
            layer.rows_per_call,
        )


def test_a_depthwise_convolution_is_no_gemm():
    ops = {layer.op: layer.is_gemm for layer in load_inventory("sana-1.6b").layers}
    assert ops == {"conv1x1": True, "linear": True, "conv3x3_depthwise": False}


def test_unknown_names_and_sizes_are_told():
    with pytest.raises(InputError, match="unknown model 'sana'; did you mean 'sana-"):
        load_inventory("sana")
    with pytest.raises(InputError, match="resolution must be 512 or 1024 pixels, got 256"):
        load_inventory("sana-0.6b", resolution=256)
