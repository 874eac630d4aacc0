"""Adapters (LoRA) are merged as their programs merge them, or refused with what is missing."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.errors import DumpError, InputError
from loraq_sim.sweeps.plan import compose
from loraq_sim.sweeps.plan_file import SweepPlan

RNG = np.random.default_rng(5)
NAMES = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.0.ff.net.0.proj")
WEIGHTS = {
    name: RNG.standard_normal((24 if "ff" in name else 16, 16), np.float32) for name in NAMES
}
QUERY, RANK = NAMES[0], 4
FACTORS = {
    name: (
        RNG.standard_normal((RANK, 16), np.float32),
        RNG.standard_normal((len(weight), RANK), np.float32),
    )
    for name, weight in WEIGHTS.items()
}


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    save_file({f"{name}.weight": weight for name, weight in WEIGHTS.items()}, path)
    return path


def peft(name, part):
    return f"base_model.model.{name}.lora_{'AB'[part]}.weight"


def diffusers(name, part):
    return f"transformer.{name}.lora_{'AB'[part]}.weight"


def of_old(name, part):
    parent, _, last = name.removesuffix(".0").rpartition(".")
    word = ("down", "up")[part]
    if "attn" in name:
        return f"unet.{parent}.processor.{last}_lora.{word}.weight"
    return f"unet.{name}.lora.{word}.weight"


def kohya(name, part):
    return f"lora_unet_{name.replace('.', '_')}.lora_{('down', 'up')[part]}.weight"


def adapter(path, key, *, alpha=None, shape=lambda x: x, more=()):
    tensors = {
        key(name, part): np.ascontiguousarray(shape(factor))
        for name, factors in FACTORS.items()
        for part, factor in enumerate(factors)
    }
    if alpha is not None:
        tensors |= {
            key(name, 0).replace("lora_down.weight", "alpha"): np.array(alpha, np.float32)
            for name in NAMES
        }
    path.parent.mkdir(exist_ok=True)
    save_file(tensors | dict(more), path)
    return path


def check(dump, scale):
    """float32 products of four terms of the size of 1, and one more sum."""
    assert list(dump) == sorted(NAMES)
    for name, (down, up) in FACTORS.items():
        exact = WEIGHTS[name].astype(np.float64) + scale * up.astype(np.float64) @ down
        np.testing.assert_allclose(dump[name].weight, exact, atol=64 * abs(scale) * 2**-23 + 2**-21)


@pytest.mark.parametrize("key", [diffusers, of_old, kohya], ids=lambda key: key.__name__)
def test_factors_without_a_scale_count_once(base, tmp_path, key):
    dump = read_layer_dump(base, lora=adapter(tmp_path / "a.safetensors", key))
    check(dump, 1.0)
    assert "merged: a.safetensors, into 3 layers, times 1" in dump.left_out
    assert dump.info(NAMES[0]).dtype == "float32 + LoRA"


@pytest.mark.parametrize(("strength", "scale"), [("", 0.75), ("=0.5", 0.375), ("=-1", -0.75)])
def test_alpha_of_kohya_is_divided_by_the_rank(base, tmp_path, strength, scale):
    file = adapter(tmp_path / "a.safetensors", kohya, alpha=3.0)
    check(read_layer_dump(base, lora=f"{file}{strength}"), scale)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 6, "peft_type": "LORA"}, 1.5),
    ],
)
def test_the_config_of_peft_says_the_scale(base, tmp_path, config, scale):
    file = adapter(tmp_path / "peft" / "adapter_model.safetensors", peft)
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    check(read_layer_dump(base, lora=file), scale)
    check(read_layer_dump(base, lora=file.parent), scale)
    check(read_layer_dump(base, lora=f"{file.parent}=0.5"), scale / 2)


def test_an_alpha_of_one_layer_is_its_own(base, tmp_path):
    file = adapter(tmp_path / "peft" / "adapter_model.safetensors", peft)
    config = {"lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 12}}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    dump = read_layer_dump(base, lora=file)
    for name, scale in zip(NAMES, (3.0, 1.0, 1.0), strict=True):
        down, up = FACTORS[name]
        np.testing.assert_allclose(dump[name].weight, WEIGHTS[name] + scale * up @ down, rtol=1e-4)
    assert "times 1 to 3" in dump.left_out


def test_peft_files_without_their_config_need_a_scale(base, tmp_path):
    file = adapter(tmp_path / "peft" / "adapter_model.safetensors", peft)
    with pytest.raises(DumpError, match="does not say how strongly it counts .* --lora .*=SCALE"):
        read_layer_dump(base, lora=file)
    check(read_layer_dump(base, lora=f"{file}=0.25"), 0.25)


def test_adapters_beside_the_weights_are_merged_where_the_scale_is_known(tmp_path):
    tensors = {f"{name}.base_layer.weight": weight for name, weight in WEIGHTS.items()}
    tensors |= {f"{n}.lora_A.style.weight": down for n, (down, _) in FACTORS.items()}
    tensors |= {f"{n}.lora_B.style.weight": up for n, (_, up) in FACTORS.items()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    unscaled = read_layer_dump(path)
    with pytest.raises(DumpError, match="without its adapter"):
        unscaled[f"{NAMES[0]}.base_layer"]
    check(read_layer_dump(path, lora=f"{path}=0.5"), 0.5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    dump = read_layer_dump(path)
    check(dump, 0.5)
    assert "6 factors of adapters (LoRA) merged into 3 layers, times 0.5" in dump.left_out
    assert f"{NAMES[0]}.base_layer" in dump


def test_a_convolution_s_adapter_is_that_of_its_patches(tmp_path):
    weight = RNG.standard_normal((6, 4, 3, 3), np.float32)
    down, up = RNG.standard_normal((2, 4, 3, 3), np.float32), RNG.standard_normal((6, 2, 1, 1))
    save_file(
        {"conv.weight": weight, "q.weight": np.eye(4, dtype=np.float32)}, tmp_path / "b.safetensors"
    )
    factors = {"lora_unet_conv.lora_down.weight": down}
    factors["lora_unet_conv.lora_up.weight"] = up.astype(np.float32)
    save_file(factors, tmp_path / "a.safetensors")
    dump = read_layer_dump(tmp_path / "b.safetensors", lora=tmp_path / "a.safetensors")
    exact = weight + np.einsum("nr,rckl->nckl", up[:, :, 0, 0], down)
    np.testing.assert_allclose(dump["conv"].weight, exact.reshape(6, 36), atol=1e-5)


def test_several_adapters_add_up(base, tmp_path):
    one = adapter(tmp_path / "one.safetensors", kohya)
    two = adapter(tmp_path / "two.safetensors", diffusers)
    check(read_layer_dump(base, lora=[f"{one}=0.5", f"{two}=2"]), 2.5)


def test_text_encoders_of_an_adapter_are_left_out_and_said(base, tmp_path):
    more = {
        f"lora_te_text_model_layers_0_mlp_fc1.lora_{word}.weight": np.ones(shape, np.float32)
        for word, shape in (("down", (2, 8)), ("up", (8, 2)))
    }
    dump = read_layer_dump(base, lora=adapter(tmp_path / "a.safetensors", kohya, more=more))
    check(dump, 1.0)
    assert "1 pair of text encoders left out" in dump.left_out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other.weight": (8, 8)}, "holds no factors of an adapter"),
        (
            {"transformer.x.lora_A.weight": (2, 16), "transformer.x.lora_B.weight": (16, 2)},
            "1 of its 1 pair of factors are for layers that the checkpoint does not have",
        ),
        ({f"{QUERY}.lora_A.weight": (2, 16)}, "has one factor of two"),
        (
            {f"{QUERY}.lora_A.weight": (2, 8), f"{QUERY}.lora_B.weight": (16, 2)},
            r"factors of \(16, 2\) and \(2, 8\) do not fit the weight \(16, 16\)",
        ),
        (
            {f"{QUERY}.lora_A.weight": (2, 16), f"{QUERY}.lora_B.weight": (16, 3)},
            "have no common rank",
        ),
        ({"lora_unet_blocks_0_attn1_to_q.lokr_w1": (2, 2)}, "another kind than LoRA"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(base, tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    save_file({key: np.ones(shape, np.float32) for key, shape in tensors.items()}, path)
    with pytest.raises(DumpError, match=message):
        read_layer_dump(base, lora=path)


def test_names_and_values_of_strangers_end_in_one_printable_line(base, tmp_path):
    path = tmp_path / "a.safetensors"
    for odd in ("\x1b[31m\x07.lokr_w1", f"{QUERY}\x7f.lora_A.weight", "te\n.lora_B.weight"):
        save_file({odd: np.ones((2, 16), np.float32)}, path)
        with pytest.raises(DumpError) as refused:
            read_layer_dump(base, lora=path)
        assert str(refused.value).isprintable()
    factors = {f"{QUERY}.lora_A.weight": (2, 16), f"{QUERY}.lora_B.weight": (16, 2)}
    save_file({key: np.full(shape, np.inf, np.float32) for key, shape in factors.items()}, path)
    with pytest.raises(DumpError, match="values that are NaN or Inf"):
        read_layer_dump(base, lora=path)[QUERY]


@pytest.mark.parametrize("text", ["a.pt=", "a.pt=x", "a.pt=inf", "=0.5"])
def test_a_strength_is_a_number(base, text):
    with pytest.raises(InputError, match="expected FILE or FILE=SCALE"):
        read_layer_dump(base, lora=text)


def test_a_sweep_of_a_merged_model_is_that_of_the_model_saved_merged(base, tmp_path):
    file = adapter(tmp_path / "a.safetensors", kohya, alpha=2.0)
    merged = tmp_path / "merged.safetensors"
    words = ["dump", "convert", str(base), str(merged), "--lora", f"{file}=0.5", "--quiet"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    plan = {"accelerators": ("aie2",), "splits": ("W4A4",)}
    plans = [
        SweepPlan(dump=str(base), lora=(f"{file}=0.5",), **plan),
        SweepPlan(dump=str(merged), **plan),
        SweepPlan(dump=str(base), **plan),
    ]
    ids = [[case.case_id for task in compose(one).tasks for case in task.cases] for one in plans]
    assert ids[0] == ids[1]
    assert not set(ids[0]) & set(ids[2])
    task = compose(plans[0]).tasks[0]
    assert task.lora == (f"{file}=0.5",)
