"""Checkpoints as they ship, from the command to the row."""

import importlib
import json

import torch
from safetensors.torch import save_file

from loraq_sim.dumps.kinds import load_inventory
from loraq_sim.dumps.layer_dump import read_layer_dump

NAMES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2", "proj_out")


def save_shards(folder):
    where = {}
    folder.mkdir()
    for i, name in enumerate(NAMES):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        rng = torch.Generator().manual_seed(i)
        weight = torch.randn(64, 64, generator=rng).bfloat16()
        save_file({f"{name}.weight": weight}, folder / file)
        where[f"{name}.weight"] = file
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def test_a_folder_is_swept_and_its_rows_say_where_they_come_from(command, tmp_path):
    save_shards(tmp_path / "pixart")
    config = {"_class_name": "PixArtTransformer2DModel", "patch_size": 2, "sample_size": 8}
    (tmp_path / "pixart" / "config.json").write_text(json.dumps(config))
    result = command(
        *("sweep", "--hw", "aie2", "--layer-dump", tmp_path / "pixart", "--split", "W8A8"),
        *("--preset", "fast", "--jobs", "0", "--format", "json", "--out", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["layer"]: row["m"] for row in rows} == dict.fromkeys(NAMES, 32)


def test_a_dry_run_reads_headers_alone(command, tmp_path):
    """As of a 12 B model: files of the right size whose values were never written."""
    folder, n = tmp_path / "huge", 2**16
    folder.mkdir()
    name = "transformer_blocks.0.ff.net.2"
    entry = {"dtype": "BF16", "shape": [n, n], "data_offsets": [0, 2 * n * n]}
    header = json.dumps({f"{name}.weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * n * n)
    words = ("sweep", "--hw", "aie2", "--layer-dump", folder, "--split", "W4A4", "--rows", "64")
    result = command(*words, "--dry-run", "--format", "json", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["layers"], row["cases"], row["already_there"]) == (1, 1, 0)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_still_counts_what_a_folder_has(command, tmp_path):
    save_shards(tmp_path / "pixart")
    words = ("sweep", "--hw", "aie2", "--layer-dump", tmp_path / "pixart", "--split", "W8A8")
    words += ("--rows", "16", "--preset", "fast", "--format", "json", "--out", tmp_path / "run")
    assert command(*words, "--layers", NAMES[0], "--jobs", "0").exit_code == 0
    result = command(*words, "--dry-run")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["cases"], row["already_there"], row["to_run"]) == (3, 1, 2)


def test_the_benchmarks_folder_is_the_model_that_its_inventory_says(monkeypatch, request, tmp_path):
    monkeypatch.syspath_prepend(request.config.rootpath / "benchmarks")
    folder = tmp_path / "sana"
    importlib.import_module("checkpoint_sweep").write_folder("sana-0.6b", folder, headers_only=True)
    dump = read_layer_dump(folder)
    found = {name: (dump.info(name).n, dump.info(name).k, dump.info(name).kind) for name in dump}
    layers = [layer for layer in load_inventory("sana-0.6b").layers if layer.is_gemm]
    assert found == {layer.name: (layer.n, layer.k, layer.kind) for layer in layers}
    # Twenty-eight depthwise convolutions of 5760 x 9.
    assert "28 tensors with 0.246 % of the weights" in dump.left_out
