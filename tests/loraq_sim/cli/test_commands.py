"""Every command on the bundled dumps: what it prints, in every format, and how it ends."""

import csv
import io
import json
import re

import pytest
import typer
from typer.testing import CliRunner

from loraq_sim.cli.app import app

FORMATS = ("table", "json", "csv", "md")


@pytest.fixture
def run(request, monkeypatch):
    """Run a command line from the project's root; the result has exit_code, stdout, stderr."""
    monkeypatch.chdir(request.config.rootpath)
    # Rich folds help and tables at the width of the terminal; make it wide.
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return invoke


def sweep(run, out, *words):
    return run(
        *("sweep", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt"),
        *("--layers", "*.0.attn1.to_q,*.0.attn1.to_out.0", "--tokens", 32, "--preset", "fast"),
        *("--split", "W4A4,W4A8", "--split", "W4A4+W8A8r8", "--split", "W4A4+W8A8r16"),
        *("--jobs", 0, "--quiet", "--out", out, *words),
    )


def rows_of(result):
    return json.loads(result.stdout)


def test_sweep_prints_rows_front_model_and_provenance_as_json(run, tmp_path):
    result = sweep(run, tmp_path / "a", "--format", "json")
    assert result.exit_code == 0, result.output
    report = rows_of(result)
    assert len(report["rows"]) == 8
    assert {row["status"] for row in report["rows"]} == {"ok"}
    assert {row["split"] for row in report["model"]} == {
        *("W4A4", "W4A8", "W4A4+W8A8r8", "W4A4+W8A8r16")
    }
    assert report["front"] == [row for row in report["model"] if row["pareto"]]
    assert report["provenance"]["seed"] == 0
    for name in ("results.sqlite", "results.csv", "pareto.png"):
        assert (tmp_path / "a" / name).stat().st_size > 0


def test_sweep_shows_what_an_architect_expects(run, tmp_path):
    model = {
        row["split"]: row
        for row in rows_of(sweep(run, tmp_path / "a", "--format", "json"))["model"]
    }
    assert model["W4A8"]["output_error"] < model["W4A4"]["output_error"]
    assert model["W4A4+W8A8r8"]["output_error"] < model["W4A4"]["output_error"]
    assert model["W4A4+W8A8r16"]["weight_error"] < model["W4A4+W8A8r8"]["weight_error"]
    assert model["W4A4+W8A8r16"]["weight_bytes"] > model["W4A4+W8A8r8"]["weight_bytes"]
    assert model["W4A4+W8A8r8"]["weight_bytes"] > model["W4A4"]["weight_bytes"]
    assert model["W4A4"]["latency_s"] <= model["W4A8"]["latency_s"]


def test_model_totals_follow_the_stated_formula(run, tmp_path):
    report = rows_of(sweep(run, tmp_path / "a", "--format", "json"))
    for total in report["model"]:
        rows = [row for row in report["rows"] if row["split"] == total["split"]]
        mean_square = sum(row["output_error"] ** 2 for row in rows) / len(rows)
        assert total["output_error"] == pytest.approx(mean_square**0.5, rel=1e-12)
        assert total["latency_s"] == pytest.approx(sum(r["latency_s"] for r in rows), rel=1e-12)
        assert total["weight_bytes"] == sum(row["weight_bytes"] for row in rows)


def test_cost_model_and_packer_agree_on_weight_bytes(run, tmp_path):
    report = rows_of(sweep(run, tmp_path / "a", "--format", "json"))
    costed = rows_of(
        run(
            *("cost", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt"),
            *("--layers", "*.0.attn1.to_q", "--format", "json"),
            *("--split", "W4A4,W4A8", "--split", "W4A4+W8A8r8", "--split", "W4A4+W8A8r16"),
        )
    )["rows"]
    solved = {row["split"]: row for row in report["rows"] if row["layer"].endswith("attn1.to_q")}
    assert len(costed) == len(solved) == 4
    for row in costed:
        assert row["weight_bytes"] == solved[row["split"]]["weight_bytes"]
        assert row["latency_s"] == solved[row["split"]]["latency_s"]


def test_the_same_command_finds_its_results_and_force_does_them_again(run, tmp_path):
    first = rows_of(sweep(run, tmp_path / "a", "--format", "json"))["rows"]
    again = rows_of(sweep(run, tmp_path / "a", "--format", "json"))["rows"]
    assert again == first
    forced = rows_of(sweep(run, tmp_path / "a", "--format", "json", "--force"))["rows"]
    for new, old in zip(forced, first, strict=True):
        assert new["seconds"] != old["seconds"]
        assert {**new, "seconds": 0} == {**old, "seconds": 0}


def test_csv_on_stdout_is_the_file_beside_the_store(run, tmp_path):
    result = sweep(run, tmp_path / "a", "--format", "csv")
    printed = list(csv.DictReader(io.StringIO(result.stdout)))
    written = list(csv.DictReader(io.StringIO((tmp_path / "a" / "results.csv").read_text())))
    assert printed == written
    assert len(printed) == 8


def test_dry_run_counts_cases_and_writes_nothing(run, tmp_path):
    result = sweep(run, tmp_path / "a", "--dry-run", "--format", "json")
    forecast = rows_of(result)
    assert (forecast["cases"], forecast["layers"], forecast["to_run"]) == (8, 2, 8)
    assert forecast["estimated_s"] > 0
    assert not (tmp_path / "a").exists()
    sweep(run, tmp_path / "a")
    forecast = rows_of(sweep(run, tmp_path / "a", "--dry-run", "--format", "json"))
    assert (forecast["already_there"], forecast["to_run"]) == (8, 0)


@pytest.mark.parametrize("output", FORMATS)
def test_sweep_prints_every_format(run, tmp_path, output):
    result = sweep(run, tmp_path / "a", "--format", output)
    assert result.exit_code == 0
    assert "W4A4+W8A8r8" in result.stdout


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "solve --layer-dump examples/minilm.pt --layers *layer.2*query "
            "--method rtn,loraq --split W4A4+W16A16r8 --preset fast",
            "loraq",
        ),
        (
            "emulate --hw aie2 --layer-dump examples/tiny_pixart.pt --layers *.0.attn1.to_q "
            "--split W8A8 --tokens 16 --acc-bits 16 --overflow saturate",
            "W8A8",
        ),
        ("cost --hw aie2,a100 --shape 4096x1152x4608 --split W4A4+W8A8r64", "a100"),
        ("dump info examples/tiny_pixart.pt", "ffn_down"),
        ("dump info examples/minilm.pt --no-statistics", "ffn_down"),
        ("hw list", "aie2"),
        ("hw show a100 --split W4A4 --all", "clock_hz"),
    ],
)
def test_commands_print_every_format(run, words, expected, output):
    result = run(*words.split(), "--format", output)
    assert result.exit_code == 0, result.output
    assert expected in result.stdout
    if output == "json":
        json.loads(result.stdout)


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize(
    "words", [(), ("--per-layer",), ("--minimize", "output_error,weight_bytes")]
)
def test_pareto_reads_a_store(run, tmp_path, words, output):
    sweep(run, tmp_path / "a")
    result = run("pareto", tmp_path / "a", *words, "--format", output)
    assert result.exit_code == 0, result.output
    assert "W4A8" in result.stdout


def test_pareto_draws_a_figure_but_replaces_none_unasked(run, tmp_path):
    sweep(run, tmp_path / "a")
    picture = tmp_path / "front.svg"
    assert run("pareto", tmp_path / "a", "--figure", picture).exit_code == 0
    assert "<svg" in picture.read_text()
    refused = run("pareto", tmp_path / "a", "--figure", picture)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert run("pareto", tmp_path / "a", "--figure", picture, "--force").exit_code == 0


def test_a_narrow_accumulator_is_seen_in_counts_and_in_the_error(run):
    words = ("emulate", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt")
    words = (*words, "--layers", "*.0.attn1.to_q", "--split", "W8A8", "--format", "json")
    wide = rows_of(run(*words))["rows"][0]
    narrow = rows_of(run(*words, "--acc-bits", 14, "--overflow", "saturate"))["rows"][0]
    assert wide["overflow_count"] == 0
    assert narrow["overflow_count"] > 0
    assert narrow["output_error"] > wide["output_error"]
    assert narrow["safe_acc_bits"] == wide["safe_acc_bits"] > 14


def test_a_sweep_over_accumulators_is_a_case_for_each(run, tmp_path):
    words = ("--acc-bits", "12,18", "--overflow", "wrap,saturate", "--format", "json")
    report = rows_of(sweep(run, tmp_path / "a", *words))
    assert len(report["rows"]) == 2 * 4 * 4
    by_array = {}
    for row in report["model"]:
        if row["split"] == "W4A8":
            by_array[row["acc_bits"], row["overflow"]] = row
    assert set(by_array) == {(b, o) for b in (12, 18) for o in ("wrap", "saturate")}
    assert by_array[12, "wrap"]["overflow_count"] > by_array[18, "wrap"]["overflow_count"]
    assert by_array[12, "wrap"]["output_error"] > by_array[18, "wrap"]["output_error"]


def test_presets_replace_the_array_of_the_accelerator(run):
    words = ("emulate", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt")
    words = (*words, "--layers", "*.0.attn1.to_q", "--split", "W8A8", "--format", "json")
    rows = rows_of(run(*words, "--array", "imma,gemmini,imma_satfinite"))["rows"]
    assert [row["overflow"] for row in rows] == ["wrap", "wrap", "saturate"]
    assert {row["overflow_count"] for row in rows} == {0}
    assert len({row["output_error"] for row in rows}) == 1
    narrow = rows_of(run(*words, "--array", "imma", "--acc-bits", 12))["rows"][0]
    assert narrow["first_overflow"].startswith("main k=")
    assert narrow["acc_bits"] == 12 < narrow["safe_acc_bits"] <= narrow["guaranteed_acc_bits"]


def commands(group=app, path=()):
    """(words, callback) of every command, subcommands included."""
    for info in group.registered_commands:
        yield (*path, info.name), info
    for sub in group.registered_groups:
        yield from commands(sub.typer_instance, (*path, sub.name))


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_every_command_has_help_with_examples_and_is_in_the_readme(
    run, request, words, monkeypatch
):
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert f"loraq-sim {' '.join(words)}" in result.stdout.split("Examples")[1]
    readme = (request.config.rootpath / "README.md").read_text()
    assert f"loraq-sim {' '.join(words)}" in readme
    # A terminal of 80 columns has all of it, too: nothing is cut.
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run(*words, "--help").stdout
    assert "\u2026" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_every_option_has_help(words):
    import typer

    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    for parameter in command.params:
        assert parameter.help, f"{' '.join(words)}: {parameter.name}"


@pytest.mark.parametrize("name", ["sweep", "solve", "emulate", "images", "vectors"])
def test_help_names_every_method(run, name):
    from loraq_sim.solvers import METHODS

    text = " ".join(run(name, "--help").stdout.replace("│", " ").split())
    assert f"Solver: {', '.join(METHODS)}" in text


def test_help_shows_the_extra_of_clusters(run):
    assert "[cluster]" in run("sweep", "--help").stdout


def test_version_and_help_without_a_command(run):
    from loraq_sim import __version__

    assert run("--version").stdout.strip() == f"loraq-sim {__version__}"
    assert "sweep" in run("--help").stdout


def test_no_help_text_loses_its_brackets():
    # rich takes what stands in brackets for markup and drops it.
    def helps(group):
        for inner in getattr(group, "commands", {}).values():
            yield from helps(inner)
        yield from (
            parameter.help or "" for parameter in group.params if hasattr(parameter, "help")
        )

    texts = list(helps(typer.main.get_command(app)))
    assert len(texts) > 100
    assert [text for text in texts if re.search(r"(?<!\\)\[(?!/?bold\])", text)] == []
