"""nunchaku files in NVFP4, with shifted inputs, and under the names of its files before 1.0."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch_file
from typer.testing import CliRunner

import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.errors import InputError
from loraq_sim.nunchaku import (
    read_deepcompressor,
    read_nunchaku,
    write_deepcompressor,
    write_nunchaku,
)
from loraq_sim.nunchaku.checkpoint import gelu_shifts
from loraq_sim.solvers import solve_group

ODD = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
}


def load_file(path):
    """Tensors of a file, bit for bit; safetensors has no 8-bit floats for NumPy."""
    found = {}
    for key, values in load_torch_file(path).items():
        bits, dtype = ODD.get(values.dtype, (None, None))
        found[key] = values.numpy() if bits is None else values.view(bits).numpy().view(dtype)
    return found


RNG = np.random.default_rng(11)
BLOCK = "transformer_blocks.0."
UP, DOWN = f"{BLOCK}ff.net.0.proj", f"{BLOCK}ff.net.2"
SHIFT = 0.171875
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def weight(n, k, scale=0.05):
    return RNG.standard_normal((n, k)).astype(np.float32) * np.float32(scale)


def solved(n, k, main="int4/g64", branch="fp16", **options):
    # What the codes are does not matter here: the quickest method with a branch.
    return lq.solve(weight(n, k), method="lqer", main=main, branch=branch, rank=4, **options)


@pytest.fixture(scope="module")
def feed_forward():
    inputs = np.abs(weight(32, 128, 1.0))
    down = solved(130, 128, activations=inputs, smooth=0.5)
    return {UP: solved(128, 64), DOWN: down}


BIAS = np.linspace(-1, 1, 130).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("branch", ["fp16", "bf16"])
def test_nvfp4_comes_back_with_its_codes_and_scales(tmp_path, branch):
    one = solved(130, 80, "nvfp4", branch)
    path = write_nunchaku(tmp_path / "n.safetensors", {"a.b": one}, biases={"a.b": BIAS})
    found, biases = read_nunchaku(path)
    main = found["a.b"].main
    assert str(main.format) == "nvfp4"
    np.testing.assert_array_equal(main.codes.astype(np.float32), one.main.codes.astype(np.float32))
    half = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[branch]
    unit = np.float32(half(one.main.tensor_scale))
    assert main.tensor_scale == unit
    micro = (one.main.scales / one.main.tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(main.scales, micro.astype(np.float32) * unit)
    np.testing.assert_allclose(biases["a.b"], BIAS, atol=2.0**-9)
    again = write_nunchaku(tmp_path / "again.safetensors", found, biases=biases)
    tensors = load_file(path)
    for key, values in load_file(again).items():
        np.testing.assert_array_equal(values.view(np.uint8), tensors[key].view(np.uint8))
    with safe_open(path, framework="numpy") as file:
        said = json.loads(file.metadata()["quantization_config"])
    assert said["weight"]["scale_dtype"] == [None, "fp8_e4m3_nan"]
    assert (said["activation"]["dtype"], said["activation"]["group_size"]) == ("fp4_e2m1_all", 16)


def test_nvfp4_stored_bytes_give_the_weight_by_the_layout_alone(tmp_path):
    """Codes, e4m3 scales and the scale of the tensor, found by index arithmetic."""
    one = solved(128, 128, "nvfp4", "bf16")
    stored = load_file(write_nunchaku(tmp_path / "n.safetensors", {"a": one}))
    nibbles = stored["a.qweight"].reshape(-1).view(np.uint8)
    scales = stored["a.wscales"].reshape(-1).astype(np.float32)
    unit = float(stored["a.wtscale"][0])
    expected = one.main.dequantize()
    for row, column in RNG.integers(0, 128, (200, 2)):
        tile = column // 64
        lane = row % 8 * 4 + column % 32 // 8
        half = row % 16 // 8 * 2 + column % 64 // 32
        place = ((tile * 8 + row // 16) * 32 + lane) * 32 + half * 8 + column % 8
        code = nibbles[place // 2] >> (4 * (place % 2)) & 15
        group = column // 16
        at = (group // 4 * 32 + row % 8 * 4 + row % 32 // 8) * 16 + row // 32 * 4 + group % 4
        value = E2M1[code] * scales[at] * unit
        # The unit is rounded to 8 bits.
        assert value == pytest.approx(expected[row, column], rel=2.0**-8)


def test_layers_in_one_keep_their_own_units_in_nvfp4(tmp_path):
    names = [f"{BLOCK}attn.to_{part}" for part in "qkv"]
    weights = {name: weight(130, 64, 10.0**-i) for i, name in enumerate(names)}
    trio = solve_group(weights, main="nvfp4", branch="bf16", rank=4, preset="fast")
    # As of layers that were quantized apart: each with a unit of its own.
    for i, name in enumerate(names):
        main = lq.quantize(weights[name] * np.float32(2.0**i), "nvfp4")
        trio[name] = dataclasses.replace(trio[name], main=main)
    assert len({float(one.main.tensor_scale) for one in trio.values()}) == 3
    path = write_nunchaku(tmp_path / "n.safetensors", trio)
    stored = load_file(path)
    assert set(stored) >= {f"{BLOCK}attn.to_qkv.wcscales"}
    rows = stored[f"{BLOCK}attn.to_qkv.wcscales"].astype(np.float32)
    # Runs of 16 hold 16 rows each: the last 7 of a member's 16 runs, and 6 rows of the ninth before
    # them, scale padding, and scale it by one.
    assert rows.shape == (3 * 256,)
    assert (rows.reshape(3, 16, 16)[:, 9:] == 1).all()
    assert ((rows.reshape(3, 16, 16) == 1).sum(axis=(1, 2)) == 256 - 130).all()
    found, _ = read_nunchaku(path)
    assert list(found) == names
    for name in names:
        np.testing.assert_allclose(
            found[name].main.dequantize(), trio[name].main.dequantize(), rtol=2.0**-8
        )


def test_rows_with_units_of_their_own_are_no_nvfp4_tensor(tmp_path):
    path = write_nunchaku(tmp_path / "n.safetensors", {"a": solved(128, 64, "nvfp4", "bf16")})
    tensors = load_file(path)
    unit = tensors.pop("a.wtscale")
    rows = np.repeat(unit, 128)
    rows[5] *= 2
    save_file(tensors | {"a.wcscales": rows}, tmp_path / "rows.safetensors")
    with pytest.raises(InputError, match="wcscales differ among the rows"):
        read_nunchaku(tmp_path / "rows.safetensors")


def test_a_unit_too_small_for_fp16_is_refused(tmp_path):
    tiny = lq.solve(weight(64, 64, 1e-5), method="lqer", main="nvfp4", branch="fp16", rank=2)
    with pytest.raises(InputError, match="too small for fp16; solve with a bf16 branch"):
        write_nunchaku(tmp_path / "n.safetensors", {"a": tiny})


def test_what_gelu_left_is_shifted_and_its_bias_takes_it_back(feed_forward, tmp_path):
    """The kernels compute Q ((x + shift) / smooth) + L R (x / smooth) + bias of the file."""
    assert gelu_shifts(feed_forward) == {DOWN: SHIFT}
    path = write_nunchaku(tmp_path / "n.safetensors", feed_forward, biases={DOWN: BIAS})
    plain = write_nunchaku(tmp_path / "p.safetensors", feed_forward, biases={DOWN: BIAS}, shifts={})
    solution = feed_forward[DOWN]
    x = np.abs(weight(5, 128, 1.0)).astype(np.float64)
    main, smooth = solution.main.dequantize().astype(np.float64), solution.smooth
    branch = solution.left.dequantize().astype(np.float64) @ solution.right.dequantize()
    exact = (x / smooth) @ (main + branch).T + BIAS
    by_name = {file: read_raw_bias(file) for file in (path, plain)}
    shifted = ((x + SHIFT) / smooth) @ main.T + (x / smooth) @ branch.T + by_name[path]
    # The bias, up to 20 here, is rounded to 11 bits.
    np.testing.assert_allclose(shifted, exact, atol=20 * 2.0**-11)
    np.testing.assert_array_equal(by_name[plain], BIAS)
    for file in (path, plain):
        _, biases = read_nunchaku(file)
        np.testing.assert_allclose(biases[DOWN], BIAS, atol=20 * 2.0**-11)


def read_raw_bias(path):
    """The bias of DOWN as a file has it: rows of 16, lanes of pairs."""
    stored = load_file(path)[f"{DOWN}.bias"].astype(np.float64)
    places = [r // 16 * 16 + r % 8 // 2 * 4 + r % 16 // 8 * 2 + r % 2 for r in range(130)]
    return stored[places]


def test_gated_and_float_layers_are_not_shifted(feed_forward):
    gated = {UP: solved(256, 64), DOWN: feed_forward[DOWN]}
    assert gelu_shifts(gated) == {}
    floats = {UP: solved(128, 64, "nvfp4"), DOWN: solved(64, 128, "nvfp4")}
    assert gelu_shifts(floats) == {}
    assert gelu_shifts({DOWN: feed_forward[DOWN]}) == {}


def test_deepcompressor_keeps_the_shift_beside_a_shifted_layer(feed_forward, tmp_path):
    layers = {UP: feed_forward[UP], DOWN: feed_forward[DOWN]}
    folder = write_deepcompressor(tmp_path / "d", layers, biases={DOWN: BIAS})
    model = torch.load(folder / "model.pt")
    assert float(model[f"{DOWN}.shift"]) == SHIFT
    whole = feed_forward[DOWN].reconstruct().astype(np.float64)
    expected = BIAS - whole.sum(axis=1) * SHIFT
    np.testing.assert_allclose(model[f"{DOWN}.linear.bias"].float(), expected, atol=20 * 2.0**-11)
    found, biases = read_deepcompressor(folder)
    assert list(found) == [UP, DOWN]
    np.testing.assert_allclose(biases[DOWN], BIAS, atol=20 * 2.0**-11)
    np.testing.assert_array_equal(found[DOWN].main.codes, feed_forward[DOWN].main.codes)


def test_deepcompressor_in_nvfp4_and_bf16_is_read(tmp_path):
    one = solved(64, 128, "nvfp4", "bf16")
    unit = np.float32(ml_dtypes.bfloat16(one.main.tensor_scale))
    micro = one.main.scales / one.main.tensor_scale
    values = one.main.codes.astype(np.float32) * np.repeat(micro * unit, 16, axis=1)

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()

    content = {
        "model": {"a.weight": tensor(values)},
        "scale": {
            "a.weight.scale.0": tensor(unit.reshape(1, 1, 1, 1)),
            "a.weight.scale.1": tensor(micro.reshape(64, 1, -1, 1)),
        },
        "smooth": {},
        "branch": {
            "a": {
                "a.weight": tensor(one.right.dequantize()),
                "b.weight": tensor(one.left.dequantize()),
            }
        },
    }
    for name, tensors in content.items():
        torch.save(tensors, tmp_path / f"{name}.pt")
    found = read_deepcompressor(tmp_path)[0]["a"]
    assert (str(found.main.format), str(found.right.format)) == ("nvfp4", "bf16")
    np.testing.assert_array_equal(
        found.main.codes.astype(np.float32), one.main.codes.astype(np.float32)
    )
    np.testing.assert_array_equal(found.left.dequantize(), one.left.dequantize())


OLDER = {
    "transformer_blocks.0.mlp_fc1": UP,
    "transformer_blocks.0.mlp_fc2": DOWN,
    "transformer_blocks.0.out_proj_context": f"{BLOCK}attn.to_add_out",
    "single_transformer_blocks.3.mlp_fc1": "single_transformer_blocks.3.proj_mlp",
    "single_transformer_blocks.3.out_proj": "single_transformer_blocks.3.proj_out.linears.0",
    "transformer_blocks.1.ff.inverted_conv": "transformer_blocks.1.ff.conv_inverted",
    "transformer_blocks.1.cross_attn.q_linear": "transformer_blocks.1.attn2.to_q",
    "elsewhere.mlp_fc1": "elsewhere.mlp_fc1",
}


def test_older_names_are_those_of_diffusers(tmp_path):
    one = solved(128, 128)
    path = write_nunchaku(tmp_path / "n.safetensors", dict.fromkeys(OLDER, one), shifts={})
    save_file(load_file(path), tmp_path / "older.safetensors")
    found, biases = read_nunchaku(tmp_path / "older.safetensors")
    assert set(found) == set(OLDER.values())
    # Kernels of FLUX shift what its GELU left: such a file has a bias that takes it back.
    moved = one.main.dequantize().astype(np.float64).sum(axis=1) * SHIFT
    np.testing.assert_allclose(biases[DOWN], moved, rtol=1e-6)
    assert not biases[UP].any()


@pytest.mark.parametrize("fused", ["qkv_proj", "attn.to_qkv", "qkv_proj_context", "attn.qkv_proj"])
def test_q_k_and_v_of_a_file_without_notes_are_thirds(tmp_path, fused):
    weights = {f"{BLOCK}attn.to_{part}": weight(128, 128) for part in "qkv"}
    trio = solve_group(weights, main="int4/g64", branch="fp16", rank=4, preset="fast")
    path = write_nunchaku(tmp_path / "n.safetensors", trio)
    tensors = {key.replace("attn.to_qkv", fused): values for key, values in load_file(path).items()}
    save_file(tensors, tmp_path / "older.safetensors")
    found, _ = read_nunchaku(tmp_path / "older.safetensors")
    home = "attn1" if fused == "attn.qkv_proj" else "attn"
    parts = [f"add_{x}_proj" if "context" in fused else f"to_{x}" for x in "qkv"]
    assert list(found) == [f"{BLOCK}{home}.{part}" for part in parts]
    for ours, theirs in zip(trio.values(), found.values(), strict=True):
        np.testing.assert_array_equal(ours.main.codes, theirs.main.codes)
        # The rank is filled up to 16.
        left = theirs.left.dequantize()
        np.testing.assert_array_equal(ours.left.dequantize(), left[:, :4])
        assert not left[:, 4:].any()


def test_the_command_says_which_inputs_are_shifted(feed_forward, tmp_path):
    lq.write_quantized_model(tmp_path / "q.safetensors", feed_forward)
    words = ["model", "convert", str(tmp_path / "q.safetensors"), str(tmp_path / "n.safetensors")]
    done = CliRunner().invoke(app, [*words, "--to", "nunchaku"])
    assert done.exit_code == 0, done.output
    assert "inputs behind GELU are shifted by 0.171875 in 1 layer" in done.stderr
    done = CliRunner().invoke(app, [*words, "--to", "nunchaku", "--no-gelu-shift", "--force"])
    assert "shifted" not in done.stderr


@pytest.mark.parametrize("layout", ["nunchaku", "deepcompressor"])
def test_a_published_model_is_a_dump_of_its_weights_and_a_point_of_its_own(layout, tmp_path):
    weights = {UP: weight(128, 128), f"{BLOCK}attn.to_out.0": weight(128, 128)}
    options = {"main": "int4/g64", "branch": "fp16", "rank": 16, "preset": "fast"}
    solved_layers = {name: lq.solve(values, **options) for name, values in weights.items()}
    if layout == "nunchaku":
        file = write_nunchaku(tmp_path / "n.safetensors", solved_layers)
    else:
        file = write_deepcompressor(tmp_path / "d", solved_layers)
    with pytest.raises(InputError, match=f"quantized .*{layout}.*--from {layout}"):
        lq.read_layer_dump(file)
    target = tmp_path / "layers.safetensors"
    words = ["model", "convert", str(file), str(target), "--from", layout, "--to", "layers"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    dump = lq.read_layer_dump(target)
    for name, solution in solved_layers.items():
        exact = solution.reconstruct().astype(ml_dtypes.bfloat16).astype(np.float32)
        # deepcompressor's fp16 weights give the codes back, and so the same values.
        np.testing.assert_array_equal(dump[name].weight, exact)
    x = weight(16, 128, 1.0)
    layers = [lq.Layer(name=name, weight=values, activations=x) for name, values in weights.items()]
    path = lq.write_layer_dump(tmp_path / "dump.npz", layers)
    words = ["emulate", "--hw", "aie2", "--layer-dump", str(path), "--quantized", str(file)]
    words += ["--layout", layout, "--split", "W4A4+W16A16r16", "--format", "json", "--quiet"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    for row, layer in zip(rows, layers, strict=True):
        solution = solved_layers[layer.name]
        expected = lq.evaluate_layer(layer, "W4A4+W16A16r16", "aie2", solution=solution)
        assert row["output_error"] == expected["output_error"]
    done = CliRunner().invoke(app, [*words[:-3], "--split", "W4A4", "--quiet"])
    assert "the solution has a branch" in done.output
