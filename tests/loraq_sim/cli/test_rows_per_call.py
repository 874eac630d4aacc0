"""Rows per call (M) at the commands: given, told by a model, or not known and said so."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import hwmodels
from loraq_sim.machine import cost_split
from loraq_sim.split import parse_split

UP, KEY = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.attn2.to_k"
COSTS = ("latency_s", "cycles", "energy_j", "dram_bytes", "utilization", "bound")


@pytest.fixture
def weights(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "plain.safetensors"
    shapes = {UP: (96, 64), KEY: (64, 64)}
    tensors = {f"{name}.weight": rng.normal(size=s).astype("f4") for name, s in shapes.items()}
    save_file(tensors, path)
    return path


@pytest.fixture
def swept(command, weights, tmp_path):
    """Rows by layer of a sweep in one split, and what it said."""

    def sweep(*words, split="W4A4"):
        result = command(
            *("sweep", "--hw", "a100", "--layer-dump", weights, "--split", split, "--preset"),
            *("fast", "--jobs", 0, "--out", tmp_path / "out", "--format", "json", *words),
        )
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        return {row["layer"]: row for row in found["rows"]}, found, result.stderr

    return sweep


def latency(m, n, k):
    _, cost = cost_split(m, n, k, parse_split("W4A4"), hwmodels.load_accelerator("a100"))
    return cost.latency_s


def test_without_rows_there_is_no_cost_and_weight_errors_rank(swept):
    rows, found, said = swept(split="W4A4,W8A8,W4A8")
    for row in found["rows"]:
        assert (row["m"], *(row[name] for name in COSTS)) == (None,) * 7
        assert "rows per call not known" in row["message"]
    assert "rows per call (M) are not known for 2 of 2 layers" in said
    assert "give --rows M" in said
    # Activations do not enter a weight error: W4A4 and W4A8 are one point.
    front = {(row["split"], row["weight_error"] > 0) for row in found["front"]}
    assert front == {("W4A4", True), ("W4A8", True), ("W8A8", True)}
    assert all(row["pareto"] for row in found["rows"])


def test_the_table_of_a_weights_only_sweep_shows_weight_errors(command, weights, tmp_path):
    result = command(
        *("sweep", "--hw", "a100", "--layer-dump", weights, "--split", "W4A4,W8A8"),
        *("--jobs", 0, "--out", tmp_path / "out"),
    )
    told = " ".join(result.stdout.split())
    assert told.startswith("Pareto front of weight error and weight memory")
    assert "output error not known" in told


def test_given_rows_are_those_of_the_cost(swept):
    rows, _, said = swept("--rows", 4096, "--rows", "cross_*=600")
    assert (rows[UP]["m"], rows[UP]["m_source"], rows[KEY]["m"]) == (4096, "given", 600)
    assert rows[UP]["latency_s"] == latency(4096, 96, 64)
    assert rows[KEY]["latency_s"] == latency(600, 64, 64)
    assert "rows per call" not in said


def test_some_rows_are_enough_for_some_layers(swept):
    rows, _, said = swept("--rows", f"{KEY}=600")
    assert (rows[UP]["latency_s"], rows[KEY]["m"]) == (None, 600)
    assert "not known for 1 of 2 layers, such as " + UP in said


def test_a_named_model_gives_the_rows_and_its_samples(swept):
    rows, _, said = swept("--model", "pixart-sigma", "--resolution", 512, "--rows", "cross_k=77")
    source = "pixart-sigma at 512 px, 2 samples per call (guidance included)"
    assert (rows[UP]["m"], rows[UP]["m_source"]) == (2048, source)
    assert (rows[KEY]["m"], rows[KEY]["m_source"]) == (77, "given")
    assert source in said


def test_a_config_beside_the_checkpoint_gives_the_rows(swept, weights):
    facts = {"_class_name": "PixArtTransformer2DModel", "patch_size": 2, "sample_size": 64}
    (weights.parent / "config.json").write_text(json.dumps(facts))
    rows, _, said = swept()
    assert (rows[UP]["m"], rows[KEY]["m"]) == (2048, 600)
    assert "2 samples per call" in rows[UP]["m_source"]
    facts["sample_size"] = 128
    (weights.parent / "config.json").write_text(json.dumps(facts))
    rows, _, _ = swept()
    assert (rows[UP]["m"], rows[KEY]["m"]) == (8192, 600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", "many"), "rows 'many' must be a whole number from 1, or PATTERN=NUMBER"),
        (("--rows", "0"), "rows '0' must be a whole number"),
        (("--rows", "cros_k=5"), "rows: 'cros_k' matches none of the layers; nearest: cross_k"),
        (("--model", "pixart"), "unknown model 'pixart'"),
        (("--model", "pixart-sigma", "--resolution", 256), "resolution must be 512 or 1024"),
    ],
)
def test_wrong_rows_are_refused(command, weights, tmp_path, words, message):
    sweep = ("sweep", "--hw", "a100", "--layer-dump", weights, "--out", tmp_path / "out")
    result = command(*sweep, *words)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_plan_file_names_rows_and_models(command, weights, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'dump = "{weights.name}"\nhw = "a100"\nsplits = "W4A4"\nmodel = "pixart-sigma"\n'
        'rows = ["ffn_*=10", "cross_k=20"]\n'
    )
    words = ("sweep", "--plan", plan, "--jobs", 0, "--format", "json")
    for more, expected in [((), {10, 20}), (("--rows", 30), {30}), (("--set", "rows=7"), {7})]:
        result = command(*words, *more, "--out", tmp_path / f"out{len(more)}{expected}")
        assert {row["m"] for row in json.loads(result.stdout)["rows"]} == expected


def test_cost_of_a_checkpoint_needs_its_rows(command, weights):
    words = ("cost", "--hw", "a100", "--layer-dump", weights, "--split", "W4A4", "--format", "json")
    result = command(*words)
    assert result.exit_code == 2
    assert "rows per call (M) are not known for 2 of 2 layers" in result.stderr
    found = json.loads(command(*words, "--rows", f"{UP}=4096").stdout)
    (row,) = found["rows"] if isinstance(found, dict) else found
    assert (row["m"], row["latency_s"]) == (4096, latency(4096, 96, 64))


def test_explain_of_a_weight_alone_has_costs_only_with_rows(command, weights):
    words = ("explain", "--hw", "a100", "--layer-dump", weights, "--layer", UP, "--split", "W4A4")
    silent = command(*words, "--format", "json")
    assert json.loads(silent.stdout)["costs"] == []
    assert "rows per call not known" in silent.stderr
    table = command(*words)
    assert table.exit_code == 0, table.output
    told = json.loads(command(*words, "--rows", 4096, "--format", "json").stdout)
    assert told["case"]["latency_s"] == latency(4096, 96, 64)
    assert told["costs"]


def test_emulate_needs_activations_and_says_so(command, weights):
    result = command("emulate", "--hw", "aie2", "--layer-dump", weights)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "holds no activations, so there is nothing to emulate" in result.stderr


def test_a_report_of_weights_alone_blames_no_description(swept, command, tmp_path):
    swept(split="W4A4,W8A8")
    page = tmp_path / "report.html"
    result = command("report", tmp_path / "out", "--out", page)
    assert result.exit_code == 0, result.output
    files = [page] if page.is_file() else list(page.rglob("*.html"))
    assert files
    assert not any("has changed since the sweep" in file.read_text() for file in files)


def test_a_batch_multiplies_all_rows_and_says_so(swept):
    rows, _, said = swept("--model", "pixart-sigma", "--rows", "cross_k=77", "--batch", 3)
    assert (rows[UP]["m"], rows[KEY]["m"]) == (3 * 8192, 3 * 77)
    source = "pixart-sigma at 1024 px, 2 samples per call (guidance included), 3 images"
    assert (rows[UP]["m_source"], rows[KEY]["m_source"]) == (source, "given, 3 images")
    assert source in said
    assert rows[KEY]["latency_s"] == latency(231, 64, 64)


@pytest.mark.parametrize(
    ("model", "edge", "rows"),
    [("FluxTransformer2DModel", 1024, 4096), ("QwenImageTransformer2DModel", 512, 1024)],
)
def test_a_resolution_alone_is_that_of_the_model_in_the_config(swept, weights, model, edge, rows):
    (weights.parent / "config.json").write_text(json.dumps({"_class_name": model}))
    found, _, said = swept("--resolution", edge)
    # FLUX has no cross attention: nothing is said of its keys.
    assert (found[UP]["m"], found[KEY]["m"]) == (rows, None)
    assert f"at {edge} px" in said


def test_a_resolution_without_a_known_model_is_refused(command, weights, tmp_path):
    sweep = ("sweep", "--hw", "a100", "--layer-dump", weights, "--out", tmp_path / "out")
    result = command(*sweep, "--resolution", 512)
    assert result.exit_code == 2
    assert "config.json is not there to name one of" in result.stderr
    assert "give --model or --rows" in result.stderr
    (weights.parent / "config.json").write_text('{"_class_name": "Other"}')
    assert "names no known class of models" in command(*sweep, "--resolution", 512).stderr


def test_a_config_without_an_image_size_asks_for_the_resolution_alone(command, weights, tmp_path):
    (weights.parent / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    sweep = ("sweep", "--hw", "a100", "--layer-dump", weights, "--out", tmp_path / "out")
    result = command(*sweep, "--dry-run")
    assert "config.json beside it is of flux.1-dev: --resolution PIXELS is enough" in result.stderr


def test_rows_of_a_unet_follow_its_sample_size(command, tmp_path):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = np.ones((64, 64), "f4")
    save_file({f"{name}.weight": weight}, tmp_path / "unet.safetensors")
    facts = {"_class_name": "UNet2DConditionModel", "sample_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    words = ("dump", "info", tmp_path / "unet.safetensors", "--no-statistics", "--format", "json")
    (row,) = json.loads(command(*words).stdout)["rows"]
    # Two samples of 64 x 64, halved once.
    assert row["rows_per_call"] == 2 * 32 * 32


def test_the_share_of_multiply_adds_left_out_is_said(command, tmp_path):
    shapes = {"ff.conv_depth": (5760, 1, 3, 3), "ff.conv_point": (8, 8), "attn1.to_q": (8, 8)}
    tensors = {
        f"transformer_blocks.0.{name}.weight": np.ones(shape, "f4")
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "sana.safetensors")
    facts = {"_class_name": "SanaTransformer2DModel", "patch_size": 1, "sample_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    result = command("dump", "info", tmp_path / "sana.safetensors", "--no-statistics")
    # Per token; all three layers have the rows of the image.
    share = 100 * 9 * 5760 / (9 * 5760 + 64 + 64)
    assert f"that is {share:.2g} % of the multiply-adds" in result.stderr
