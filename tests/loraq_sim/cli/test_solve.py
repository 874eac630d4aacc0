"""`solve`: overrides, skip lists, gains at equal bytes, and the saved model."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.quantized_model import read_quantized_model

DUMP = ("solve", "--layer-dump", "examples/tiny_pixart.pt", "--preset", "fast")


@pytest.fixture
def run(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def rows_of(done):
    assert done.exit_code == 0, done.output
    return {(row["layer"], row["method"]): row for row in json.loads(done.stdout)["rows"]}


def test_what_svdquant_leaves_at_sixteen_bits_is_skipped_unless_asked_for(run):
    kinds = {row["kind"] for row in rows_of(run(*DUMP, "--format", "json")).values()}
    assert "cross_q" in kinds
    assert not {"cross_k", "cross_v"} & kinds
    every = rows_of(run(*DUMP, "--skip", "none", "--format", "json"))
    assert len(every) == 20
    named = rows_of(run(*DUMP, "--layers", "cross_k", "--format", "json"))
    assert len(named) == 2
    assert run(*DUMP, "--skip", "*").exit_code == 2


def test_gains_compare_with_baselines_of_the_same_bytes(run):
    words = ("--layers", "*.0.attn1.to_q", "--method", "rtn,svdquant,loraq", "--format", "json")
    rows = rows_of(run(*DUMP, *words, "--split", "W4A4+W16A16r8"))
    by_method = {method: row for (_, method), row in rows.items()}
    assert by_method["rtn"]["gain_over_rtn"] == 1.0
    assert by_method["rtn"]["gain_over_svdquant"] is None
    # The same bytes, the same 16-bit branch: SVDQuant against itself.
    assert by_method["svdquant"]["gain_over_svdquant"] == 1.0
    loraq = by_method["loraq"]
    assert loraq["gain_over_svdquant"] == pytest.approx(
        by_method["svdquant"]["weight_error"] / loraq["weight_error"], rel=1e-12
    )
    assert 0 < loraq["output_error"] < by_method["rtn"]["output_error"]


def test_overrides_change_rank_method_and_split_of_their_layers(run):
    words = ("--override", "ffn_up:rank=12", "--override", "*.attn1.to_q:method=lqer")
    words = (*words, "--override", "ffn_down:budget=fp16@8", "--override", "self_v:split=W4A4")
    rows = rows_of(run(*DUMP, *words, "--split", "W4A4+W8A8r4", "--format", "json")).values()
    by_kind = {row["kind"]: row for row in rows}
    assert by_kind["ffn_up"]["rank"] == 12
    assert by_kind["ffn_up"]["split"] == "W4A4+W8A8r12"
    assert by_kind["self_q"]["method"] == "lqer"
    assert by_kind["ffn_down"]["split"] == "W4A4+W8A8@fp16r8"
    assert (by_kind["self_v"]["rank"], by_kind["self_v"]["method"]) == (0, "rtn")
    assert by_kind["self_out"]["rank"] == 4
    assert run(*DUMP, "--override", "x:rnk=3").exit_code == 2


def test_the_saved_model_is_what_the_table_says(run, tmp_path):
    path = tmp_path / "q.safetensors"
    words = ("--layers", "*.0.attn1*", "--split", "W4A4+W8A8r8", "--save", path)
    rows = rows_of(run(*DUMP, *words, "--format", "json"))
    model = read_quantized_model(path)
    assert len(model) == len(rows) == 4
    for (name, _), row in rows.items():
        assert model[name].nbytes == row["weight_bytes"]
        assert model[name].weight_error == row["weight_error"]
    assert model.meta["splits"]["transformer_blocks.0.attn1.to_q"] == "W4A4+W8A8r8"
    again = run(*DUMP, *words)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(*DUMP, *words, "--method", "rtn,loraq", "--force").exit_code == 2


def test_a_recipe_sets_split_and_settings_of_each_layer(run, tmp_path):
    recipe = ("--recipe", "examples/recipe_tiny_pixart.toml", "--layers", "*.0.*")
    done = run(*DUMP[:3], *recipe, "--format", "json")
    rows = {row["kind"]: row for row in rows_of(done).values()}
    assert "2 of 11 layers stay at 16 bits" in done.stderr
    assert not {"cross_k", "cross_v"} & rows.keys()
    assert rows["self_q"]["split"] == "W4A8+W8A8@fp16r4"
    assert (rows["ffn_down"]["rank"], rows["ffn_down"]["method"]) == (12, "alternating")
    assert rows["self_v"]["split"] == "W4A8+W8A8r6"
    # A flag that is given beats the recipe, an override beats both.
    words = ("--preset", "balanced", "--override", "ffn_down:rank=3")
    saved = tmp_path / "q.safetensors"
    words = (*words, "--method", "lqer", "--save", saved)
    rows = rows_of(run(*DUMP[:3], *recipe, *words, "--format", "json"))
    (down,) = [row for row in rows.values() if row["kind"] == "ffn_down"]
    assert (down["rank"], down["preset"]) == (3, "balanced")
    assert {method for _, method in rows} == {"lqer"}
    assert read_quantized_model(saved).keys() == {layer for layer, _ in rows}


def test_a_recipe_that_fits_nothing_or_is_doubled_by_flags_is_refused(run, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('recipe = 1\n[layers]\n"model.*" = "W4A4"\n')
    done = run(*DUMP, "--recipe", path)
    assert done.exit_code == 2
    assert "no layer matches the recipe, such as 'model.*'" in done.stderr
    done = run(*DUMP, "--recipe", path, "--split", "W4A4")
    assert done.exit_code == 2
    assert "leave out --split" in done.stderr
    path.write_text('recipe = 1\n[layers]\n"model.*" = "W4A4"\nffn_up = "W4A4"\n')
    done = run(*DUMP, "--recipe", path)
    assert done.exit_code == 0
    assert "1 entries of the recipe match no layer here, such as 'model.*'" in done.stderr


def test_compare_shows_methods_at_equal_bytes(run):
    words = ("--layers", "*.0.attn1.to_q,*.0.attn1.to_k", "--compare", "rtn,lqer,svdquant,loraq")
    words = (*words, "--split", "W4A4+W8A8r8")
    table = run(*DUMP, *words)
    assert table.exit_code == 0, table.output
    assert "gain of loraq" in table.stdout
    rows = rows_of(run(*DUMP, *words, "--format", "json"))
    assert len(rows) == 8
    for (layer, method), row in rows.items():
        best = rows[layer, "loraq"]
        assert row["weight_bytes"] <= best["weight_bytes"]
        assert row["gain"] == row["weight_error"] / best["weight_error"]
        assert (row["branch"] == "fp16") == (method == "svdquant")


def test_compare_refuses_what_it_cannot_compare(run):
    for words, message in (
        (("--compare", "loraq"), "needs two methods"),
        (("--compare", "rtn,loraq", "--method", "rtn"), "leave out --method"),
        (("--compare", "rtn,lorq"), "did you mean 'loraq'"),
        (("--compare", "rtn,loraq", "--split", "W4A4"), "needs a split with a branch"),
    ):
        done = run(*DUMP, *words)
        assert done.exit_code == 2, done.output
        assert message in done.stderr


def test_the_device_reaches_every_way_of_solving(run):
    words = (*DUMP, "--layers", "*.0.attn1.to_q,*.0.attn1.to_k", "--split", "W4A4+W8A8r8")
    for more in ((), ("--share-inputs", "common"), ("--compare", "rtn,loraq")):
        plain, there = (
            rows_of(run(*words, *more, *given, "--format", "json"))
            for given in ((), ("--device", "torch:cpu"))
        )
        errors = [[row["weight_error"] for row in rows.values()] for rows in (plain, there)]
        # Close, but of other sums: the device did run.
        assert errors[1] == pytest.approx(errors[0], rel=0.03)
        assert errors[1] != errors[0]


@pytest.mark.parametrize("device", ["gpu", "cuda:9999"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(run, device):
    done = run("solve", "--layer-dump", "no_such_file.pt", "--device", device)
    assert done.exit_code == 2
    assert f"'{device}'" in done.output
    assert "no_such_file" not in done.output


def test_smoothing_rotation_and_a_common_branch_reach_the_solver(run, tmp_path):
    words = ("--layers", "*.0.attn1.to_q,*.0.attn1.to_k", "--split", "W4A4+W8A8r8")
    saved = tmp_path / "model.safetensors"
    more = ("--smooth", 0.5, "--rotate", "hadamard:32", "--share-inputs", "common")
    done = run(*DUMP, *words, *more, "--save", saved)
    assert done.exit_code == 0, done.stderr
    model = read_quantized_model(saved)
    one, other = model.values()
    assert one.rotation == other.rotation == 32
    assert one.smooth is not None
    np.testing.assert_array_equal(one.right.codes, other.right.codes)
    # R and the smoothing are stored once, and each member is charged half.
    alone = rows_of(run(*DUMP, *words, *more[:4], "--format", "json")).values()
    alone = [row["weight_bytes"] for row in alone]
    assert one.nbytes + other.nbytes == sum(alone) - one.right.nbytes - 2 * one.smooth.size


def test_compare_refuses_smoothing_and_an_unknown_rotation_is_named(run):
    done = run(*DUMP, "--compare", "rtn,loraq", "--smooth", 0.5)
    assert done.exit_code == 2
    assert "leave out --smooth" in done.stderr
    done = run(*DUMP, "--rotate", "hadamart", "--layers", "*.0.attn1.to_q")
    assert done.exit_code in (1, 2)
    assert "hadamart" in done.stderr


def test_condition_and_finish_are_named_in_rows_and_reach_the_solver(run, tmp_path):
    words = (*DUMP, "--layers", "*.0.attn1.to_q", "--split", "W4A4+W8A8@fp16r4")
    (plain,) = rows_of(run(*words, "--format", "json")).values()
    (finished,) = rows_of(run(*words, "--finish", "data", "--format", "json")).values()
    assert finished["finish"] == "data"
    assert finished["output_error"] < 0.9 * plain["output_error"]
    assert finished["weight_bytes"] == plain["weight_bytes"]
    saved = tmp_path / "model.safetensors"
    done = run(*words, "--condition", "auto", "--save", saved)
    assert done.exit_code == 0, done.stderr
    model = read_quantized_model(saved)
    (solution,) = model.values()
    assert solution.smooth is not None or solution.rotation is not None
    assert model.meta["condition"] == {name: "auto" for name in model}


@pytest.mark.parametrize(
    ("option", "value", "meant"), [("finish", "date", "data"), ("condition", "aut", "auto")]
)
def test_an_unknown_finish_or_condition_is_one_line(run, option, value, meant):
    done = run(*DUMP, f"--{option}", value, "--layers", "*.0.attn1.to_q")
    assert done.exit_code in (1, 2)
    assert f"unknown {option} '{value}'; did you mean '{meant}'" in done.output


def test_what_a_condition_chose_is_shown(run):
    words = (*DUMP, "--layers", "*.0.attn1.to_q", "--split", "W4A4a+W8A8r4", "--condition", "auto")
    (row,) = rows_of(run(*words, "--format", "json")).values()
    grid = row["chosen"].split(", ")[-1]
    assert grid in ("A4", "A4s", "A4u")
    assert f" {grid} " in " ".join(run(*words).stdout.split())
    # Nobody chose where nobody was asked to.
    (plain,) = rows_of(run(*words[:-4], "--split", "W4A4+W8A8r4", "--format", "json")).values()
    assert "chosen" not in plain


def test_methods_that_spend_a_branch_on_inputs_name_the_split_they_need(run):
    words = (*DUMP, "--layers", "*.0.attn1.to_q", "--format", "json")
    rows = rows_of(run(*words, "--method", "quad,resq", "--split", "W4A4~W8A8r4"))
    assert {method: row["rank"] for (_, method), row in rows.items()} == {"quad": 4, "resq": 4}
    assert rows_of(run(*words, "--method", "lrc", "--split", "W4A4+W16A16r4"))
    done = run(*words, "--method", "quad", "--split", "W4A4+W8A8r4")
    assert done.exit_code == 2
    assert "write the split with ~" in done.output
