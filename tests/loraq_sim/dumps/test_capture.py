"""Capturing small torch models whose inputs are known exactly."""

import numpy as np
import pytest
import torch

from loraq_sim.dumps.capture import CaptureSource, capture_layers
from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.dumps.steps import steps_of_layer
from loraq_sim.dumps.write import write_layer_dump
from loraq_sim.errors import DumpError, InputError


class Attention(torch.nn.Module):
    """q, k and v read one tensor; `out` and the convolution read others; `idle` never runs."""

    def __init__(self, width=6):
        super().__init__()
        self.attn1 = torch.nn.ModuleDict(
            {f"to_{part}": torch.nn.Linear(width, 4, bias=part != "k") for part in "qkv"}
        )
        self.out = torch.nn.Linear(4, 3)
        self.mix = torch.nn.Conv2d(3, 5, 1)
        self.blur = torch.nn.Conv2d(5, 5, 3, padding=1)
        self.idle = torch.nn.Linear(2, 2)

    def forward(self, x):
        parts = [layer(x) for layer in self.attn1.values()]
        y = self.out(sum(parts))
        image = y.movedim(-1, 1)[..., None]
        return self.blur(self.mix(image))


def source(model, calls, **options):
    return CaptureSource(name="test", model=model, calls=calls, **options)


def inputs(n_calls, shape=(2, 5, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(float(10 - i), torch.randn(shape, generator=generator)) for i in range(n_calls)]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Attention()


def test_weights_biases_and_every_input_row_are_captured(model):
    calls = inputs(3)
    dump = capture_layers(source(model, calls), tokens=100)
    assert list(dump) == ["attn1.to_q", "attn1.to_k", "attn1.to_v", "out", "mix", "blur"]
    layer = dump["attn1.to_q"]
    np.testing.assert_array_equal(layer.weight, model.attn1["to_q"].weight.detach().numpy())
    np.testing.assert_array_equal(layer.bias, model.attn1["to_q"].bias.detach().numpy())
    assert dump["attn1.to_k"].bias is None
    stream = np.concatenate([x.reshape(-1, 6).numpy() for _, x in calls])
    np.testing.assert_array_equal(layer.activations, stream)
    assert (layer.kind, layer.rows_per_call, layer.calls_per_step) == ("self_q", 10, 1)


def test_a_captured_layer_reproduces_the_model(model):
    calls = inputs(1)
    dump = capture_layers(source(model, calls), tokens=100)
    layer = dump["out"]
    mixed = dump["mix"]
    expected = layer.activations @ layer.weight.T + layer.bias
    np.testing.assert_array_equal(mixed.weight.shape, (5, 3))
    # One float32 product of four terms, summed in another order.
    np.testing.assert_allclose(mixed.activations, expected, rtol=1e-5, atol=1e-6)


def test_layers_of_one_input_share_one_tensor_and_a_group(model, tmp_path):
    dump = capture_layers(source(model, inputs(2)), tokens=8)
    copy = read_layer_dump(write_layer_dump(tmp_path / "a.safetensors", dump))
    infos = [copy.info(f"attn1.to_{part}") for part in "qkv"]
    assert len({info.activation_key for info in infos}) == 1
    assert {info.group for info in infos} == {"attn1"}
    assert copy.info("out").group == "out"
    assert copy.info("out").activation_key != infos[0].activation_key


def test_the_budget_holds_and_the_sample_is_seeded(model):
    calls = inputs(40)
    first, again, other = (
        capture_layers(source(model, calls), tokens=16, seed=seed) for seed in (3, 3, 4)
    )
    for name in first:
        assert first[name].activations.shape[0] == 16
        assert first[name].digest() == again[name].digest()
        assert first[name].digest() != other[name].digest()


def test_a_selection_captures_the_same_rows(model):
    calls = inputs(40)
    everything = capture_layers(source(model, calls), tokens=16)
    some = capture_layers(source(model, calls), tokens=16, patterns=["self_q", "out"])
    assert list(some) == ["attn1.to_q", "out"]
    for name in some:
        assert some[name].digest() == everything[name].digest()


def test_each_row_comes_from_the_time_step_it_says(model):
    calls = [(step, torch.full((1, 7, 6), float(step))) for step in (9, 5, 9, 2)]
    dump = capture_layers(source(model, calls), tokens=12)
    steps = steps_of_layer(dump, "attn1.to_v")
    np.testing.assert_array_equal(dump["attn1.to_v"].activations[:, 0], steps)
    assert dump.meta["time_steps"]["values"] == [9, 5, 2]
    assert list(steps) == sorted(steps, reverse=True)


def test_meta_says_where_the_layers_come_from(model):
    dump = capture_layers(source(model, inputs(2), meta={"checkpoint": "c"}), seed=5)
    assert dump.meta["model"] == "Attention"
    assert dump.meta["checkpoint"] == "c"
    assert dump.meta["model_calls"] == 2
    assert dump.meta["seed"] == 5
    assert "from test" in dump.meta["origin"]
    assert dump.meta["torch"] == torch.__version__
    assert dump.skipped == {"idle": "did not run"}


def test_a_generator_is_sent_the_model_s_output():
    model = torch.nn.Linear(3, 3)

    def calls():
        x = torch.ones(1, 3)
        for step in range(4):
            x = yield step, {"input": x}

    dump = capture_layers(source(model, calls()))
    rows = dump["model"].activations
    assert rows.shape == (4, 3)
    following = rows[:-1] @ dump["model"].weight.T + dump["model"].bias
    np.testing.assert_allclose(rows[1:], following, rtol=1e-5, atol=1e-6)


class Fickle(torch.nn.Module):
    """b reads a's input in some calls only."""

    def __init__(self, together):
        super().__init__()
        self.a, self.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.together = together

    def forward(self, number):
        x = torch.full((6, 2), float(number))
        y = x if number in self.together else x + 100
        self.a(x)
        if number != 7:
            self.b(y)
        return x


@pytest.mark.parametrize("together", [{0, 1, 2}, {0}, set(), {1, 2, 3}])
def test_layers_that_part_keep_their_own_inputs(together):
    calls = [(number, (number,)) for number in range(5)]
    dump = capture_layers(source(Fickle(together), calls), tokens=1000)
    np.testing.assert_array_equal(dump["a"].activations[:, 0], np.repeat(np.arange(5), 6))
    expected = [number if number in together else number + 100 for number in range(5)]
    np.testing.assert_array_equal(dump["b"].activations[:, 0], np.repeat(expected, 6))
    assert dump.info("a").activation_key != dump.info("b").activation_key


def test_a_layer_that_runs_less_often_keeps_its_own_inputs():
    calls = [(number, (number,)) for number in (0, 1, 7)]
    dump = capture_layers(source(Fickle({0, 1}), calls), tokens=1000)
    np.testing.assert_array_equal(dump["a"].activations[:, 0], np.repeat([0, 1, 7], 6))
    np.testing.assert_array_equal(dump["b"].activations[:, 0], np.repeat([0, 1], 6))


def test_a_tensor_changed_in_place_is_another_input():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            self.a(x)
            x.add_(1)
            return self.b(x)

    dump = capture_layers(source(InPlace(), [(0, (torch.zeros(3, 2),))]))
    assert dump["a"].activations.max() == 0
    assert dump["b"].activations.min() == 1


def test_memory_that_is_used_again_is_no_shared_input():
    class Chain(torch.nn.Module):
        """Each layer's input is freed before the next one is made, often at the same address."""

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(12))

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                layer(torch.full((32, 64), float(i)))
            return x

    dump = capture_layers(source(Chain(), [(0, (torch.zeros(1),))]))
    for i in range(12):
        assert np.unique(dump[f"layers.{i}"].activations) == [i]


def test_a_layer_used_twice_in_a_call_counts_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.a(self.a(x))

    dump = capture_layers(source(Twice(), inputs(3, shape=(4, 2))))
    info = dump.info("a")
    assert (info.calls_per_step, info.rows_per_call, info.tokens) == (2, 4, 24)


def test_bfloat16_models_keep_their_dtype(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).to(torch.bfloat16)
    x = torch.randn(5, 4).to(torch.bfloat16)
    dump = capture_layers(source(model, [(0, x)]))
    copy = read_layer_dump(write_layer_dump(tmp_path / "a.safetensors", dump))
    assert (copy.info("0").dtype, copy.info("0").activation_dtype) == ("bfloat16", "bfloat16")
    np.testing.assert_array_equal(copy["0"].weight, model[0].weight.detach().float().numpy())
    np.testing.assert_array_equal(copy["0"].activations, x.float().numpy())


def test_one_dimensional_pointwise_convolutions_are_linear_layers():
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 1), torch.nn.Conv1d(4, 4, 1, groups=2))
    x = torch.randn(2, 3, 5)
    dump = capture_layers(source(model, [(0, x)]))
    assert list(dump) == ["0"]
    np.testing.assert_array_equal(
        dump["0"].activations, x.numpy().transpose(0, 2, 1).reshape(10, 3)
    )


def test_hooks_are_gone_afterwards(model):
    capture_layers(source(model, inputs(1)))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(DumpError):
        capture_layers(source(model, [(0, torch.ones(2, 2))]))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "none of 7 linear layers ran in 0 calls"),
        ([5], "call 1 must be .* got a int"),
        ([(1, 2, 3)], "got a tuple of int, int, int"),
        ([("a", {})], "got a tuple of str, dict"),
        ([(float("nan"), {})], "with a finite number"),
        ([(0, {"y": 1})], "model call 1 failed: TypeError"),
        ([(0, torch.ones(1, 1, 6)), (1, torch.ones(1, 1, 2))], "'attn1.to_q': reads 2 features"),
        ([(0, torch.full((1, 1, 6), torch.nan))], "'attn1.to_q': its inputs hold NaN or Inf"),
    ],
)
def test_bad_calls_are_told(model, calls, message):
    with pytest.raises(DumpError, match=message):
        capture_layers(source(model, calls))


def test_failing_generators_are_told(model):
    def calls():
        yield inputs(1)[0]
        raise KeyError("no more")

    with pytest.raises(DumpError, match="its inputs for call 2 failed: KeyError"):
        capture_layers(source(model, calls()))


def test_bad_requests_are_told(model):
    with pytest.raises(InputError, match="tokens must be 1 to 65536, got 0"):
        capture_layers(source(model, inputs(1)), tokens=0)
    with pytest.raises(DumpError, match="pattern 'ffn_\\*' matches no layer name and no kind"):
        capture_layers(source(model, inputs(1)), patterns=["ffn_*"])
    with pytest.raises(DumpError, match="no Linear layer and no convolution"):
        capture_layers(source(torch.nn.ReLU(), inputs(1)))
