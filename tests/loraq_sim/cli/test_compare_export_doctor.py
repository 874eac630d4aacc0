"""What is done with result stores afterwards, and the check of an installation."""

import csv
import json
import re
import sqlite3
import sys

import pytest

from loraq_sim.results.rows import failed_row
from loraq_sim.results.store import ResultStore
from loraq_sim.results.store_records import trial_rows
from loraq_sim.results.totals import model_totals


@pytest.fixture
def stores(sweep, tmp_path):
    """Two stores of one sweep; in the second a layer's error is 10 % larger and a row is gone."""
    for name in ("a", "b"):
        assert sweep(tmp_path / name).exit_code == 0
    path = tmp_path / "b" / "results.sqlite"
    with ResultStore.open(path, create=True) as store:
        for row in store.rows():
            if row["layer"].endswith("to_q") and row["split"] == "W4A4":
                changed = row | {"output_error": 1.1 * row["output_error"]}
                store.add(changed.pop("case_id"), changed)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM rows WHERE layer LIKE '%to_k' AND split='W4A8'")
    connection.close()
    return tmp_path / "a", tmp_path / "b"


def test_equal_stores_have_no_differences(command, stores):
    result = command("compare", stores[0], stores[0], "--fail-if", "output_error>+0%")
    assert (result.exit_code, result.stdout) == (0, "no differences\n")


@pytest.mark.parametrize("output", ["table", "json", "csv", "md"])
def test_changes_and_lost_rows_are_shown(command, stores, output):
    result = command("compare", *stores, "--format", output)
    assert result.exit_code == 0, result.output
    assert "output_error" in result.stdout
    assert "5 rows in both, 1 value changed; 1 only before, 0 only after" in result.stderr
    if output == "json":
        found = json.loads(result.stdout)
        (change,) = found["changes"]
        assert change["change_percent"] == pytest.approx(10.0)
        assert [row["split"] for row in found["only"]] == ["W4A8"]


def test_rows_of_one_store_say_what_is_done_to_their_inputs(command, sweep, stores, tmp_path):
    sweep(tmp_path / "rotated", "--rotate", "hadamard")
    result = command("compare", stores[0], tmp_path / "rotated")
    lines = [line for line in result.stdout.splitlines() if line.split()[:1] == ["after"]]
    assert lines
    assert all(" hadamard " in line for line in lines)
    found = command("compare", stores[0], tmp_path / "rotated", "--format", "json")
    only = json.loads(found.stdout)["only"]
    assert {(row["only"], row["rotation"]) for row in only} == {
        ("before", None),
        ("after", "hadamard"),
    }


def test_a_regression_ends_with_3_and_names_the_row(command, stores):
    limits = ("--fail-if", "sqnr_db<-1", "--fail-if", "output_error>+2%")
    result = command("compare", *stores, *limits)
    assert result.exit_code == 3
    assert "attn1.to_q W4A4: output_error" in result.stderr
    assert command("compare", *stores, "--fail-if", "output_error>+20%").exit_code == 0
    assert command("compare", *stores[::-1], "--fail-if", "output_error>+2%").exit_code == 0


def test_stores_without_a_common_row_miss_every_limit(command, sweep, stores, tmp_path):
    sweep(tmp_path / "c", "--seed", 9, "--split", "W4A4+W8A8r4", "--tokens", 8)
    result = command("compare", stores[0], tmp_path / "c", "--fail-if", "output_error>+2%")
    assert (result.exit_code, "no row in common" in result.stderr) == (3, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fail-if", "output_eror>+2%"), "did you mean 'output_error'"),
        (("--fail-if", "nonsense"), "must look like"),
    ],
)
def test_bad_limits_are_one_line(command, stores, words, message):
    result = command("compare", *stores, *words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_markdown_of_a_comparison_is_a_summary_for_a_pull_request(command, stores):
    limit = ("--fail-if", "output_error>+2%")
    result = command("compare", *stores, *limit, "--format", "md")
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert lines[0] == "### loraq-sim compare: 1 value beyond its limit"
    text = result.stdout
    assert "Verdict: Build " in text
    assert text.index("**Beyond their limit**") < text.index("**Changed values**")
    beyond = text.split("**Beyond their limit**")[1].split("**Changed values**")[0]
    assert beyond.count("\n| ") == 3
    assert "| output_error&gt;+2% |" in beyond
    assert "**Rows of one store only**" in text
    assert "1 row in both" not in lines[0]
    same = command("compare", stores[0], stores[0], *limit, "--format", "md")
    assert same.exit_code == 0
    assert same.stdout.splitlines()[0] == "### loraq-sim compare: all within their limits"
    assert "no differences" in same.stdout
    plain = command("compare", *stores, "--format", "md")
    assert plain.stdout.startswith("### loraq-sim compare: ")
    assert "limit" not in plain.stdout.splitlines()[0]


def test_a_long_comparison_is_cut_in_markdown_and_whole_in_json(command, sweep, tmp_path):
    for name in ("a", "b"):
        sweep(tmp_path / name)
    path = tmp_path / "b" / "results.sqlite"
    with ResultStore.open(path, create=True) as store:
        for row in store.rows():
            for column in ("output_error", "weight_error", "latency_s", "energy_j", "cosine"):
                row[column] = row[column] * 1.5
            store.add(row.pop("case_id"), row)
    words = ("compare", tmp_path / "a", tmp_path / "b")
    rows = json.loads(command(*words, "--format", "json").stdout)["rows"]
    assert len(rows) > 20
    shown = command(*words, "--format", "md").stdout
    assert f"the first 20 of {len(rows)}" in shown
    assert shown.count("\n| ") == 22


def test_a_verdict_that_changed_is_said(command, sweep, tmp_path):
    for name in ("a", "b"):
        sweep(tmp_path / name)
    path = tmp_path / "b" / "results.sqlite"
    before = json.loads(command("pareto", tmp_path / "a", "--format", "json").stdout)["verdict"]
    with ResultStore.open(path, create=True) as store:
        for row in store.rows():
            if row["split"] == before["split"]:
                row["output_error"] = 0.9
                store.add(row.pop("case_id"), row)
    words = ("compare", tmp_path / "a", tmp_path / "b")
    found = json.loads(command(*words, "--format", "json").stdout)["verdicts"]
    assert found["before"] == before["headline"] != found["after"]
    for form in ("table", "md"):
        said = command(*words, "--format", form).stdout
        assert f"Verdict: {found['after']} (before: {found['before']})" in said


def test_export_writes_what_the_store_holds(command, sweep, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sweep(tmp_path / "a")
    files = ("--csv", tmp_path / "r.csv", "--parquet", tmp_path / "r.parquet")
    result = command("export", tmp_path / "a", *files)
    assert result.exit_code == 0, result.output
    with (tmp_path / "r.csv").open(newline="") as file:
        texts = list(csv.DictReader(file))
    values = parquet.read_table(tmp_path / "r.parquet").to_pylist()
    assert len(values) == len(texts) == 6
    for text, value in zip(texts, values, strict=True):
        assert list(text) == list(value)
        numbers = {name for name, v in value.items() if isinstance(v, float)}
        for name, v in value.items():
            if name in numbers:
                assert float(text[name]) == v
            else:
                assert text[name] == ("" if v is None else str(v))
        assert isinstance(value["pareto"], bool)
    assert command("export", tmp_path / "a", *files).exit_code == 2
    assert command("export", tmp_path / "a", *files, "--force").exit_code == 0


@pytest.mark.parametrize("by", ["layer", "model"])
def test_trials_have_the_columns_of_optuna_and_read_as_pandas_writes_them(
    command, sweep, tmp_path, by
):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    sweep(tmp_path / "a")
    frames = []
    for end, read in (("csv", pandas.read_csv), ("parquet", pandas.read_parquet)):
        path = tmp_path / f"t.{end}"
        done = command("export", tmp_path / "a", "--to", "trials", "--by", by, "--out", path)
        assert done.exit_code == 0, done.output
        frames.append(read(path))
    texts, trials = frames
    with ResultStore.open(tmp_path / "a" / "results.sqlite") as store:
        rows = store.rows() if by == "layer" else model_totals(store.rows())
    assert list(trials.columns) == list(texts.columns)
    assert list(trials["number"]) == list(range(len(rows)))
    heads = [name.split("_")[0] for name in trials.columns]
    order = ["number", "values", "datetime", "duration", "params", "user", "state"]
    assert [h for i, h in enumerate(heads) if i == 0 or heads[i - 1] != h] == order
    assert set(trials["state"]) == {"COMPLETE"}
    for i, row in enumerate(rows):
        assert trials["params_split"][i] == row["split"] == texts["params_split"][i]
        for name in ("output_error", "latency_s", "weight_bytes"):
            assert trials[f"values_{name}"][i] == row[name] == texts[f"values_{name}"][i]
        assert trials["user_attrs_utilization"][i] == row["utilization"]
    if by == "layer":
        seconds = pandas.to_timedelta(texts["duration"]).dt.total_seconds()
        assert list(seconds) == pytest.approx([row["seconds"] for row in rows], abs=1e-6)
        assert "params_layer" in trials
    else:
        assert "params_layer" not in trials


def test_a_failed_case_is_a_failed_trial():
    rows = [failed_row("too bad", {"layer": "a", "split": "W4A4", "accelerator": "aie2"})]
    (trial,), _ = trial_rows([*rows])
    assert (trial["state"], trial["user_attrs_message"]) == ("FAIL", "too bad")


def test_export_to_a_word_or_a_file_replaces_nothing(command, sweep, tmp_path):
    pytest.importorskip("pyarrow")
    sweep(tmp_path / "a")
    for words, file in (
        (("--to", "csv"), tmp_path / "a" / "rows.csv"),
        (("--to", "parquet"), tmp_path / "a" / "rows.parquet"),
        (("--to", "trials"), tmp_path / "a" / "trials.csv"),
        (("--to", tmp_path / "mine.parquet"), tmp_path / "mine.parquet"),
        (("--to", "csv", "--out", tmp_path / "mine.csv"), tmp_path / "mine.csv"),
    ):
        assert command("export", tmp_path / "a", *words).exit_code == 0
        held = file.read_bytes()
        again = command("export", tmp_path / "a", *words)
        assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
        assert "is there already" in again.stderr
        assert file.read_bytes() == held
        assert command("export", tmp_path / "a", *words, "--force").exit_code == 0
    assert (tmp_path / "mine.csv").read_bytes() == (tmp_path / "a" / "rows.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "rows.xlsx"), "must be csv, parquet, trials or a file that ends in"),
        (("--to", "csv", "--out", "a.parquet"), "--to csv writes .csv, got --out a.parquet"),
        (("--to", "a.csv", "--out", "b.csv"), "both name a file"),
        (("--out", "b.csv"), "--out is the file of --to"),
        (("--to", "csv", "--by", "model"), "give --to trials"),
    ],
)
def test_odd_exports_are_one_line(command, tmp_path, words, message):
    result = command("export", tmp_path, *words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_parquet_without_pyarrow_is_one_line(command, sweep, tmp_path, monkeypatch):
    sweep(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = command("export", tmp_path / "a", "--parquet", tmp_path / "r.parquet")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "pip install pyarrow" in result.stderr


def test_export_needs_a_file_to_write(command, sweep, tmp_path):
    sweep(tmp_path / "a")
    result = command("export", tmp_path / "a")
    assert (result.exit_code, "nothing to write" in result.stderr) == (2, True)


def test_doctor_finds_this_installation_sound(command):
    result = command("doctor", "--format", "json")
    assert result.exit_code == 0, result.output
    states = {row["check"]: row["state"] for row in json.loads(result.stdout)["rows"]}
    assert {"numpy", "kernels", "processor", "cache folder", "result store"} <= set(states)
    assert set(states.values()) <= {"ok", "missing"}


@pytest.mark.parametrize(
    ("variable", "value", "check"),
    [
        ("LORAQ_SIM_CACHE", "/proc/nowhere", "cache folder"),
        ("LORAQ_SIM_KERNELS", "abacus", "processor"),
    ],
)
def test_doctor_ends_with_1_and_names_what_is_broken(command, monkeypatch, variable, value, check):
    monkeypatch.setenv(variable, value)
    result = command("doctor")
    assert result.exit_code == 1
    assert check in result.stderr.split("checks failed:")[1]


def test_doctor_tells_of_features_kernels_extras_and_its_time(command, monkeypatch):
    from loraq_sim.cli import doctor
    from loraq_sim.kernels.processor import choose_path

    monkeypatch.setitem(doctor._EXTRAS, "report", ("no-such-distribution",))
    result = command("doctor", "--format", "json")
    found = {row["check"]: row for row in json.loads(result.stdout)["rows"]}
    assert result.exit_code == 0  # an extra is optional
    assert found["extra report"]["detail"] == "optional, without no-such-distribution"
    assert {f"extra {name}" for name in ("cluster", "diffusion", "parquet", "docs")} <= set(found)
    assert found["processor"]["detail"].endswith(f": {choose_path()} kernels")
    assert re.fullmatch(r"\d+\.\d s", found["time"]["detail"])


def test_doctor_says_where_compiled_code_is_kept_or_why_not(monkeypatch):
    from loraq_sim.cli.doctor import _kernel_cache
    from loraq_sim.kernels import accumulate, jit

    assert accumulate.BLOCK
    assert _kernel_cache()["state"] == "ok"
    monkeypatch.setitem(jit._state, "problem", "No space left on device")
    row = _kernel_cache()
    assert row["state"] == "missing"
    assert "not kept (No space left on device): every start compiles again" in row["detail"]


def test_doctor_counts_the_functions_that_are_compiled(monkeypatch, tmp_path):
    from loraq_sim.cli.doctor import _kernel_cache
    from loraq_sim.kernels import jit

    monkeypatch.setattr(jit, "_state", {"folder": str(tmp_path)})
    # Two versions of one function, and another one.
    for name in ("tiles.avx512_exact-12", "tiles.avx512_exact-40", "round_groups.round_groups-54"):
        (tmp_path / f"{name}.py311.nbi").touch()
    assert _kernel_cache()["detail"] == f"{tmp_path}: 2 functions compiled"


def test_doctor_says_which_kernels_do_not_compile(command, monkeypatch):
    from loraq_sim.kernels import processor

    monkeypatch.setattr(processor, "_refused", {"avx512": "unknown instruction"})
    result = command("doctor", "--format", "json")
    assert result.exit_code == 0
    (row,) = [row for row in json.loads(result.stdout)["rows"] if row["check"] == "kernels"]
    assert "avx512 kernels do not compile (unknown instruction)" in row["detail"]


@pytest.mark.parametrize("verb", ["sweep", "emulate"])
def test_kernels_that_do_not_exist_are_one_line(command, sweep, monkeypatch, tmp_path, verb):
    monkeypatch.setenv("LORAQ_SIM_KERNELS", "foo")
    words = ("emulate", "--layer-dump", "examples/tiny_pixart.pt", "--hw", "aie2")
    words += ("--layers", "transformer_blocks.0.attn1.to_q", "--split", "W4A4", "--preset", "fast")
    result = sweep(tmp_path / "s") if verb == "sweep" else command(*words)
    assert result.exit_code == 2
    expected = "LORAQ_SIM_KERNELS must be one of avx512, avx2, portable, loops, got 'foo'"
    assert [line for line in result.stderr.splitlines() if line] == [f"error: {expected}"]


def test_a_home_that_cannot_be_written_is_slower_and_not_broken(command, monkeypatch):
    for variable in ("LORAQ_SIM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    result = command("doctor", "--format", "json")
    assert result.exit_code == 0, result.output
    found = {row["check"]: row for row in json.loads(result.stdout)["rows"]}
    for name in ("cache folder", "solution cache"):
        assert found[name]["state"] == "missing"
        assert "sweeps solve again; set LORAQ_SIM_CACHE" in found[name]["detail"]
