"""Models whose layers are emulated: against `run_layer` layer by layer, and restored afterwards."""

from pathlib import Path

import numpy as np
import pytest
import torch

import hwmodels
import loraq_sim as lq
from loraq_sim.diffusion.emulated_model import EmulatedLayer, emulate_model
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError
from loraq_sim.evaluate import solve_split
from loraq_sim.layers import Layer
from loraq_sim.machine import datapath_for
from loraq_sim.quantized_model import read_quantized_model, write_quantized_model
from loraq_sim.recipe import Recipe
from loraq_sim.split import parse_split

SPLITS = ("W4A4", "W4A4+W8A8r4", "W4A8+W16A16r2", "W8A8")


class Block(torch.nn.Module):
    """Linear, 1x1 convolution over an image, Linear named like an output projection."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(24, 40)
        self.mix = torch.nn.Conv2d(40, 32, 1)
        self.spread = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.proj_out = torch.nn.Linear(32, 8, bias=False)

    def forward(self, x):
        h = torch.nn.functional.gelu(self.up(x))
        image = self.spread(self.mix(h.permute(0, 3, 1, 2)))
        return self.proj_out(image.permute(0, 2, 3, 1))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 3, 24, generator=torch.Generator().manual_seed(1))


def as_layer(name, module, rows=None):
    weight = module.weight.detach().numpy().reshape(len(module.weight), -1)
    bias = None if module.bias is None else module.bias.detach().numpy()
    return Layer(name=name, weight=weight, bias=bias, activations=rows)


def by_hand(module, x, split, path, **options):
    """One layer on rows (M, K), solved and run without the package under test."""
    layer = as_layer("layer", module)
    split = parse_split(split)
    solution = solve_split(layer, split, **{"method": "loraq", "preset": "balanced", **options})
    return torch.from_numpy(run_layer(x.numpy(), solution, split, path, bias=layer.bias).y)


def test_a_model_takes_every_option_of_its_plan(block, x):
    options = {"method": "svdquant", "seed": 3, "rotate": "hadamard:8"}
    emulated = emulate_model(block, "W4A4+W8A8r4", "aie2", **options)
    assert {plan.solution.rotation for plan in emulated.plans} == {8}
    split, path = "W4A4+W8A8r4", datapath_for(hwmodels.load_accelerator("aie2"))
    with torch.no_grad(), emulated:
        found = block.up(x)
        expected = by_hand(block.up, x.reshape(-1, 24), split, path, **options)
    np.testing.assert_array_equal(found.reshape(-1, 40).numpy(), expected.numpy())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("hw", ["aie2", "h100"])
def test_every_layer_gives_the_bits_of_run_layer(block, x, split, hw):
    path = datapath_for(hwmodels.load_accelerator(hw))
    with torch.no_grad():
        h = by_hand(block.up, x.reshape(-1, 24), split, path).reshape(2, 5, 3, 40)
        h = torch.nn.functional.gelu(h).reshape(-1, 40)
        h = by_hand(block.mix, h, split, path).reshape(2, 5, 3, 32)
        expected = block.proj_out(block.spread(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        with emulate_model(block, split, hw) as emulated:
            found = block(x)
    assert sorted(emulated.layers) == ["mix", "up"]
    # The two layers left in float32 run the same torch kernels on the same bits.
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_model_is_itself_again_afterwards_also_after_an_exception(block, x):
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        plain = block(x)
        emulated = emulate_model(block, "W4A4", "aie2")
        with emulated:
            assert not torch.equal(block(x), plain)
        with pytest.raises(ZeroDivisionError), emulated:
            block(x / 0.5 + 1 // 0)
        torch.testing.assert_close(block(x), plain, rtol=0, atol=0)
    assert all("forward" not in module.__dict__ for module in block.modules())
    for name, value in block.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name].numpy())


def test_a_forward_that_another_library_has_put_there_is_put_back(block, x):
    calls = []
    own = torch.nn.Linear.forward

    def watched(values):
        calls.append(1)
        return own(block.up, values)

    block.up.forward = watched
    with torch.no_grad(), emulate_model(block, "W8A8", "aie2"):
        block(x)
    assert block.up.forward is watched
    assert not calls


def test_one_model_is_not_emulated_twice_at_once(block):
    with emulate_model(block, "W4A4", "aie2"):
        second = emulate_model(block, "W8A8", "aie2")
        with pytest.raises(InputError, match="already"), second:
            pass
        # The refused one has taken nothing away from the first.
        assert "forward" in block.up.__dict__
    assert "forward" not in block.up.__dict__


def test_same_inputs_give_the_same_bits(block, x):
    with torch.no_grad():
        outputs = []
        for _ in range(2):
            with emulate_model(block, "W4A4+W6A6r4", "aie2", seed=3):
                outputs.append(block(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_mapping_of_splits_recipe_and_solutions_say_the_same_in_three_ways(block, x, tmp_path):
    split = parse_split("W4A4+W8A8r4")
    solutions = {
        name: solve_split(
            as_layer(name, getattr(block, name)), split, method="lqer", preset="fast", seed=0
        )
        for name in ("up", "proj_out")
    }
    file = write_quantized_model(
        tmp_path / "q.safetensors", solutions, meta={"splits": dict.fromkeys(solutions, split.text)}
    )
    options = {"method": "lqer", "preset": "fast"}
    recipe = Recipe.model_validate({"layers": dict.fromkeys(solutions, split.text)})
    ways = [
        emulate_model(block, dict.fromkeys(solutions, split.text), "aie2", **options),
        emulate_model(block, recipe, "aie2", **options),
        emulate_model(block, solutions, "aie2", splits=split),
        emulate_model(block, read_quantized_model(file), "aie2"),
    ]
    outputs = []
    for emulated in ways:
        assert sorted(emulated.layers) == ["proj_out", "up"]
        with torch.no_grad(), emulated:
            outputs.append(block(x))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0)


def test_each_layer_of_a_recipe_has_its_own_split_and_settings(block):
    recipe = Recipe.model_validate(
        {"layers": {"*": "W4A4+W8A8r4", "mix": {"skip": True}, "up": {"rank": 2, "method": "lqer"}}}
    )
    emulated = emulate_model(block, recipe, "aie2")
    plans = {plan.name: plan for plan in emulated.plans}
    assert sorted(plans) == ["proj_out", "up"]
    assert (plans["up"].split.text, plans["up"].solution.method) == ("W4A4+W8A8r2", "lqer")
    assert (plans["proj_out"].split.text, plans["proj_out"].solution.rank) == ("W4A4+W8A8r4", 4)


def test_smoothing_uses_the_calibration_rows_and_the_data_path_divides_by_it(block, x):
    rows = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    rows[:, 3] *= 50
    calibration = {"up": as_layer("up", block.up, rows)}
    with (
        torch.no_grad(),
        emulate_model(
            block, {"up": "W4A4"}, "aie2", calibration=calibration, smooth=0.5
        ) as emulated,
    ):
        found = block.up(torch.from_numpy(rows))
    smooth = emulated.plans[0].solution.smooth
    assert smooth[3] == smooth.max()
    exact = torch.nn.functional.linear(torch.from_numpy(rows), block.up.weight, block.up.bias)
    with torch.no_grad(), emulate_model(block, {"up": "W4A4"}, "aie2"):
        plain = block.up(torch.from_numpy(rows))
    assert (found - exact).norm() < 0.7 * (plain - exact).norm()
    with pytest.raises(InputError, match=r"layer 'up'.*activations"):
        emulate_model(block, {"up": "W4A4"}, "aie2", smooth=0.5)


def test_overflows_are_counted_over_all_calls(block, x):
    with torch.no_grad():
        with emulate_model(
            block, "W8A8", "aie2", datapath={"acc_bits": 14, "overflow": "saturate"}
        ) as narrow:
            block(x)
            once = narrow.statistics.overflow_count
            block(x)
        with emulate_model(block, "W8A8", "aie2") as wide:
            block(x)
    assert once > 0
    assert narrow.statistics.overflow_count == 2 * once
    assert (narrow.layers["up"].n_calls, narrow.layers["up"].n_rows) == (2, 60)
    assert wide.statistics.overflow_count == 0
    assert 14 < wide.statistics.safe_acc_bits == narrow.statistics.safe_acc_bits


def test_bytes_are_those_of_the_solutions(block):
    emulated = emulate_model(block, "W4A4", "aie2")
    # int4 codes and fp16 scales of groups of 64: one group a row.
    assert emulated.weight_bytes == (40 * 12 + 80) + (32 * 20 + 64)
    n_weights = 40 * 24 + 32 * 40
    assert emulated.bits_per_weight == pytest.approx(8 * emulated.weight_bytes / n_weights)


def test_half_precision_models_stay_in_half_precision(block, x):
    block = block.to(torch.bfloat16)
    with torch.no_grad(), emulate_model(block, "W8A8", "aie2"):
        y = block(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_the_public_name_is_the_function():
    assert lq.emulate_model is emulate_model


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"down": "W4A4"}, {}, "'down'.*'up'|layer of the model"),
        ("W4A4", {"skip": ["*"]}, "left to emulate"),
        ("W4A4r8", {}, "not understood"),
        ({"up": "W4A4"}, {"method": "magic"}, "magic"),
    ],
)
def test_what_cannot_be_emulated_is_refused_by_name(block, source, options, message):
    with pytest.raises(InputError, match=message):
        emulate_model(block, source, "aie2", **options)


def test_solutions_must_fit_the_layer_and_the_split(block):
    weight = block.up.weight.detach().numpy()
    solution = lq.solve(weight, main="int4/g64", branch="int8/g64", rank=4)
    with pytest.raises(InputError, match="splits"):
        emulate_model(block, {"up": solution}, "aie2")
    with pytest.raises(InputError, match="shape"):
        emulate_model(block, {"mix": solution}, "aie2", splits="W4A4+W8A8r4")
    for split in ("W8A8+W8A8r4", "W4A4+W6A6r4", "W4A4"):
        with pytest.raises(InputError, match="branch"):
            emulate_model(block, {"up": solution}, "aie2", splits=split)


def test_inputs_that_are_not_finite_run_on_and_are_named(block, x):
    with emulate_model(block, "W4A4", "aie2") as emulated:
        y = block(x * float("inf"))
    assert not torch.isfinite(y).any()
    assert emulated.clipped_note() == "the input of up holds NaN or infinities from elsewhere"
    assert "forward" not in block.up.__dict__


def test_the_bundled_transformer_runs_one_step_like_its_layers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
    del diffusers
    from loraq_sim.diffusion import load_transformer, sample_images

    folder = Path(__file__).parents[3] / "examples" / "tiny_pixart"
    transformer = load_transformer(folder)
    seen = {}
    emulated = emulate_model(transformer.model, "W4A4+W8A8r4", "aie2", preset="fast")
    run = EmulatedLayer.run

    def recorded(self, rows):
        y = run(self, rows)
        seen[self.name] = rows.copy(), y
        return y

    EmulatedLayer.run = recorded
    try:
        with emulated:
            sample_images(transformer, images=2, steps=2, guidance=3.0)
    finally:
        EmulatedLayer.run = run
    # 4 blocks of 8 layers: what SVDQuant leaves at 16 bits stays as it is.
    assert len(seen) == len(emulated.plans) == 4 * 8
    for plan in emulated.plans:
        rows, y = seen[plan.name]
        bias = plan.module.bias.detach().numpy()
        expected = run_layer(rows, plan.solution, plan.split, emulated.datapath, bias=bias).y
        np.testing.assert_array_equal(y, expected)


def test_values_beyond_a_format_run_on_as_infinities_and_are_named(block, x):
    with emulate_model(block, "W8A8", "t4", preset="fast") as emulated:
        y = block(x * 1e6)
    assert not torch.isfinite(y).all()
    assert emulated.clipped_count > 0
    note = emulated.clipped_note()
    assert note.startswith(f"{emulated.clipped_count:,} values beyond their float format in ")
    assert "such as y of up in fp16" in note or "such as scales of X_a of up in fp16" in note
    with emulate_model(block, "W8A8", "t4", preset="fast") as emulated:
        block(x)
    assert (emulated.clipped_count, emulated.clipped_note()) == (0, "")
