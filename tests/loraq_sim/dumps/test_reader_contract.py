"""One contract for the readers of all layouts; the files are written by their own libraries."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from loraq_sim.dumps import LayerDump, read_layer_dump
from loraq_sim.errors import DumpError

RNG = np.random.default_rng(11)
X = RNG.standard_normal((7, 6)).astype(np.float16)
TENSORS = {
    "b.q": {"weight": RNG.standard_normal((4, 6)), "bias": RNG.standard_normal(4)},
    "b.k": {"weight": RNG.standard_normal((5, 6))},
    "a.up": {"weight": RNG.standard_normal((3, 8)), "bias": RNG.standard_normal(3)},
}
TENSORS = {
    name: {key: values.astype(np.float16) for key, values in parts.items()}
    for name, parts in TENSORS.items()
}
RECORDS = {
    "b.q": {"kind": "self_q", "group": "b", "rows_per_call": 64, "activations": "b.q.activations"},
    "b.k": {"kind": "self_k", "group": "b", "rows_per_call": 64, "activations": "b.q.activations"},
    "a.up": {"kind": "ffn_up", "calls_per_step": 2},
}
FLAT = {f"{name}.{key}": v for name, parts in TENSORS.items() for key, v in parts.items()}


def torch_entries():
    shared = torch.from_numpy(X.copy())
    return {
        name: {key: torch.from_numpy(v.copy()) for key, v in parts.items()}
        | {key: v for key, v in RECORDS[name].items() if key != "activations"}
        | ({"activations": shared} if "activations" in RECORDS[name] else {})
        for name, parts in TENSORS.items()
    }


def write_torch(path, **how):
    content = {"format": "layer-dump-v0", "meta": {"model": "toy"}, "layers": torch_entries()}
    torch.save(content, path, **how)


def write_npz(path, save=np.savez):
    record = {"format": "layer-dump-v0", "meta": {"model": "toy"}, "layers": RECORDS}
    save(path, **FLAT, **{"b.q.activations": X, "__metadata__": np.array(json.dumps(record))})


def write_safetensors(path):
    metadata = {
        "format": "layer-dump-v0",
        "meta": json.dumps({"model": "toy"}),
        "layers": json.dumps(RECORDS),
    }
    save_file(FLAT | {"b.q.activations": X}, path, metadata=metadata)


# Suffix, writer, and whether the layout says kinds, calls and inputs besides the weights.
LAYOUTS = {
    "torch": (".pt", write_torch, True),
    "torch-legacy": (
        ".pt",
        lambda path: write_torch(path, _use_new_zipfile_serialization=False),
        True,
    ),
    "torch-entries": (".pt", lambda path: torch.save(torch_entries(), path), True),
    "torch-state-dict": (
        ".pt",
        lambda path: torch.save({k: torch.from_numpy(v.copy()) for k, v in FLAT.items()}, path),
        False,
    ),
    "npz": (".npz", write_npz, True),
    "npz-compressed": (".npz", lambda path: write_npz(path, np.savez_compressed), True),
    "npz-plain": (".npz", lambda path: np.savez(path, **FLAT), False),
    "safetensors": (".safetensors", write_safetensors, True),
    "safetensors-checkpoint": (".safetensors", lambda path: save_file(FLAT, path), False),
}


@pytest.fixture(params=LAYOUTS)
def written(request, tmp_path):
    suffix, write, is_full = LAYOUTS[request.param]
    path = tmp_path / f"dump{suffix}"
    write(path)
    return path, is_full


def test_every_layout_gives_the_stored_layers(written):
    path, is_full = written
    before = path.read_bytes()
    dump = read_layer_dump(path)
    assert set(dump) == set(TENSORS)
    assert len(dump) == 3
    if is_full:
        assert list(dump) == list(TENSORS)
    for name, parts in TENSORS.items():
        layer, info = dump[name], dump.info(name)
        for key in ("weight", "bias"):
            expected = parts.get(key)
            found = getattr(layer, key)
            assert (found is None) == (expected is None)
            if expected is not None:
                assert found.dtype == np.float32
                assert found.flags.c_contiguous
                np.testing.assert_array_equal(found, expected.astype(np.float32))
        assert (info.n, info.k) == parts["weight"].shape
        assert info.nbytes == sum(values.nbytes for values in parts.values())
        assert (info.dtype, info.has_bias) == ("float16", "bias" in parts)
        has_inputs = is_full and name != "a.up"
        assert info.tokens == (7 if has_inputs else None)
        assert (layer.activations is not None) == has_inputs
        if has_inputs:
            np.testing.assert_array_equal(layer.activations, X.astype(np.float32))
        if is_full:
            record = RECORDS[name]
            assert (layer.kind, info.kind) == (record["kind"], record["kind"])
            assert layer.group == record.get("group", "")
            assert layer.rows_per_call == record.get("rows_per_call")
            assert layer.calls_per_step == record.get("calls_per_step", 1)
    assert path.read_bytes() == before


def test_every_layout_keeps_the_promises_of_a_mapping(written):
    path, is_full = written
    dump = read_layer_dump(path)
    if is_full:
        # One stored input, read once while it is in use.
        q, k = dump["b.q"], dump["b.k"]
        assert q.activations is k.activations
        assert dump.info("b.q").activation_key == dump.info("b.k").activation_key
    chosen = dump.select("b.*")
    assert set(chosen) == {"b.q", "b.k"}
    assert isinstance(chosen, LayerDump)
    again = pickle.loads(pickle.dumps(chosen))
    assert list(again) == list(chosen)
    np.testing.assert_array_equal(again["b.k"].weight, dump["b.k"].weight)
    assert dump.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert dump.get("c") is None
    with pytest.raises(DumpError, match=r"no layer 'b\.w' among its 3 layers; did you mean"):
        dump["b.w"]


def read_all(path):
    return dict(read_layer_dump(path))


def test_every_layout_says_in_one_line_that_it_was_cut_or_changed(written):
    path, _ = written
    content = path.read_bytes()
    dump = read_layer_dump(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(DumpError, match="changed or removed since it was opened"):
        dump["a.up"]
    for keep in (len(content) // 3, len(content) - 40):
        path.write_bytes(content[:keep])
        with pytest.raises(DumpError) as caught:
            read_all(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
