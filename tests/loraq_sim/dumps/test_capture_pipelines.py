"""Capture of what runs itself: pipelines, compiled and quantized modules, transformers by class."""

import textwrap

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.dumps import read_layer_dump
from loraq_sim.dumps.capture import CaptureSource, capture_layers, load_entry
from loraq_sim.dumps.steps import steps_of_layer
from loraq_sim.errors import DumpError

ENTRY = """
    import torch

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = torch.nn.Linear(8, 8)
            self.to_k = torch.nn.Linear(8, 8)

        def forward(self, x, timestep=None):
            return self.to_q(x) + self.to_k(x)

    class Pipe:
        def __init__(self):
            self.transformer = Denoiser()
            self.said = []

        def set_progress_bar_config(self, disable=False):
            self.is_quiet = disable

        def __call__(self, prompt, num_inference_steps=50, generator=None, output_type="pil"):
            assert self.is_quiet and output_type == "latent"
            self.said.append(prompt)
            x = torch.randn(1, 4, 8, generator=generator)
            for step in range(num_inference_steps):
                # As Wan and SD3: a tensor with one value a sample.
                x = self.transformer(x, timestep=torch.tensor([1000.0 - step]))
            return x

    PIPE = Pipe()

    def pipe():
        return PIPE

    def with_prompts():
        return PIPE, ["a", "b"]

    def with_run():
        pipe = Pipe()
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        return pipe, lambda: (pipe.set_progress_bar_config(True), pipe("x", 2, None, "latent"))

    def module_with_run():
        model = Denoiser()
        return model, lambda: [model(torch.ones(3, 8)) for _ in range(2)]

    def never():
        return Denoiser(), lambda: None

    def fails():
        model = Denoiser()
        return model, lambda: model(torch.ones(3, 7))

    def raises():
        model = Denoiser()

        def run():
            model(torch.ones(3, 8))
            raise RuntimeError("out of luck")

        return model, run
"""


@pytest.fixture
def entry(tmp_path, monkeypatch):
    (tmp_path / "my_pipe.py").write_text(textwrap.dedent(ENTRY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pipeline_is_run_on_prompts_of_a_file_and_its_denoiser_recorded(entry):
    (entry / "prompts.txt").write_text("a cat\n\na dog\n")
    words = ["dump", "capture", "my_pipe.py:pipe", "--prompts", "prompts.txt", "--steps", "3"]
    result = CliRunner().invoke(app, [*words, "--out", "d.safetensors", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    dump = read_layer_dump("d.safetensors")
    assert list(dump) == ["to_q", "to_k"]
    assert dump.meta["model"] == "Denoiser"
    assert dump.meta["model_calls"] == 6
    # Four rows of each of two prompts at each step; q and k read one tensor.
    steps, counts = np.unique(steps_of_layer(dump, "to_q"), return_counts=True)
    assert (steps.tolist(), counts.tolist()) == ([998, 999, 1000], [8, 8, 8])
    assert dump.info("to_q").activation_key == dump.info("to_k").activation_key
    assert dump["to_q"].kind == "linear"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pipeline_with_its_own_prompts_or_run_needs_no_file(entry):
    found = capture_layers(load_entry("my_pipe.py:with_prompts", steps=2), tokens=8)
    assert found.meta["model_calls"] == 4
    found = capture_layers(load_entry("my_pipe.py:with_run"), tokens=8)
    assert (list(found), found.meta["model_calls"]) == (["to_q", "to_k"], 2)


def test_a_call_that_tells_no_time_step_has_its_number(entry):
    found = capture_layers(load_entry("my_pipe.py:module_with_run"), tokens=8)
    assert found.meta["time_steps"]["values"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe", "returns a pipeline and nothing to call it with; give --prompts FILE"),
        ("never", "never called the Denoiser; return the module that denoises"),
        ("fails", "layer 'to_q': reads 7 features, but its weight has 8$"),
        ("raises", "its run, after 1 model call, failed: RuntimeError: out of luck"),
    ],
)
def test_what_cannot_be_run_is_refused(entry, name, message):
    with pytest.raises(DumpError, match=message):
        capture_layers(load_entry(f"my_pipe.py:{name}"))


def test_a_file_without_prompts_is_refused(entry):
    (entry / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "holds no prompt"), ("none.txt", "cannot be read")):
        words = ["dump", "capture", "my_pipe.py:pipe", "--prompts", name, "--out", "x.pt"]
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def captured(model, *args):
    return capture_layers(CaptureSource(name="m", model=model, calls=[(0, args)]), tokens=8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_of_compiled_parts_keep_their_names():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    x, plain = torch.randn(3, 4), captured(model, torch.zeros(3, 4))
    model[1] = torch.compile(model[1], backend="eager")
    found = captured(model, x)
    assert list(found) == list(plain) == ["0", "1"]
    np.testing.assert_array_equal(found["1"].weight, model[1].weight.detach().numpy())
    np.testing.assert_allclose(found["1"].activations, model[0](x).detach().numpy())


@pytest.mark.filterwarnings("ignore")
def test_weights_of_quantized_layers_are_what_they_stand_for():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    found = captured(quantized, torch.randn(3, 16))
    expected = quantized[0].weight().dequantize().numpy()
    np.testing.assert_array_equal(found["0"].weight, expected)
    np.testing.assert_array_equal(found["0"].bias, model[0].bias.detach().numpy())


def test_packed_codes_are_refused_with_what_to_do():
    """As bitsandbytes keeps them: a Linear whose weight is a column of bytes."""
    layer = torch.nn.Linear(16, 8)
    layer.weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    layer.forward = lambda x: x[..., :8]
    with pytest.raises(DumpError, match="codes are packed: capture the model before"):
        captured(torch.nn.Sequential(layer), torch.randn(3, 16))
