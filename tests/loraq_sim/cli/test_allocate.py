"""`allocate` on a small sweep: tables, files, and the recipe solved."""

import csv
import json
import shutil

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.recipe import read_recipe
from loraq_sim.results.store import ResultStore


@pytest.fixture(scope="module")
def store(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        done = CliRunner().invoke(
            app,
            [
                *("sweep", "--hw", "aie2,a100", "--layer-dump", "examples/tiny_pixart.pt"),
                *("--layers", "*.0.attn1.*", "--tokens", "16", "--preset", "fast", "--jobs", "0"),
                *("--split", "W4A4,W4A8,W8A8,W4A8+W8A8r8", "--quiet", "--out", str(out)),
            ],
        )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def run(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_each_accelerator_gets_an_allocation_that_meets_the_budget(run, store):
    done = run("allocate", store, "--budget", "weight_bytes=48kB", "--format", "json")
    assert done.exit_code == 0, done.output
    views = json.loads(done.stdout)["allocations"]
    assert [view["machine"]["accelerator"] for view in views] == ["aie2", "a100"]
    for view in views:
        assert sum(row["weight_bytes"] for row in view["layers"]) <= 48_000
        assert view["totals"]["weight_bytes"] == sum(r["weight_bytes"] for r in view["layers"])
        assert view["is_proven"]
        assert view["gap"] < 1e-8
        assert len(view["uniform"]) == 4
        assert all(row["error_ratio"] <= 1 and row["cost_ratio"] <= 1 for row in view["uniform"])
        assert view["frontier"][0]["mix"] == "4 W4A8"
        assert view["frontier"][-1]["mix"] == "4 W8A8"


def test_files_are_written_once_and_the_recipe_solves(run, store, tmp_path):
    words = ("allocate", store, "--hw", "aie2", "--budget", "output_error=5%", "--out", tmp_path)
    done = run(*words, "--minimize", "weight_bytes")
    assert done.exit_code == 0, done.output
    assert "the whole model" in done.stdout
    with (tmp_path / "allocation.csv").open() as file:
        chosen = {row["layer"]: row for row in csv.DictReader(file)}
    assert (tmp_path / "frontier.csv").exists()
    assert (tmp_path / "uniform.csv").exists()
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert len(recipe.provenance["dump_digest"]) == 64
    assert recipe.provenance["budget"] == {"output_error": 0.05}
    solved = run(
        *("solve", "--layer-dump", "examples/tiny_pixart.pt", "--format", "json"),
        *("--recipe", tmp_path / "recipe.toml"),
    )
    rows = {row["layer"]: row for row in json.loads(solved.stdout)["rows"]}
    assert rows.keys() == chosen.keys()
    for layer, row in rows.items():
        assert row["split"] == chosen[layer]["split"]
        # The same solver on the same weight, in another process.
        assert row["weight_error"] == pytest.approx(float(chosen[layer]["weight_error"]), rel=1e-6)
    again = run(*words)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(*words, "--force").exit_code == 0


@pytest.mark.parametrize("form", ["csv", "md"])
def test_other_formats_hold_the_choice_for_each_layer(run, store, form):
    done = run("allocate", store, "--budget", "latency_s=1s", "--format", form)
    assert done.exit_code == 0
    assert done.stdout.count("attn1.to_q") == 2


def test_bad_budgets_end_with_one_line(run, store):
    for words, message in (
        (("--budget", "latency_s=1us"), "the least possible of 4 layers is"),
        (("--budget", "latency_s=3MB"), "want a number"),
        (("--budget", "latency_s=1", "--hw", "aie3"), "unknown accelerator 'aie3'"),
        (("--budget", "latency_s=1", "--layers", "nothing"), "no layer of the store matches"),
        (("--budget", "latency_s=1", "--solver", "x"), "unknown allocation method"),
    ):
        done = run("allocate", store, *words)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert not done.stdout


@pytest.mark.parametrize(
    ("column", "value", "key"),
    [
        ("rotation", "sideways", "rotate"),
        ("rotation", "hadamard:-3", "rotate"),
        ("smooth", 7.0, "smooth"),
        ("smooth", 1.5, "smooth"),
    ],
)
def test_a_transform_that_no_recipe_has_is_one_line_and_no_file(
    run, store, tmp_path, column, value, key
):
    shutil.copytree(store, tmp_path / "odd")
    with ResultStore.open(tmp_path / "odd" / "results.sqlite", create=True) as opened:
        opened.relabel({row["case_id"]: {column: value} for row in opened.rows()})
    out = tmp_path / "out"
    done = run("allocate", tmp_path / "odd", "--budget", "output_error=5%", "--out", out)
    assert done.exit_code == 2
    assert f"the rows have no recipe: defaults.{key}" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not list(out.glob("*.toml"))


def test_the_recipe_of_rotated_and_smoothed_rows_solves_to_what_was_chosen(run, tmp_path):
    """Sweep with transforms, allocate, solve by the recipe: the same weights are stored."""
    layers = ("--layers", "*.0.attn1.to_q,*.0.attn1.to_out.0")
    dump = ("--layer-dump", "examples/tiny_pixart.pt", *layers)
    words = ("--split", "W4A8", "--preset", "fast", "--smooth", 0.5, "--rotate", "hadamard")
    swept = run(
        *("sweep", "--hw", "aie2", *dump, *words, "--tokens", 16, "--jobs", 0, "--quiet"),
        *("--out", tmp_path / "s", "--format", "json"),
    )
    assert swept.exit_code == 0, swept.output
    done = run(
        *("allocate", tmp_path / "s", "--budget", "weight_bytes=1GB", "--out", tmp_path / "a")
    )
    assert done.exit_code == 0, done.output
    recipe = next((tmp_path / "a").glob("*.toml"))
    solved = run("solve", *dump, "--recipe", recipe, "--format", "json")
    assert solved.exit_code == 0, solved.output
    by_layer = {row["layer"]: row for row in json.loads(solved.stdout)["rows"]}
    for row in json.loads(swept.stdout)["rows"]:
        mine = by_layer[row["layer"]]
        for name in ("rotation", "smooth", "weight_bytes"):
            assert mine[name] == row[name], name
        assert mine["weight_error"] == pytest.approx(row["weight_error"], rel=1e-6)


def test_splits_that_differ_in_what_is_done_to_inputs_have_names_of_their_own(run, tmp_path):
    """One store of plain, rotated and data-rounded rows: names, tables and recipe say which."""
    dump = ("--layer-dump", "examples/tiny_pixart.pt", "--layers", "*.0.attn1.to_[qv]")
    words = ("--split", "W4A4", "--preset", "fast", "--tokens", 16, "--jobs", 0, "--quiet")
    for name, options in {
        "plain": (),
        "rotated": ("--rotate", "hadamard"),
        "gptq": ("--method", "gptq"),
    }.items():
        swept = run("sweep", "--hw", "aie2", *dump, *words, *options, "--out", tmp_path / name)
        assert swept.exit_code == 0, swept.output
    merged = run("merge", tmp_path / "all", *(tmp_path / n for n in ("plain", "rotated", "gptq")))
    assert merged.exit_code == 0, merged.output
    words = ("allocate", tmp_path / "all", "--budget", "weight_bytes=1GB", "--out", tmp_path / "a")
    done = run(*words)
    assert done.exit_code == 0, done.output
    told = json.loads(run(*words, "--force", "--format", "json").stdout)["allocations"][0]
    mixes = [row["mix"] for row in told["frontier"]]
    assert len(set(mixes)) == len(mixes)
    assert any("rotated" in mix for mix in mixes)
    uniform = done.stdout[done.stdout.index("mixed splits") :]
    lines = [line.split() for line in uniform.splitlines() if line.strip().startswith("W4A4 ")]
    assert len(lines) == 3
    assert len({tuple(line[:3]) for line in lines}) == 3
    # Solved by the recipe: what the rows of the allocation have, whoever made them.
    solved = run(
        *("solve", *dump, "--recipe", tmp_path / "a" / "recipe.toml", "--format", "json"),
    )
    assert solved.exit_code == 0, solved.output
    by_layer = {row["layer"]: row for row in json.loads(solved.stdout)["rows"]}
    for row in told["layers"]:
        mine = by_layer[row["layer"]]
        for name in ("method", "rotation", "weight_bytes"):
            assert mine[name] == row[name], name
        assert mine["weight_error"] == pytest.approx(row["weight_error"], rel=1e-6)


def test_a_recipe_keeps_the_rounding_of_layers_without_a_branch(run, tmp_path):
    """Of two layers with gptq and one plain, each is solved as it was."""
    dump = ("--layer-dump", "examples/tiny_pixart.pt")
    words = ("--split", "W4A8", "--preset", "fast", "--tokens", 16, "--jobs", 0, "--quiet")
    parts = {"gptq": ("*.0.attn1.to_[qk]", "gptq"), "rtn": ("*.0.attn1.to_v", "rtn")}
    for name, (layers, method) in parts.items():
        swept = run(
            *("sweep", "--hw", "aie2", *dump, "--layers", layers, *words, "--method", method),
            *("--out", tmp_path / name),
        )
        assert swept.exit_code == 0, swept.output
    assert run("merge", tmp_path / "all", tmp_path / "gptq", tmp_path / "rtn").exit_code == 0
    done = run(
        *("allocate", tmp_path / "all", "--budget", "weight_bytes=1GB", "--out", tmp_path / "a"),
        *("--format", "json"),
    )
    assert done.exit_code == 0, done.output
    expected = {row["layer"]: row["method"] for row in json.loads(done.stdout)["rows"]}
    assert sorted(expected.values()) == ["gptq", "gptq", "rtn"]
    solved = run(
        *("solve", *dump, "--layers", "*.0.attn1.to_[qkv]", "--format", "json"),
        *("--recipe", tmp_path / "a" / "recipe.toml"),
    )
    assert solved.exit_code == 0, solved.output
    assert {r["layer"]: r["method"] for r in json.loads(solved.stdout)["rows"]} == expected


def test_allocations_of_two_dumps_say_which(run, tmp_path):
    for name, dump in {"a": "tiny_pixart.pt", "b": "minilm.pt"}.items():
        layers = "*.0.attn1.to_q" if name == "a" else "*layer.2*query"
        swept = run(
            *("sweep", "--hw", "aie2", "--layer-dump", f"examples/{dump}", "--layers", layers),
            *("--split", "W4A8", "--tokens", 8, "--jobs", 0, "--quiet", "--out", tmp_path / name),
        )
        assert swept.exit_code == 0, swept.output
    assert run("merge", tmp_path / "all", tmp_path / "a", tmp_path / "b").exit_code == 0
    done = run("allocate", tmp_path / "all", "--budget", "weight_bytes=1GB")
    assert done.exit_code == 0, done.output
    for dump in ("tiny_pixart.pt", "minilm.pt"):
        assert f"{dump} on aie2: the whole model" in done.stdout
