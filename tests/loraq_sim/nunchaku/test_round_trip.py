"""Solved layers through the layouts of nunchaku and deepcompressor and back."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loraq_sim as lq
from loraq_sim.errors import InputError
from loraq_sim.nunchaku import (
    read_deepcompressor,
    read_nunchaku,
    write_deepcompressor,
    write_nunchaku,
)
from loraq_sim.quantized_model import read_quantized_model, write_quantized_model
from loraq_sim.solvers import solve_group

FORMATS = {"main": "int4/g64", "branch": "fp16", "rank": 8, "preset": "fast"}
QKV = [f"blocks.0.attn1.to_{part}" for part in "qkv"]


def weight(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32) * 0.05


@pytest.fixture(scope="module")
def solutions():
    shared = solve_group({name: weight(128, 192, i) for i, name in enumerate(QKV)}, **FORMATS)
    return {
        **shared,
        "blocks.0.attn1.to_out.0": lq.solve(weight(192, 128, 3), **FORMATS),
        "blocks.0.ff.net.2": lq.solve(weight(130, 320, 4), **(FORMATS | {"rank": 20})),
        "blocks.0.ff.net.0": lq.solve(weight(64, 64, 5), main="int4/g64", method="rtn"),
    }


def assert_same_parts(found, solutions):
    assert list(found) == list(solutions)
    for name, solution in solutions.items():
        for part in ("main", "left", "right"):
            expected, got = getattr(solution, part), getattr(found[name], part)
            assert (expected is None) == (got is None), (name, part)
            if expected is not None:
                assert str(got.format) == str(expected.format)
                np.testing.assert_array_equal(got.codes, expected.codes, err_msg=f"{name} {part}")
                np.testing.assert_array_equal(got.dequantize(), expected.dequantize())


def test_nunchaku_gives_back_every_bit(solutions, tmp_path):
    biases = {name: weight(1, s.main.shape[0])[0] for name, s in solutions.items()}
    path = write_nunchaku(tmp_path / "model.safetensors", solutions, biases=biases)
    found, found_biases = read_nunchaku(path)
    assert_same_parts(found, solutions)
    assert found[QKV[1]].method == solutions[QKV[1]].method
    assert found[QKV[1]].weight_error == solutions[QKV[1]].weight_error
    for name, bias in biases.items():
        np.testing.assert_array_equal(found_biases[name], bias.astype(np.float16))


def test_q_k_and_v_with_one_branch_become_one_layer_of_the_kernels(solutions, tmp_path):
    path = write_nunchaku(tmp_path / "model.safetensors", solutions)
    tensors = load_file(path)
    fused = "blocks.0.attn1.to_qkv"
    assert not any(key.startswith(QKV[0] + ".") for key in tensors)
    # 3 x 128 rows; K = 192 padded to 256; rank 8 to 16.
    assert tensors[f"{fused}.qweight"].shape == (384, 128)
    assert tensors[f"{fused}.wscales"].shape == (4, 384)
    assert tensors[f"{fused}.lora_down"].shape == (256, 16)
    assert tensors[f"{fused}.lora_up"].shape == (384, 16)
    found, _ = read_nunchaku(path)
    assert found[QKV[0]].right is found[QKV[2]].right
    assert [found[name].nbytes for name in QKV] == [solutions[name].nbytes for name in QKV]


def test_our_own_file_read_back_still_fuses(solutions, tmp_path):
    ours = write_quantized_model(tmp_path / "ours.safetensors", solutions)
    direct = write_nunchaku(tmp_path / "direct.safetensors", solutions)
    via_file = write_nunchaku(tmp_path / "via.safetensors", read_quantized_model(ours))
    ours_tensors, via_tensors = load_file(direct), load_file(via_file)
    assert ours_tensors.keys() == via_tensors.keys()
    for key, value in ours_tensors.items():
        np.testing.assert_array_equal(via_tensors[key], value)


def test_a_smoothed_branch_comes_back_within_two_roundings(tmp_path):
    w, rng = weight(128, 128), np.random.default_rng(1)
    factors = np.exp(rng.normal(0, 1, 128)).astype(np.float16).astype(np.float32)
    solution = lq.solve(w, smooth=factors, **FORMATS)
    found, _ = read_nunchaku(write_nunchaku(tmp_path / "model.safetensors", {"a": solution}))
    np.testing.assert_array_equal(found["a"].smooth, solution.smooth)
    np.testing.assert_array_equal(found["a"].main.codes, solution.main.codes)
    # R / s and its product with s are each rounded to 11 bits; below 2^-14 steps are 2^-24, and
    # those of R / s come back s times as large.
    exact = solution.right.dequantize()
    room = 2.0**-10 * np.abs(exact) + 2.0**-24 * (1 + factors)
    assert (np.abs(found["a"].right.dequantize() - exact) <= room).all()


def test_a_layer_of_the_kernels_computes_what_the_solution_does(tmp_path):
    """y = lora_up (lora_down^T x) + Q (x / smooth) + bias, from the packed tensors alone."""
    w, rng = weight(128, 128), np.random.default_rng(2)
    factors = np.exp(rng.normal(0, 0.5, 128)).astype(np.float16).astype(np.float32)
    solution = lq.solve(w, smooth=factors, **FORMATS)
    bias = rng.standard_normal(128).astype(np.float32)
    path = write_nunchaku(tmp_path / "model.safetensors", {"a": solution}, biases={"a": bias})
    found, biases = read_nunchaku(path)
    x = rng.standard_normal((5, 128)).astype(np.float32)
    got = x @ found["a"].reconstruct().T + biases["a"]
    expected = x @ solution.reconstruct().T + bias
    # Roundings of R and of the bias to 11 bits, against outputs of size one.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)


def test_a_file_of_another_program_is_read_with_its_padding(solutions, tmp_path):
    path = write_nunchaku(tmp_path / "model.safetensors", {"a": solutions["blocks.0.ff.net.2"]})
    save_file(load_file(path), tmp_path / "plain.safetensors")
    found, _ = read_nunchaku(tmp_path / "plain.safetensors")
    assert found["a"].main.shape == (256, 384)
    np.testing.assert_array_equal(found["a"].main.codes[130:], 0)


def test_deepcompressor_gives_back_every_bit(solutions, tmp_path):
    write_deepcompressor(tmp_path / "dc", solutions)
    found, _ = read_deepcompressor(tmp_path / "dc")
    assert_same_parts(found, solutions)
    assert found[QKV[0]].right is found[QKV[2]].right
    assert [found[name].nbytes for name in QKV] == [solutions[name].nbytes for name in QKV]


def test_deepcompressor_keys_are_those_its_converter_reads(solutions, tmp_path):
    import torch

    write_deepcompressor(tmp_path / "dc", solutions)
    branch = torch.load(tmp_path / "dc" / "branch.pt", weights_only=True)
    scale = torch.load(tmp_path / "dc" / "scale.pt", weights_only=True)
    assert branch[QKV[0]]["a.weight"].shape == (8, 192)
    assert branch[QKV[0]]["b.weight"].shape == (384, 8)
    assert QKV[1] not in branch
    assert scale[f"{QKV[1]}.weight.scale.0"].shape == (128, 1, 3, 1)


def test_scales_may_be_negative_and_zero(tmp_path):
    w = weight(128, 128)
    w[0, :64] = 0
    solution = lq.solve(w, **FORMATS)
    assert (solution.main.scales < 0).any()
    write_deepcompressor(tmp_path / "dc", {"a": solution})
    for found, _ in (
        read_deepcompressor(tmp_path / "dc"),
        read_nunchaku(write_nunchaku(tmp_path / "m.safetensors", {"a": solution})),
    ):
        np.testing.assert_array_equal(found["a"].reconstruct(), solution.reconstruct())


def test_what_the_kernels_cannot_run_is_refused(tmp_path):
    target = tmp_path / "model.safetensors"
    eight = lq.solve(weight(64, 64), main="int4/g64", branch="int8/g32", rank=4, preset="fast")
    with pytest.raises(InputError, match=r"layer 'a': the branch is int8/g32.*W16A16"):
        write_nunchaku(target, {"a": eight})
    wide = lq.solve(weight(64, 64), main="int8/g64", method="rtn")
    with pytest.raises(InputError, match=r"the main branch is int8/g64"):
        write_nunchaku(target, {"a": wide})
    turned = lq.solve(weight(64, 64), rotate="hadamard", **FORMATS)
    with pytest.raises(InputError, match=r"no rotation of the input \(block 64\)"):
        write_nunchaku(target, {"a": turned})
    short = lq.solve(weight(64, 96), main="int4/g64", method="rtn")
    with pytest.raises(InputError, match=r"K=96 is no multiple of 64"):
        write_deepcompressor(tmp_path / "dc", {"a": short})
    assert not target.exists()
    assert not (tmp_path / "dc").exists()


def test_nothing_is_replaced_unasked(solutions, tmp_path):
    target = tmp_path / "model.safetensors"
    write_nunchaku(target, solutions)
    with pytest.raises(InputError, match="is there already"):
        write_nunchaku(target, solutions)
    write_nunchaku(target, solutions, overwrite=True)
    write_deepcompressor(tmp_path / "dc", solutions)
    with pytest.raises(InputError, match="is there already"):
        write_deepcompressor(tmp_path / "dc", solutions)


@pytest.mark.parametrize("damage", ["shape", "dtype", "nan", "missing", "note", "members"])
def test_a_damaged_file_names_the_layer(damage, solutions, tmp_path):
    path = write_nunchaku(tmp_path / "m.safetensors", {"a.b": solutions["blocks.0.attn1.to_out.0"]})
    tensors, notes = load_file(path), {"a.b": {"members": {"a.b": 192}, "k": 128, "rank": 8,
                                               "facts": {}}}  # fmt: skip
    if damage == "shape":
        tensors["a.b.wscales"] = tensors["a.b.wscales"][:1]
    elif damage == "dtype":
        tensors["a.b.lora_up"] = tensors["a.b.lora_up"].astype(np.float32)
    elif damage == "nan":
        tensors["a.b.smooth"][3] = np.nan
    elif damage == "missing":
        del tensors["a.b.lora_up"]
    elif damage == "note":
        notes["a.b"] = {"members": 5}
    else:
        notes["a.b"]["members"] = {"a.b": 10**9}
    save_file(tensors, path, metadata={"loraq_sim": json.dumps(notes)})
    with pytest.raises(InputError, match=r"layer 'a\.b'"):
        read_nunchaku(path)


def test_other_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_nunchaku(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no such file"):
        read_deepcompressor(tmp_path)
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no layer in nunchaku's layout"):
        read_nunchaku(tmp_path / "x.safetensors")
    (tmp_path / "scale.pt").write_bytes(b"\x80\x02.")
    (tmp_path / "model.pt").write_bytes(b"PK not a zip")
    with pytest.raises(InputError, match=r"model\.pt"):
        read_deepcompressor(tmp_path)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def test_notes_that_hold_anything_end_in_one_line(solutions, tmp_path):
    path = write_nunchaku(tmp_path / "model.safetensors", solutions)
    with safe_open(path, framework="numpy") as file:
        told = file.metadata()["loraq_sim"]
    tensors, refused = load_file(path), []
    for place in places(json.loads(told)):
        for odd in (math.inf, -1, 2.5, "x", None, [], {}, 10**15):
            notes = json.loads(told)
            if place:
                inner = notes
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = odd
            else:
                notes = odd
            save_file(tensors, path, metadata={"loraq_sim": json.dumps(notes)})
            try:
                read_nunchaku(path)
            except InputError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert [text for text in refused if "\n" in text] == []


def test_8_bit_scales_that_do_not_fit_are_refused_in_one_line(solutions, tmp_path):
    path = write_nunchaku(tmp_path / "model.safetensors", solutions)
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(".wscales"))
    save_file(tensors | {name: np.ones((4, 8), ml_dtypes.float8_e4m3fn)}, path)
    with pytest.raises(InputError, match=r"wscales is float8_e4m3fn of shape \(4, 8\); expected"):
        read_nunchaku(path)


@pytest.mark.parametrize("names", [QKV, [f"blocks.0.attn.add_{part}_proj" for part in "qkv"]])
def test_q_k_and_v_are_rounded_up_each_on_its_own(names, tmp_path):
    """As nunchaku's loader allocates them: SANA's 3 x 2240 rows are 3 x 2304, not 6784."""
    shared = solve_group({name: weight(130, 128, i) for i, name in enumerate(names)}, **FORMATS)
    biases = {name: weight(1, 130, i)[0] for i, name in enumerate(names)}
    path = write_nunchaku(tmp_path / "model.safetensors", shared, biases=biases)
    fused = "blocks.0.attn1.to_qkv" if names is QKV else "blocks.0.attn.add_qkv_proj"
    tensors = load_file(path)
    assert {key.rpartition(".")[0] for key in tensors} == {fused}
    assert tensors[f"{fused}.qweight"].shape == (3 * 256, 64)
    assert tensors[f"{fused}.bias"].shape == (3 * 256,)
    # Each member alone, padded, is its third of the whole: tiles of 128 rows are consecutive.
    for index, name in enumerate(names):
        alone = write_nunchaku(tmp_path / f"{index}.safetensors", {name: shared[name]})
        third = slice(256 * index, 256 * (index + 1))
        single = load_file(alone)
        for key in ("qweight", "lora_up"):
            np.testing.assert_array_equal(
                tensors[f"{fused}.{key}"][third], single[f"{name}.{key}"], err_msg=key
            )
    found, found_biases = read_nunchaku(path)
    assert_same_parts(found, shared)
    for name in names:
        np.testing.assert_array_equal(found_biases[name], biases[name].astype(np.float16))


def test_a_file_that_is_padded_at_its_end_alone_is_still_read(solutions, tmp_path):
    """As versions before wrote it; the members here fill whole tiles, so only the note differs."""
    path = write_nunchaku(tmp_path / "model.safetensors", solutions)
    with safe_open(path, framework="numpy") as file:
        notes = json.loads(file.metadata()["loraq_sim"])
    for note in notes.values():
        del note["padded"]
    save_file(load_file(path), tmp_path / "old.safetensors", {"loraq_sim": json.dumps(notes)})
    found, _ = read_nunchaku(tmp_path / "old.safetensors")
    assert_same_parts(found, solutions)


def test_a_model_in_bfloat16_is_written_as_such_and_comes_back(tmp_path):
    formats = FORMATS | {"main": "int4/g64/bf16", "branch": "bf16"}
    solved = {"fc": lq.solve(weight(128, 128), **formats)}
    path = write_nunchaku(tmp_path / "model.safetensors", solved)
    with safe_open(path, framework="numpy") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"I8", "BF16"}  # noqa: SIM118
    found, _ = read_nunchaku(path)
    assert_same_parts(found, solved)
    with pytest.raises(InputError, match="the main branch is int4/g64/bf16"):
        write_deepcompressor(tmp_path / "deepcompressor", solved)
    mixed = {"fc": lq.solve(weight(128, 128), **(formats | {"branch": "fp16"}))}
    with pytest.raises(InputError, match="the branch is fp16 and the scales are bf16"):
        write_nunchaku(tmp_path / "mixed.safetensors", mixed)


def test_a_tensor_carried_along_may_not_be_one_of_a_layer(solutions, tmp_path):
    others = {"blocks.0.ff.net.0.bias": np.ones(3, np.float16)}
    with pytest.raises(InputError, match=r"'blocks.0.ff.net.0.bias' is a tensor of a quantized"):
        write_nunchaku(tmp_path / "model.safetensors", solutions, others=others)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_smoothing_that_nothing_can_be_divided_by_is_refused(solutions, tmp_path, factor):
    path = write_nunchaku(tmp_path / "model.safetensors", solutions)
    tensors = load_file(path)
    tensors["blocks.0.ff.net.0.smooth"][:] = factor
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"'blocks.0.ff.net.0': smooth must be positive"):
        read_nunchaku(path)
