"""Quantized models and stores a stranger could hand over: none is half-read."""

import json
import os
import sqlite3

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loraq_sim as lq
from loraq_sim.errors import InputError, StoreError
from loraq_sim.nunchaku import read_nunchaku
from loraq_sim.quantized_model import read_quantized_model, write_quantized_model
from loraq_sim.results.store import ResultStore


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    options = {"main": "int4/g4", "branch": "int8/g2", "rank": 2, "preset": "fast"}
    return write_quantized_model(path, {"fc": lq.solve(weight, **options)})


def _changed(model, tmp_path, change, drop=()):
    from safetensors import safe_open

    with safe_open(model, framework="numpy") as file:
        metadata = file.metadata()
    layers = json.loads(metadata["layers"])
    change(layers["fc"])
    tensors = {name: array for name, array in load_file(model).items() if name not in drop}
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata=metadata | {"layers": json.dumps(layers)})
    return read_quantized_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.update(weight_error="x"), "weight_error must be of type number"),
        (lambda layer: layer.update(weight_error=float("nan")), "weight_error must be of type"),
        (lambda layer: layer.update(seconds=10**400), "seconds must be of type number"),
        (lambda layer: layer.update(seed=True), "seed must be of type whole number"),
        (lambda layer: layer["parts"].pop("left"), "has one factor of a branch"),
        (lambda layer: layer["parts"]["main"].update(shape=[-4, -6]), "two positive sizes"),
        (lambda layer: layer["parts"]["main"].update(shape=[2**62, 0]), "two positive sizes"),
        (lambda layer: layer["parts"]["main"].update(shape=[4, 6, 1]), "two positive sizes"),
        (lambda layer: layer["parts"]["main"].update(shape=[2, 12]), "do not fit|bytes, got"),
    ],
)
def test_a_layer_that_does_not_fit_together_is_refused(change, message, model, tmp_path):
    with pytest.raises(InputError, match=message):
        _changed(model, tmp_path, change)["fc"]


def test_scales_that_are_no_numbers_are_refused(model, tmp_path):
    tensors = load_file(model)
    tensors["fc.main"] = np.full_like(tensors["fc.main"], 255)
    path = tmp_path / "nan.safetensors"
    from safetensors import safe_open

    with safe_open(model, framework="numpy") as file:
        save_file(tensors, path, metadata=file.metadata())
    with pytest.raises(InputError, match="NaN or Inf"):
        read_quantized_model(path)["fc"]


def test_nested_metadata_is_refused(tmp_path):
    metadata = {"format": "loraq-sim-quantized-v1", "layers": "[" * 100_000}
    save_file({"fc.main": np.zeros(1, np.uint8)}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="cannot be read"):
        read_quantized_model(tmp_path / "x.safetensors")


def test_pipes_and_impossible_names_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    readers = (
        (read_quantized_model, InputError),
        (read_nunchaku, InputError),
        (ResultStore.open, StoreError),
    )
    for read, error in readers:
        for name, message in (
            ("pipe", "not a regular file"),
            ("a\0b", "null"),
            ("x" * 300, "long"),
        ):
            with pytest.raises(error, match=message) as caught:
                read(tmp_path / name)
            assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET extra = '['",
        "UPDATE rows SET extra = '[1]'",
        "UPDATE rows SET extra = x'ff'",
        "UPDATE rows SET layer = x'00'",
        "UPDATE rows SET layer = CAST(x'ff' AS TEXT)",
        "UPDATE rows SET output_error = 'text'",
        "UPDATE runs SET provenance = '[1]'",
        "UPDATE runs SET provenance = 'x'",
    ],
)
def test_records_that_no_release_wrote_are_damage(statement, tmp_path):
    path = tmp_path / "store.sqlite"
    with ResultStore.open(path, create=True) as store:
        store.begin_run({"command": "sweep"}, ["a"])
        store.add("a", {"layer": "fc", "status": "ok"})
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()
    with ResultStore.open(path) as store, pytest.raises(StoreError) as caught:
        assert store.frame() is store.provenance()
    assert str(caught.value).isprintable()


def test_a_column_whose_type_is_no_text_is_damage(tmp_path):
    path = tmp_path / "store.sqlite"
    with ResultStore.open(path, create=True) as store:
        store.add("a", {"layer": "fc", "status": "ok"})
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    path.write_bytes(path.read_bytes().replace(b'"layer" TEXT', b'"layer" TEX\xff'))
    with pytest.raises(StoreError) as caught, ResultStore.open(path) as store:
        store.rows()
    assert str(caught.value).isprintable()
