"""Checkpoints as they ship: folders, shards, wrappers, prefixes, weights beside their scales."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loraq_sim as lq
from loraq_sim.errors import DumpError
from loraq_sim.nunchaku import write_deepcompressor

RNG = torch.Generator().manual_seed(3)
NAMES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2", "proj_out")
WEIGHTS = {f"{name}.weight": torch.randn(6, 4, generator=RNG).bfloat16() for name in NAMES} | {
    "proj_out.bias": torch.arange(6.0).bfloat16(),
    "norm.weight": torch.ones(4),
}


def save(path, tensors=WEIGHTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(dict(tensors), path)
    return path


def save_shards(folder, suffix=".safetensors", index=True, stem="diffusion_pytorch_model"):
    parts = [dict(list(WEIGHTS.items())[:2]), dict(list(WEIGHTS.items())[2:])]
    where = {}
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05d}-of-00002{suffix}"
        save(folder / name, part)
        where |= dict.fromkeys(part, name)
    if index:
        content = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
        (folder / f"{stem}{suffix}.index.json").write_text(content)
    return folder


def check_read(path, names=NAMES):
    dump = lq.read_layer_dump(path)
    assert set(dump) == set(names)
    for name in names:
        expected = WEIGHTS[f"{name}.weight"].float().numpy()
        np.testing.assert_array_equal(dump[name].weight, expected)
        assert (dump[name].bias is not None) == (name == "proj_out")
        assert dump.info(name).dtype == "bfloat16"
    return dump


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("index", [True, False])
def test_a_folder_of_shards_is_one_checkpoint(tmp_path, suffix, index):
    folder = save_shards(tmp_path / "model", suffix, index)
    dump = check_read(folder)
    assert len(dump.files) == 2
    assert dump.info("proj_out").kind == "proj_out"
    if index:
        check_read(folder / f"diffusion_pytorch_model{suffix}.index.json")


def test_a_changed_shard_is_noticed_and_the_digest_is_that_of_all(tmp_path):
    folder = save_shards(tmp_path / "model")
    dump = lq.read_layer_dump(folder)
    before = dump.digest()
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert dump.digest() != before
    with pytest.raises(DumpError, match="changed or removed since it was opened"):
        dump[NAMES[0]]


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "pytorch_model.bin", "x.pt"]
)
def test_a_folder_with_one_file_and_its_config_is_read(tmp_path, name):
    save(tmp_path / name)
    config = {"_class_name": "PixArtTransformer2DModel", "patch_size": 2, "sample_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dump = check_read(tmp_path)
    assert dump.info(NAMES[0]).m == 2 * 32 * 32
    assert "config.json" in dump.info(NAMES[0]).m_source


def test_of_a_pipeline_the_denoiser_is_read_and_said(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    save_shards(tmp_path / "transformer")
    save(tmp_path / "transformer_2" / "diffusion_pytorch_model.safetensors")
    save(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"conv.weight": torch.ones(2, 2)}
    )
    dump = check_read(tmp_path)
    assert "of the pipeline, its 'transformer' is read, not its 'transformer_2'" in dump.left_out
    assert dump.config == tmp_path / "transformer" / "config.json"


def test_a_variant_beside_the_usual_file_is_left_alone(tmp_path):
    save(tmp_path / "diffusion_pytorch_model.safetensors")
    save(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"other.weight": torch.ones(2, 2)})
    check_read(tmp_path)


def test_one_shard_alone_says_that_there_are_more(tmp_path):
    folder = save_shards(tmp_path)
    dump = lq.read_layer_dump(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    assert "one of 2 shards; give the folder for the whole model" in dump.left_out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "notes.txt").write_text("x"), "a checkpoint (it holds 'notes.txt')"),
        (
            lambda d: (d / "model_index.json").write_text("{}"),
            "weights in none of transformer, unet",
        ),
        (
            lambda d: (save(d / "a.safetensors"), save(d / "b.safetensors")),
            "two checkpoints, not shards of one; give one of",
        ),
        (
            lambda d: (save(d / "a.bin"), save(d / "b.bin")),
            "holds several checkpoints (a.bin, b.bin); give one",
        ),
        (
            lambda d: next(save_shards(d).glob("*-00002-of-*")).unlink(),
            "1 of 2 shards missing, such as",
        ),
        (
            lambda d: next(save_shards(d, index=False).glob("*-00001-of-*")).unlink(),
            "1 of 2 shards missing",
        ),
        (lambda d: (d / "m.safetensors.index.json").write_text("["), "without a checkpoint"),
    ],
)
def test_a_folder_that_is_no_checkpoint_says_why_in_one_line(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(DumpError, match=re.escape(message)) as caught:
        lq.read_layer_dump(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "no index of shards"),
        ("[1]", "no index of shards"),
        ('{"weight_map": {}}', "must map names of tensors to names of files"),
        ('{"weight_map": {"a.weight": 3}}', "must map names of tensors"),
        ('{"weight_map": {"a.weight": "../m.safetensors"}}', "is no file beside the index"),
        ('{"weight_map": {"a.weight": "/etc/passwd"}}', "is no file beside the index"),
        ('{"weight_map": {"a.weight": "gone.safetensors"}}', "1 of 1 shard missing"),
        ('{"weight_map": {"a.weight": "m.safetensors"}, "x": "%s"}', "lacks 'a.weight', which"),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(tmp_path, content, message):
    save(tmp_path / "m.safetensors")
    save(tmp_path / "n.safetensors", {"b.weight": torch.ones(2, 2)})
    if "%s" in content:
        content = '{"weight_map": {"a.weight": "m.safetensors", "b.weight": "n.safetensors"}}'
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(DumpError, match=re.escape(message)):
        lq.read_layer_dump(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(6, 4)}}}},
        lambda w: {"module": w, "global_steps": 1},
        lambda w: {"model_state_dict": w, "loss": 0.1},
        lambda w: {"ema": w, "model": {k: v + 1 for k, v in w.items()}, "opt": {}},
        lambda w: {"model": {"state_dict": w}},
        lambda w: {
            "state_dict": {f"model.{k}": v for k, v in w.items()},
            "pytorch-lightning_version": "2.0",
        },
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
        lambda w: {f"model.diffusion_model.{k}": v for k, v in w.items()},
        lambda w: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in w.items()},
        lambda w: w | {"epoch": 4, "config": {"depth": 28}},
        lambda w: {
            "transformer_blocks": {
                "0": {
                    "attn1": {"to_q": {"weight": w[f"{NAMES[0]}.weight"]}},
                    "ff": {"net": {"2": {"weight": w[f"{NAMES[1]}.weight"]}}},
                }
            },
            "proj_out": {"weight": w["proj_out.weight"], "bias": w["proj_out.bias"]},
        },
    ],
)
def test_wrapped_and_prefixed_state_dicts_are_read(tmp_path, wrap):
    if "transformer_blocks" in (content := wrap(dict(WEIGHTS))):
        # A whole entry beside nested ones: the nested ones are what the file is made of.
        content = {"state_dict": content}
    check_read(save(tmp_path / "training.pth", content))


def test_averaged_weights_come_first_and_it_is_said(tmp_path):
    plain = {k: v + 1 for k, v in WEIGHTS.items()}
    dump = check_read(save(tmp_path / "t.pt", {"model": plain, "ema": dict(WEIGHTS)}))
    assert "read is 'ema', not 'model' beside it" in dump.left_out


def test_a_bare_linear_layer_is_a_layer(tmp_path):
    for root in (
        torch.nn.Linear(4, 6).state_dict(),
        {"state_dict": torch.nn.Linear(4, 6).state_dict()},
    ):
        dump = lq.read_layer_dump(save(tmp_path / "bare.pt", root))
        assert list(dump) == ["linear"]
        assert dump["linear"].weight.shape == (6, 4)
        assert dump["linear"].bias is not None


def test_of_a_file_with_encoders_the_diffusion_model_is_read(tmp_path):
    tensors = {f"model.diffusion_model.{k}": v for k, v in WEIGHTS.items()}
    tensors |= {"first_stage_model.decoder.fc.weight": torch.ones(3, 3)}
    dump = check_read(save(tmp_path / "all_in_one.safetensors", tensors))
    assert "not what is beside it (first_stage_model)" in dump.left_out
    with pytest.raises(DumpError, match="is no layer: is of another model in the file"):
        dump["first_stage_model.decoder.fc"]


CODES = torch.randn(256, 192, generator=RNG).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("scale_weight", torch.tensor(0.25)),
        ("weight_scale", torch.tensor([0.25])),
        ("weight_scale", torch.rand(256, 1, generator=RNG)),
        ("weight_scale", torch.rand(256, generator=RNG).bfloat16()),
        ("weight_scale", torch.rand(256, 3, generator=RNG)),
        ("weight_scale_inv", torch.rand(2, 2, generator=RNG)),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_float8_is_multiplied_by_its_scale(tmp_path, name, scale, suffix):
    tensors = {
        "fc.weight": CODES,
        f"fc.{name}": scale,
        "fc.input_scale": torch.ones(1),
        "scaled_fp8": torch.ones(2),
    }
    dump = lq.read_layer_dump(save(tmp_path / f"f8{suffix}", tensors))
    assert dump.left_out == ""
    assert dump.info("fc").dtype == "float8_e4m3fn x scale"
    codes = CODES.float().numpy()
    step = scale.float().numpy().reshape(scale.shape if scale.ndim == 2 else (-1, 1))
    expected = np.empty_like(codes)
    for i in range(256):
        for j in range(192):
            if name == "weight_scale_inv":
                expected[i, j] = codes[i, j] * step[i // 128, j // 128]
            else:
                expected[i, j] = codes[i, j] * step[i % len(step), j * step.shape[1] // 192]
    np.testing.assert_array_equal(dump["fc"].weight, expected)


def test_plain_float8_and_bfloat16_are_values(tmp_path):
    dump = lq.read_layer_dump(save(tmp_path / "f8.safetensors", {"fc.weight": CODES}))
    np.testing.assert_array_equal(dump["fc"].weight, CODES.float().numpy())
    assert dump.info("fc").dtype == "float8_e4m3fn"
    for dtype in (torch.float8_e5m2, torch.bfloat16, torch.float16):
        layer = lq.Layer(name="fc", weight=torch.nn.Parameter(CODES.to(dtype), requires_grad=False))
        np.testing.assert_array_equal(layer.weight, CODES.to(dtype).float().numpy())


def test_int8_rows_of_bitsandbytes_are_decoded(tmp_path):
    codes = torch.randint(-127, 128, (6, 8), dtype=torch.int8, generator=RNG)
    scale = torch.rand(6, generator=RNG)
    path = save(tmp_path / "i8.safetensors", {"fc.weight": codes, "fc.SCB": scale})
    expected = codes.numpy() * (scale.numpy()[:, None] * np.float32(1 / 127))
    np.testing.assert_array_equal(lq.read_layer_dump(path)["fc"].weight, expected)


@pytest.mark.parametrize("is_nested", [False, True])
def test_nf4_blocks_of_bitsandbytes_are_decoded(tmp_path, is_nested):
    values = torch.linspace(-1, 1, 16)
    codes = torch.randint(0, 16, (6, 32), generator=RNG)
    packed = (codes.reshape(-1, 2)[:, 0] * 16 + codes.reshape(-1, 2)[:, 1]).to(torch.uint8)
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 32]}
    steps = torch.tensor([0.5, 2.0, 3.0])
    tensors = {
        "fc.weight": packed[:, None],
        "fc.weight.absmax": steps,
        "fc.weight.quant_map": values,
    }
    if is_nested:
        facts |= {"nested_blocksize": 2, "nested_offset": 0.5, "nested_dtype": "float32"}
        tensors["fc.weight.absmax"] = torch.tensor([3, 255, 7], dtype=torch.uint8)
        tensors["fc.weight.nested_absmax"] = torch.tensor([0.25, 4.0])
        tensors["fc.weight.nested_quant_map"] = torch.linspace(0, 1, 256)
        table = np.linspace(0, 1, 256, dtype=np.float32)
        steps = [table[3] * 0.25 + 0.5, table[255] * 0.25 + 0.5, table[7] * 4.0 + 0.5]
    state = np.frombuffer(json.dumps(facts).encode(), np.uint8).copy()
    tensors["fc.weight.quant_state.bitsandbytes__nf4"] = torch.from_numpy(state)
    dump = lq.read_layer_dump(save(tmp_path / "nf4.safetensors", tensors))
    assert (dump.info("fc").n, dump.info("fc").k, dump.skipped) == (6, 32, {})
    found = dump["fc"].weight
    for i in range(6):
        for j in range(32):
            wanted = float(values[codes[i, j]]) * float(steps[(i * 32 + j) // 64])
            # Three roundings to 24 bits.
            assert abs(found[i, j] - wanted) <= 4e-7 * abs(wanted) + 1e-7


def test_nvfp4_of_modelopt_is_decoded(tmp_path):
    codes = torch.randint(0, 16, (6, 32), generator=RNG)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    scale = (torch.rand(6, 2, generator=RNG) * 8).to(torch.float8_e4m3fn)
    tensors = {
        "fc.weight": packed,
        "fc.weight_scale": scale,
        "fc.weight_scale_2": torch.tensor(0.125),
    }
    found = lq.read_layer_dump(save(tmp_path / "nv.safetensors", tensors))["fc"].weight
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for i in range(6):
        for j in range(32):
            code = int(codes[i, j])
            value = e2m1[code % 8] * (-1 if code > 7 else 1)
            assert found[i, j] == value * float(scale[i, j // 16]) * 0.125


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc.weight": CODES, "fc.weight_scale": torch.ones(3)}, "with a scale of shape (3,)"),
        (
            {"fc.weight": CODES, "fc.weight_scale": torch.ones(256, 7)},
            "with a scale of shape (256, 7)",
        ),
        (
            {
                "fc.weight": torch.zeros(4, 4, dtype=torch.uint8),
                "fc.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8),
            },
            "whose quantization state is damaged",
        ),
        ({"fc.weight": torch.zeros(4, 4, dtype=torch.int8)}, "weight has dtype int8; expected"),
    ],
)
def test_codes_without_their_scales_are_refused_in_one_line(tmp_path, tensors, message):
    dump = lq.read_layer_dump(save(tmp_path / "bad.safetensors", tensors))
    with pytest.raises(DumpError, match=re.escape(message)):
        dump["fc"]


class Coded:
    """What quantized tensors of torchao offer: a dtype that they pretend to, and their values."""

    dtype, shape = torch.bfloat16, (2, 2)

    def detach(self):
        return self

    def dequantize(self):
        return torch.tensor([[0.5, -1.0], [2.0, 0.0]], dtype=torch.bfloat16)


def test_a_tensor_that_says_what_it_stands_for_is_taken():
    assert lq.Layer(name="q", weight=Coded()).weight.tolist() == [[0.5, -1.0], [2.0, 0.0]]


class Wrapped:
    """Pickled as torch pickles a tensor class that is nothing but a wrapper, as torchao's are."""

    def __reduce__(self):
        return torch._utils._rebuild_wrapper_subclass, (torch.float32,)


def test_a_file_of_quantized_tensor_classes_says_how_to_save_their_values(tmp_path):
    path = save(tmp_path / "ao.pt", {"fc.weight": Wrapped()})
    with pytest.raises(DumpError, match=r"torchao, packed .*v\.dequantize\(\)") as caught:
        lq.read_layer_dump(path)["fc"]
    assert "\n" not in str(caught.value)


def test_a_folder_of_deepcompressor_is_no_checkpoint_of_the_model(tmp_path):
    """Its model.pt is W - L R, dequantized: as layers of a model they would be wrong weights."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    options = {"main": "int4/g64", "branch": "fp16", "rank": 4, "preset": "fast"}
    write_deepcompressor(tmp_path / "quantized", {"fc": lq.solve(weight, **options)})
    with pytest.raises(DumpError, match="quantized by deepcompressor.*--from deepcompressor"):
        lq.read_layer_dump(tmp_path / "quantized")
