from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.dumps.write import convert_dump, write_layer_dump
from loraq_sim.errors import DumpError
from loraq_sim.layers import Layer

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny_pixart.pt"
SUFFIXES = [".pt", ".safetensors", ".npz"]


def small_dump(path, dtype="float32"):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 5))
    layers = [
        Layer(name="q", weight=rng.standard_normal((4, 5)), bias=np.ones(4), activations=x),
        Layer(name="k", weight=rng.standard_normal((3, 5)), activations=x, kind="self_k"),
        Layer(name="o", weight=rng.standard_normal((2, 7)), rows_per_call=9, calls_per_step=2),
    ]
    return write_layer_dump(path, layers, meta={"model": "toy"}, dtype=dtype)


def assert_same_content(path, expected_path):
    dump, expected = read_layer_dump(path), read_layer_dump(expected_path)
    assert list(dump) == list(expected)
    assert dump.meta == expected.meta
    for name in expected:
        assert dump[name].digest() == expected[name].digest()
        assert dump[name].group == expected[name].group


@pytest.mark.parametrize("middle", SUFFIXES)
@pytest.mark.parametrize("end", SUFFIXES)
def test_a_round_trip_over_two_formats_keeps_every_value(tmp_path, middle, end):
    first = convert_dump(EXAMPLE, tmp_path / f"first{middle}")
    second = convert_dump(first, tmp_path / f"second{end}")
    assert_same_content(second, EXAMPLE)
    dtypes = {read_layer_dump(second).info(name).dtype for name in read_layer_dump(second)}
    assert dtypes == {"float16"}


@pytest.mark.parametrize("end", SUFFIXES)
def test_bfloat16_values_survive_every_format(tmp_path, end):
    source = small_dump(tmp_path / "a.safetensors", dtype="bfloat16")
    back = convert_dump(convert_dump(source, tmp_path / f"b{end}"), tmp_path / "c.pt")
    assert_same_content(back, source)
    stored = read_layer_dump(back).info("q").dtype
    assert stored == ("float32" if end == ".npz" else "bfloat16")


def test_a_storage_dtype_rounds_once(tmp_path):
    source = small_dump(tmp_path / "a.safetensors")
    path = convert_dump(source, tmp_path / "b.npz", dtype="float16")
    expected = read_layer_dump(source)["q"].weight.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(read_layer_dump(path)["q"].weight, expected)


def test_patterns_choose_layers_and_each_is_reported(tmp_path):
    source = small_dump(tmp_path / "a.safetensors")
    seen = []
    path = convert_dump(source, tmp_path / "b.npz", patterns=["self_k", "o"], on_layer=seen.append)
    assert list(read_layer_dump(path)) == seen == ["k", "o"]
    with pytest.raises(DumpError, match="pattern 'x\\*' matches no layer"):
        convert_dump(source, tmp_path / "c.npz", patterns=["x*"])


def test_the_folder_of_the_target_is_made(tmp_path):
    source = small_dump(tmp_path / "a.safetensors")
    assert convert_dump(source, tmp_path / "new" / "folder" / "b.npz").is_file()
    with pytest.raises(DumpError, match="cannot make this folder"):
        convert_dump(source, source / "b.npz")


def test_nothing_is_replaced_unasked_and_never_the_source(tmp_path):
    source = small_dump(tmp_path / "a.safetensors")
    before = source.read_bytes()
    with pytest.raises(DumpError, match="is the file to convert"):
        convert_dump(source, tmp_path / "." / "a.safetensors", dtype="float16", overwrite=True)
    target = convert_dump(source, tmp_path / "b.npz")
    with pytest.raises(DumpError, match="is there already"):
        convert_dump(source, target)
    convert_dump(source, target, overwrite=True)
    assert source.read_bytes() == before
