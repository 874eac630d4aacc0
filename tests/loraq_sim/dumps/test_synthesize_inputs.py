"""Inputs drawn on a checkpoint's own weights: their statistics, and that they are called synthetic.

Expectations are those of the published and measured statistics, computed from the drawn values.
"""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.dumps import write_layer_dump
from loraq_sim.dumps.kinds import kinds_of, list_models, load_inventory
from loraq_sim.dumps.stored_weights import groups_of
from loraq_sim.errors import InputError
from loraq_sim.sweeps.digests import layer_digests

K = 512
BLOCK = "transformer_blocks.0"
NAMES = {
    f"{BLOCK}.attn1.to_q": (K, K),
    f"{BLOCK}.attn1.to_k": (K, K),
    f"{BLOCK}.attn1.to_v": (K, K),
    f"{BLOCK}.attn1.to_out.0": (K, K),
    f"{BLOCK}.attn2.to_q": (K, K),
    f"{BLOCK}.ff.net.0.proj": (4 * K, K),
    f"{BLOCK}.ff.net.2": (K, 4 * K),
    "proj_out": (32, K),
}


def save(path, names, *, loud=True):
    """A plain checkpoint; columns of its weights differ in size where `loud`."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (n, k) in names.items():
        columns = np.exp(0.15 * rng.standard_normal(k)) if loud else 1.0
        tensors[f"{name}.weight"] = (rng.standard_normal((n, k)) * columns).astype(np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("plain") / "model.safetensors", NAMES)


@pytest.fixture(scope="module")
def drawn(checkpoint):
    dump = lq.read_layer_dump(checkpoint, synthesize_inputs=True)
    return {name.removeprefix(f"{BLOCK}."): dump[name] for name in dump}


def rms(rows):
    return np.sqrt(np.square(rows, dtype=np.float64).mean(axis=0))


def test_every_layer_gets_256_rows_called_synthetic(drawn):
    assert {x.inputs_source for x in drawn.values()} == {"synthetic"}
    assert {x.activations.shape for x in drawn.values()} == {(256, K), (256, 4 * K)}


def test_queries_keys_and_values_read_one_input(drawn):
    q, k, v = (drawn[f"attn1.to_{x}"].activations for x in "qkv")
    assert q is k is v
    assert not np.array_equal(q, drawn["attn2.to_q"].activations)


def test_channels_are_as_loud_as_in_trained_layers(drawn):
    """Outliers of 4 to 8 medians behind a modulated norm, of 12 to 30 in the residual stream."""
    loudest = {
        name: rms(x.activations).max() / np.median(rms(x.activations)) for name, x in drawn.items()
    }
    assert 5 < loudest["attn1.to_q"] < 13
    assert 8 < loudest["attn2.to_q"] < 45
    assert loudest["attn1.to_out.0"] < 5
    assert loudest["proj_out"] < 4


def test_what_gelu_leaves_is_not_below_its_least_value(drawn):
    rows = drawn["ff.net.2"].activations
    assert -0.1719 <= rows.min() < -0.1
    assert drawn["ff.net.2"].follows_gelu
    kurtosis = np.mean(rows.astype(np.float64) ** 4) / np.mean(rows.astype(np.float64) ** 2) ** 2
    assert kurtosis > 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [("attn1.to_v", -0.6), ("ff.net.0.proj", -0.3), ("ff.net.2", -0.3), ("attn2.to_q", 0.0)],
)
def test_loud_channels_lie_where_the_own_weights_put_them(drawn, name, expected):
    layer = drawn[name]
    found = np.corrcoef(np.log(rms(layer.activations)), np.log(rms(layer.weight)))[0, 1]
    # Of 512 channels: the standard error of a correlation is (1 - rho^2) / sqrt(512) < 0.045; log
    # scales with outliers are no normal variables, whose ranks lose a little of it.
    assert found == pytest.approx(expected, abs=0.15)


def test_a_gated_feed_forward_part_has_a_symmetric_input(tmp_path):
    names = {f"{BLOCK}.ff.net.0.proj": (1024, 128), f"{BLOCK}.ff.net.2": (128, 512)}
    dump = lq.read_layer_dump(save(tmp_path / "m.safetensors", names), synthesize_inputs=512)
    rows = dump[f"{BLOCK}.ff.net.2"].activations
    assert rows.min() < -1
    assert abs(rows.mean()) < 0.25 * rows.std()


def test_even_columns_and_unknown_kinds_are_drawn_too(tmp_path):
    path = save(tmp_path / "m.safetensors", {"a.b": (8, 16), "c": (8, 16)}, loud=False)
    dump = lq.read_layer_dump(path, synthesize_inputs=3)
    assert dump["a.b"].activations.shape == (3, 16)
    assert not np.array_equal(dump["a.b"].activations, dump["c"].activations)
    assert "2 of kinds without measured statistics, such as a.b" in dump.inputs_note


def test_captured_inputs_stay_and_only_the_others_are_drawn(tmp_path):
    rng = np.random.default_rng(1)
    weight, rows = (rng.standard_normal((16, 16)).astype(np.float32) for _ in range(2))
    layers = [
        lq.Layer(name="real", weight=weight, activations=rows),
        lq.Layer(name="bare", weight=weight),
    ]
    write_layer_dump(tmp_path / "d.safetensors", layers)
    dump = lq.read_layer_dump(tmp_path / "d.safetensors", synthesize_inputs=8)
    np.testing.assert_array_equal(dump["real"].activations, rows)
    assert (dump["real"].inputs_source, dump["bare"].inputs_source) == ("", "synthetic")
    assert dump.inputs_note.startswith("inputs of 1 of 2 layers are synthetic")
    assert lq.read_layer_dump(tmp_path / "d.safetensors").inputs_note == ""


def test_the_label_survives_a_copy_a_choice_and_a_pickle(checkpoint, tmp_path):
    dump = lq.read_layer_dump(checkpoint, synthesize_inputs=8).select("proj_out")
    again = pickle.loads(pickle.dumps(dump))
    np.testing.assert_array_equal(again["proj_out"].activations, dump["proj_out"].activations)
    for suffix in ("pt", "safetensors", "npz"):
        write_layer_dump(tmp_path / f"copy.{suffix}", dump)
        copy = lq.read_layer_dump(tmp_path / f"copy.{suffix}")
        assert copy["proj_out"].inputs_source == "synthetic"
        assert "1 of 1 layer" in copy.inputs_note
    # Digests of what was drawn are kept apart from those of the file alone, and by rows.
    bare = lq.read_layer_dump(checkpoint).select("proj_out")
    more = lq.read_layer_dump(checkpoint, synthesize_inputs=9).select("proj_out")
    assert len({layer_digests(one)["proj_out"] for one in (bare, dump, more, bare)}) == 3


@pytest.mark.parametrize("rows", [0, -1, 2**17, 1.5])
def test_a_wrong_number_of_rows_is_refused(checkpoint, rows):
    with pytest.raises(InputError, match="1 to 65536 rows"):
        lq.read_layer_dump(checkpoint, synthesize_inputs=rows)


@pytest.mark.parametrize("model", list_models())
def test_groups_by_name_are_those_of_the_inventory(model):
    layers = load_inventory(model).layers
    known = {x.name: x.group for x in layers}
    shared = {name: group for name, group in known.items() if list(known.values()).count(group) > 1}
    found = groups_of(kinds_of(known))
    assert {g: {n for n in found if found[n] == g} for g in found.values()} == {
        g: {n for n in shared if shared[n] == g} for g in shared.values()
    }


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path = save(
        tmp_path_factory.mktemp("swept") / "m.safetensors",
        {f"{BLOCK}.attn1.to_q": (64, 64), f"{BLOCK}.ff.net.2": (64, 128)},
    )
    out = path.parent / "out"
    words = ("sweep", "--hw", "aie2", "--layer-dump", path, "--split", "W4A4,W4A4+W8A8r8")
    words += ("--rows", "64", "--preset", "fast", "--synthesize-inputs", "--tokens", "24")
    result = run(*words, "--jobs", "0", "--format", "json", "--out", out)
    assert result.exit_code == 0, result.output
    return path, out, result


def test_rows_totals_and_verdict_say_that_they_rest_on_synthetic_inputs(swept):
    _, _, result = swept
    said = json.loads(result.stdout)
    assert {(row["inputs"], row["tokens"]) for row in said["rows"]} == {("synthetic", 24)}
    assert all("on synthetic inputs" in row["message"] for row in said["rows"])
    assert all(0 < row["output_error"] < 1 for row in said["rows"])
    assert {total["inputs"] for total in said["model"]} == {"synthetic"}
    assert all("in 2 of 2 layers" in total["message"] for total in said["model"])
    assert "on synthetic inputs" in said["verdict"]["text"]
    assert "not captured from a run of the model" in said["verdict"]["text"]
    assert any("inputs of 2 of 2 layers are synthetic" in note for note in said["notes"])


def test_the_page_says_it(swept):
    _, out, _ = swept
    result = run("report", out, "--page-only", "--out", out / "r.html")
    assert result.exit_code == 0, result.output
    assert "rest on synthetic inputs" in result.output
    assert "rest on synthetic inputs" in (out / "r.html").read_text()


def test_a_row_is_that_of_evaluate_layer_on_the_same_drawn_rows(swept):
    path, _, result = swept
    dump = lq.read_layer_dump(path, synthesize_inputs=24)
    for row in json.loads(result.stdout)["rows"]:
        own = lq.evaluate_layer(dump[row["layer"]], row["split"], "aie2", preset="fast", rows=64)
        assert row["output_error"] == own["output_error"]


@pytest.mark.parametrize(
    "words",
    [
        ("solve", "--split", "W4A4", "--preset", "fast", "--layer-dump"),
        ("emulate", "--hw", "aie2", "--split", "W4A4", "--rows", "8", "--layer-dump"),
        ("explain", "--hw", "aie2", "--rows", "8", "--layer", f"{BLOCK}.ff.net.2"),
        ("steps", "--hw", "aie2", "--split", "W4A4", "--layer-dump"),
    ],
)
def test_other_commands_take_the_same_flag(swept, words):
    path, _, _ = swept
    words += ("--layer-dump",) if words[0] == "explain" else ()
    result = run(*words, path, "--synthesize-inputs", "--tokens", "20")
    assert result.exit_code == 0, result.output
    assert "inputs of 2 of 2 layers are synthetic" in result.output


@pytest.mark.parametrize(
    "words",
    [
        ("solve", "--split", "W4A4", "--preset", "fast"),
        ("emulate", "--hw", "aie2", "--split", "W4A4", "--rows", "8"),
        ("steps", "--hw", "aie2", "--split", "W4A4"),
    ],
)
def test_rows_of_other_commands_are_labelled(swept, words):
    path, _, _ = swept
    words += ("--layer-dump", path, "--synthesize-inputs", "--tokens", "20", "--format", "json")
    result = run(*words)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["inputs"] for row in rows} == {"synthetic"}
