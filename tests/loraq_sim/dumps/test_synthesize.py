"""Drawn layers against the statistics they are drawn from, computed here from scratch."""

import numpy as np
import pytest

from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.dumps.steps import steps_of_layer
from loraq_sim.dumps.synthesize import synthesize_layers
from loraq_sim.dumps.synthesize_statistics import InputModel, statistics_of
from loraq_sim.dumps.write import write_layer_dump
from loraq_sim.errors import DumpError, InputError
from loraq_sim.results.verdict import verdict_of

BLOCK = "transformer_blocks.3."
# Top-32 share of the energy, kurtosis of the input and its channels' largest over median root mean
# square in the prototype that was fitted to trained layers (768 rows, one draw of each kind).
PROTOTYPE = {
    "self_q": (0.156, 16, 9),
    "self_out": (0.125, 3, 3),
    "cross_q": (0.13, 375, 41),
    "cross_out": (0.12, 5, 3),
    "ffn_up": (0.135, 17, 10),
    "ffn_down": (0.08, 160, 23),
}


@pytest.fixture(scope="module")
def pixart():
    return synthesize_layers("pixart-sigma", tokens=600, seed=5)


@pytest.fixture(scope="module")
def block(pixart):
    return {layer.kind: layer for layer in pixart.select(BLOCK + "*").values()}


def excess_kurtosis(values):
    centered = values.astype(np.float64) - values.mean(dtype=np.float64)
    variance = np.mean(centered**2)
    return np.mean(centered**4) / variance**2 - 3


def channel_rms(rows):
    return np.sqrt(np.mean(rows.astype(np.float64) ** 2, axis=0))


def top_32_energy(weight):
    narrow = (weight if len(weight) < weight.shape[1] else weight.T).astype(np.float64)
    energies = np.linalg.eigvalsh(narrow @ narrow.T)
    return energies[-32:].sum() / energies.sum()


@pytest.mark.parametrize("kind", PROTOTYPE)
def test_weights_have_the_tails_of_trained_layers(block, kind):
    weight = block[kind].weight
    # The range over kinds that was measured. With 1.3 M samples and the fourth moments of these
    # tails the kurtosis of one draw moves by 0.1 at most.
    assert 0.8 - 0.1 <= excess_kurtosis(weight) <= 2.2 + 0.1
    # 8 to 18 was measured. P(|T| > x) falls as x^-df, so of many draws the largest value of one in
    # a hundred is up to 100^(1/8) = 1.8 times the median of the largest values for df = 8.
    assert 7.5 <= np.abs(weight).max() / weight.std() <= 1.8 * 18
    assert weight.std() == pytest.approx(statistics_of(kind).weight.std, rel=1e-3)


@pytest.mark.parametrize("kind", PROTOTYPE)
def test_weights_have_the_spectrum_of_trained_layers(block, kind):
    assert top_32_energy(block[kind].weight) == pytest.approx(PROTOTYPE[kind][0], rel=0.1)


@pytest.mark.parametrize("kind", PROTOTYPE)
def test_inputs_have_the_outliers_of_trained_layers(block, kind):
    _, kurtosis, outlier_ratio = PROTOTYPE[kind]
    rows = block[kind].activations
    rms = channel_rms(rows)
    # A kurtosis set by three to twelve channels moves threefold from draw to draw: their means,
    # normal in units of their scale, enter with the fourth power.
    assert kurtosis / 3 <= excess_kurtosis(rows) <= kurtosis * 3
    assert outlier_ratio / 2 <= rms.max() / np.median(rms) <= outlier_ratio * 2


def test_expected_kurtosis_follows_from_the_recipe(pixart):
    # Without means, E x^4 / (E x^2)^2 = 3 E s^4 / (E s^2)^2 * exp(4 token_std^2) for scales s:
    # lognormal ones of variance (0.33^2 + common drift 0.12^2) give exp(4 (0.33^2 + 0.12^2)), and
    # means of variance v change 3 into (3 + 6 v + 3 v^2) / (1 + v)^2 = 3: a normal of a normal
    # mean. token_std is 0.25.
    expected = 3 * np.exp(4 * (0.33**2 + 0.12**2 + 0.25**2)) - 3
    blocks = [f"transformer_blocks.{i}.attn1.to_out.0" for i in range(4)]
    found = [excess_kurtosis(pixart[name].activations) for name in blocks]
    # Four draws of 1152 channels, whose common drift is one path of 20 correlated steps.
    assert np.mean(found) == pytest.approx(expected, rel=0.25)


def test_an_input_after_gelu_has_its_floor(block):
    rows = block["ffn_down"].activations
    spread = rows.max(axis=0) / -rows.min(axis=0)
    # min GELU = -0.17; times a channel's factor, as the largest values are.
    assert np.median(spread) > 3
    assert np.mean(rows < 0) > 0.5


def test_a_gated_input_is_symmetric_and_heavy_tailed():
    layer = synthesize_layers("sana-0.6b", tokens=600)["transformer_blocks.0.ff.conv_point"]
    rows = layer.activations
    assert (layer.n, layer.k) == (1152, 2880)
    assert 30 <= excess_kurtosis(rows) <= 70
    assert abs(np.mean(rows < 0) - 0.5) < 0.02


def test_columns_of_self_v_are_small_where_the_input_is_large(block):
    # The table's -0.6, diluted a little by the noise of columns and channels.
    def correlation(layer):
        columns = np.log(channel_rms(layer.weight))
        return np.corrcoef(columns, np.log(channel_rms(layer.activations)))[0, 1]

    assert -0.7 < correlation(block["self_v"]) < -0.45
    assert abs(correlation(block["self_q"])) < 0.12


def test_inputs_drift_over_the_time_steps(block):
    # Ranges measured on a small PixArt over 20 steps.
    for kind in ("self_q", "cross_q", "cross_out", "ffn_up"):
        rows = block[kind].activations
        by_step = np.array([channel_rms(part) for part in np.split(rows, 20)])
        whole = np.sqrt(np.mean(by_step**2, axis=1))
        assert 1.1 <= whole.max() / whole.min() <= 2.1
        assert 1.6 <= np.median(by_step.max(axis=0) / by_step.min(axis=0)) <= 3.0
        ends = np.corrcoef(np.log(by_step[0]), np.log(by_step[-1]))[0, 1]
        assert 0.3 <= ends <= 0.8


def test_outlier_channels_stay_in_place(block):
    rows = block["cross_q"].activations
    early, late = (set(np.argsort(channel_rms(part))[-3:]) for part in np.split(rows, 2))
    assert early == late


def test_a_layer_is_the_same_whatever_else_is_drawn(pixart):
    name = BLOCK + "attn1.to_k"
    alone = synthesize_layers("pixart-sigma", tokens=600, seed=5, include_16_bit=True)[name]
    assert alone.digest() == pixart[name].digest()
    fewer = synthesize_layers("pixart-sigma", tokens=40, seed=5)[name]
    np.testing.assert_array_equal(fewer.weight, alone.weight)
    other = synthesize_layers("pixart-sigma", tokens=600, seed=6)[name]
    assert not np.any(other.weight[:8] == alone.weight[:8])


def test_roles_shapes_and_calls_are_the_inventory_s(pixart):
    info = pixart.info(BLOCK + "attn1.to_v")
    assert (info.kind, info.n, info.k, info.rows_per_call) == ("self_v", 1152, 1152, 8192)
    assert (len(pixart), info.tokens, info.dtype, info.has_bias) == (224, 600, "float16", True)
    small = synthesize_layers("sana-1.6b", resolution=512, tokens=1)
    assert small.info("transformer_blocks.19.attn1.to_q").rows_per_call == 512
    assert not small.info("transformer_blocks.19.attn1.to_q").has_bias
    everything = synthesize_layers("sana-1.6b", include_16_bit=True)
    assert len(everything) == 227 - 20
    assert not any("conv_depth" in name for name in everything)


def test_layers_of_one_attention_share_one_stored_input(pixart, tmp_path):
    chosen = synthesize_layers("pixart-sigma", tokens=20).select("transformer_blocks.0.attn1.*")
    dump = read_layer_dump(write_layer_dump(tmp_path / "a.safetensors", chosen))
    assert len({dump.info(name).activation_key for name in dump}) == 2
    for name in chosen:
        assert dump[name].digest() == chosen[name].digest()
    assert dump.meta["model"] == "pixart-sigma"
    assert "seed 0" in dump.meta["origin"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("sd3.5-medium", "transformer_blocks.0.ff_context.net.0.proj"),
        ("sd3.5-medium", "transformer_blocks.0.attn2.to_q"),
        ("pixart-sigma", "caption_projection.linear_1"),
        ("pixart-sigma", "proj_out"),
    ],
)
def test_every_kind_of_layer_can_be_drawn(model, name):
    layer = synthesize_layers(model, tokens=2, include_16_bit=True)[name]
    assert np.isfinite(layer.weight).all()
    assert layer.activations.std() > 0.05


def test_an_attention_output_stands_beside_a_gelu_output_four_times_as_wide():
    statistics = statistics_of("single_out").inputs
    model = InputModel(500, statistics, np.random.default_rng(0))
    rows = model.draw(300, np.random.default_rng(1))
    assert rows.shape == (300, 500)
    assert abs(np.mean(rows[:, :100] < 0) - 0.5) < 0.05
    assert np.mean(rows[:, 100:] < 0) > 0.6
    # The channels' root mean squares are known before rows are drawn.
    found = np.log(channel_rms(rows) / model.channel_rms)
    assert np.abs(found).mean() < 0.2


def test_each_row_knows_its_time_step(pixart):
    steps = steps_of_layer(pixart, BLOCK + "attn1.to_q")
    np.testing.assert_array_equal(steps, np.repeat(np.arange(20.0), 30))
    few = synthesize_layers("pixart-sigma", tokens=3)
    np.testing.assert_array_equal(steps_of_layer(few, BLOCK + "attn1.to_q"), [0.0, 6.0, 13.0])


def test_a_record_of_steps_that_does_not_fit_is_refused(pixart):
    dump = synthesize_layers("pixart-sigma", tokens=3)
    dump.meta["time_steps"] = {"values": [0, 1], "rows": {"*": [1, 1]}}
    with pytest.raises(DumpError, match="counts 2 rows for layer .* which has 3"):
        steps_of_layer(dump, BLOCK + "attn1.to_q")
    dump.meta["time_steps"] = {"values": [0, 1], "rows": {"*": [2**60, 2**60]}}
    with pytest.raises(DumpError, match="counts 2305843009213693952 rows"):
        steps_of_layer(dump, BLOCK + "attn1.to_q")
    for bad in ({"rows": {}}, {"values": [0], "rows": {"*": [4, -1]}}, [], {"rows": {"*": 3}}):
        dump.meta["time_steps"] = bad
        with pytest.raises(DumpError, match="is incomplete for layer"):
            steps_of_layer(dump, BLOCK + "attn1.to_q")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be 1 to 65536, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"dtype": "int8"}, "unknown storage dtype 'int8'"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(InputError, match=message):
        synthesize_layers("pixart-sigma", **options)


def test_what_rests_on_drawn_weights_says_so(block):
    assert {layer.inputs_source for layer in block.values()} == {"synthetic model"}
    told = verdict_of([{"split": "W4A4", "output_error": 0.1, "inputs": "synthetic model"}])
    assert "synthetic weights and inputs" in told.text
    told = verdict_of([{"split": "W4A4", "output_error": 0.1, "inputs": "synthetic"}])
    assert "weights and inputs" not in told.text
