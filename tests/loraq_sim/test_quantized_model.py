"""Quantized models read back bit for bit, and damaged ones are named."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraq_sim.errors import InputError
from loraq_sim.quantized_model import read_quantized_model, write_quantized_model
from loraq_sim.solvers import solve


@pytest.fixture(scope="module")
def solutions():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 70)).astype(np.float32)
    smooth = np.exp2(np.arange(70) % 3).astype(np.float32)
    formats = {
        "int": ("int4/g64", "int8/g64", None),
        "smooth": ("int4/g32", "int6/g32", smooth),
        "fp16 branch": ("int4/g64", "fp16", None),
        "mx": ("mxfp4", "mxfp8_e4m3", None),
        "nv": ("nvfp4", "mxint6", None),
        "plain": ("uint4/g16/bf16", None, None),
    }
    return {
        name: solve(
            weight,
            "svdquant",
            main=main,
            branch=branch,
            smooth=s,
            **({"rank": 5} if branch else {}),
        )
        for name, (main, branch, s) in formats.items()
    }


def test_every_layer_reads_back_bit_for_bit(solutions, tmp_path):
    path = write_quantized_model(tmp_path / "q.safetensors", solutions, meta={"model": "toy"})
    model = read_quantized_model(path)
    assert list(model) == list(solutions)
    assert model.meta == {"model": "toy"}
    for name, solution in solutions.items():
        back = model[name]
        np.testing.assert_array_equal(back.reconstruct(), solution.reconstruct())
        assert back.bytes_by_part == solution.bytes_by_part
        for fact in ("method", "preset", "seed", "weight_error", "seconds", "rank"):
            assert getattr(back, fact) == getattr(solution, fact)
        for part in ("main", "left", "right"):
            stored, again = getattr(solution, part), getattr(back, part)
            assert (stored is None) == (again is None)
            if stored is not None:
                assert stored.pack() == again.pack()


def test_the_tensors_take_exactly_the_counted_bytes(solutions, tmp_path):
    path = write_quantized_model(tmp_path / "q.safetensors", solutions)
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert len(raw) - 8 - header == sum(solution.nbytes for solution in solutions.values())


def test_an_existing_file_is_replaced_only_when_asked(solutions, tmp_path):
    path = write_quantized_model(tmp_path / "q.safetensors", solutions)
    with pytest.raises(InputError, match="is there already"):
        write_quantized_model(path, solutions)
    write_quantized_model(path, {"int": solutions["int"]}, overwrite=True)
    assert list(read_quantized_model(path)) == ["int"]
    with pytest.raises(InputError, match="no solved layer"):
        write_quantized_model(tmp_path / "none.safetensors", {})


def test_foreign_and_damaged_files_are_named(solutions, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_quantized_model(tmp_path / "missing")
    text = tmp_path / "text"
    text.write_text("hello")
    with pytest.raises(InputError, match="text"):
        read_quantized_model(text)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": np.zeros(3, dtype=np.float32)}, foreign)
    with pytest.raises(InputError, match="is not a quantized model of this program"):
        read_quantized_model(foreign)
    garbled = tmp_path / "garbled.safetensors"
    metadata = {"format": "loraq-sim-quantized-v1", "layers": "[1"}
    save_file({"a": np.zeros(3, dtype=np.float32)}, garbled, metadata=metadata)
    with pytest.raises(InputError, match="its list of layers cannot be read"):
        read_quantized_model(garbled)


def test_a_tensor_of_the_wrong_length_or_missing_is_named_with_its_layer(solutions, tmp_path):
    record = {"method": "rtn", "preset": "fast", "seed": 0, "weight_error": 0.1, "seconds": 0.0}
    record["parts"] = {"main": {"format": "int4/g64/fp16", "shape": [4, 64]}}
    metadata = {"format": "loraq-sim-quantized-v1", "layers": json.dumps({"a": record})}
    for name, message in (("a.main", r"layer 'a': .* takes 136 bytes, got 3"), ("b", "damaged")):
        path = tmp_path / f"{name}.safetensors"
        save_file({name: np.zeros(3, dtype=np.uint8)}, path, metadata=metadata)
        with pytest.raises(InputError, match=message):
            read_quantized_model(path)["a"]
