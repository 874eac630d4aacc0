"""``loraq-sim report`` on a real sweep: files, words, refusals."""

import json
import re
import shlex

import pytest

from loraq_sim.recipe import read_recipe
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps.run import utc_now


@pytest.fixture
def store(sweep, tmp_path):
    assert sweep(tmp_path / "demo", "--hw", "h100").exit_code == 0
    return tmp_path / "demo"


def change_aie2(store, change):
    with ResultStore.open(store / "results.sqlite", create=True) as opened:
        rows = [row for row in opened.rows() if row["accelerator"] == "aie2"]
        opened.relabel({row["case_id"]: change(row) for row in rows})


def test_the_report_is_one_page_with_pictures_and_tables_beside_it(command, store, tmp_path):
    page = tmp_path / "out" / "report.html"
    done = command("report", store, "--out", page)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Build W4A")
    assert f"wrote {page}" in done.stderr
    text = page.read_text()
    assert f"<h1>{done.stdout.splitlines()[0]}</h1>" in text
    files = {path.name for path in (tmp_path / "out" / "report_files").iterdir()}
    assert {"summary.md", "cases.csv", "layers.csv", "pareto_aie2.png", "pareto_h100.svg"} <= files
    assert {"cost_model.png", "cost_model.csv", "mixed_aie2.csv"} <= files


def test_without_out_the_page_lies_beside_the_store(command, store):
    assert command("report", store, "--page-only", "--quiet").exit_code == 0
    assert (store / "report.html").exists()
    assert not (store / "report_files").exists()
    title = command(
        "report", store / "results.sqlite", "--page-only", "--force", "--title", "A & B"
    )
    assert title.exit_code == 0
    assert "A &amp; B" in (store / "report.html").read_text()


def test_provenance_and_cost_parts_of_the_sweep_are_in_the_page(command, store):
    command("report", store, "--page-only")
    text = (store / "report.html").read_text()
    with ResultStore.open(store / "results.sqlite") as opened:
        (run,) = opened.provenance()
        rows = opened.rows()
    assert run["dump_digest"][:16] in text
    assert run["started"] in text
    drawn = json.loads(re.search(r'id="drawn">(.*?)</script>', text)[1])
    assert len(drawn["parts"]) == len({(r["accelerator"], r["split"], r["kind"]) for r in rows})


def test_what_is_there_is_not_replaced_unasked(command, store):
    assert command("report", store, "--page-only").exit_code == 0
    refused = command("report", store, "--page-only")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert command("report", store, "--page-only", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--out", "report.pdf"), "a report is an HTML file"),
        (("--out", "{folder}.html"), "is a folder"),
    ],
)
def test_bad_places_are_refused_in_one_line(command, store, tmp_path, words, told):
    (tmp_path / "taken.html").mkdir()
    words = [word.format(folder=tmp_path / "taken") for word in words]
    done = command("report", store, *words)
    assert done.exit_code == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_and_an_empty_store_are_refused(command, tmp_path):
    assert command("report", tmp_path / "nowhere").exit_code == 2
    with ResultStore.open(tmp_path / "results.sqlite", create=True) as opened:
        opened.begin_run({"started": utc_now()})
    done = command("report", tmp_path)
    assert done.exit_code == 2
    assert "holds no row yet" in done.stderr


def test_an_accelerator_whose_file_is_gone_keeps_its_results(command, store):
    change_aie2(store, lambda row: {"accelerator": "lost_npu"})
    assert command("report", store, "--page-only").exit_code == 0
    text = (store / "report.html").read_text()
    assert "lost_npu" in text
    assert "description of lost_npu is not at hand" in text


def test_a_changed_description_gives_no_parts_that_do_not_add_up(command, store):
    change_aie2(store, lambda row: {"latency_s": 2 * row["latency_s"]})
    assert command("report", store, "--page-only").exit_code == 0
    text = (store / "report.html").read_text()
    assert "description of aie2 has changed since the sweep" in text
    drawn = json.loads(re.search(r'id="drawn">(.*?)</script>', text)[1])
    assert {part["context"] for part in drawn["parts"]} == {"h100"}


def test_a_finite_error_is_never_called_infinite(command, store, tmp_path):
    """Of 1e308, which is no float in percent, and of 1e-300, whose square is none."""
    with ResultStore.open(store / "results.sqlite", create=True) as opened:
        errors = {"W4A4": 1e308, "W4A8": 1e-300}
        opened.relabel(
            {row["case_id"]: {"output_error": errors.get(row["split"])} for row in opened.rows()}
        )
    for words in (("pareto", store), ("pareto", store, "--by", "layer")):
        for form in ("table", "md", "json"):
            done = command(*words, "--format", form)
            assert done.exit_code == 0, done.output
            assert not re.search(r"\binf(inite)?\b|nan", done.stdout), (form, words)
    shown = command("pareto", store, "--format", "md").stdout
    assert "1e+310" in shown
    # The least error is not exact.
    assert "1e-298 %" in shown
    done = command("report", store, "--out", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    assert not re.search(r"\binf(inite)?\b", done.stdout)
    text = (tmp_path / "r_files" / "summary.md").read_text()
    assert not re.search(r"\binf(inite)?\b", text)


def test_pictures_of_many_rows_are_png_and_of_some_accelerators(
    command, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("loraq_sim.reporting.page._MANY_DRAWN", 5)
    monkeypatch.setattr("loraq_sim.reporting.page._MOST_PICTURED", 1)
    done = command("report", store, "--out", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "r_files").iterdir()}
    assert not any(name.endswith(".svg") for name in names)
    assert "pareto_aie2.png" in names
    assert "pareto_h100.png" not in names
    # Numbers are those of all.
    assert "choices_h100.csv" in names
    assert "Pictures are of the first 1" in (tmp_path / "r_files" / "summary.md").read_text()
    assert set(
        json.loads(re.search(r'id="drawn">(.*?)</script>', (tmp_path / "r.html").read_text())[1])[
            "answers"
        ]
    ) == {"aie2", "h100"}


def test_cases_that_lack_layers_are_named(command, store, tmp_path):
    with ResultStore.open(store / "results.sqlite", create=True) as opened:
        (first, *_) = [row for row in opened.rows() if row["split"] == "W4A8"]
        opened.relabel({first["case_id"]: {"status": "failed"}})
    done = command("report", store, "--out", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    assert "1 of 2 layers missing in W4A8." in done.stdout


def drawn_in(path):
    return json.loads(re.search(r'id="drawn">(.*?)</script>', path.read_text())[1])


def test_what_a_page_offers_to_copy_gives_the_rows_of_its_points(command, sweep, tmp_path):
    own = ("--acc-bits", "20", "--p-format", "fp16", "--smooth", "0.3", "--unfused", "--seed", "1")
    assert sweep(tmp_path / "asked", *own, "--rows", "self_q=64").exit_code == 0
    assert command("report", tmp_path / "asked", "--page-only").exit_code == 0
    (cases,) = drawn_in(tmp_path / "asked" / "report.html")["cases"].values()
    with ResultStore.open(tmp_path / "asked" / "results.sqlite") as opened:
        rows = opened.rows()
    (text,) = [found for label, found in cases.items() if label.startswith("W4A4+W8A8r8")]
    words = shlex.split(text["command"])
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert command(*words[1:], "--jobs", 0, "--quiet").exit_code == 0
    with ResultStore.open(tmp_path / "again" / "results.sqlite") as opened:
        again = {row["case_id"] for row in opened.rows()}
    assert again == {row["case_id"] for row in rows if row["split"] == "W4A4+W8A8r8"}
    (tmp_path / "recipe.toml").write_text(text["recipe"])
    entry = read_recipe(tmp_path / "recipe.toml").settings("transformer_blocks.0.attn1.to_q")
    assert (entry["split"], entry["smooth"], entry["seed"]) == ("W4A4+W8A8r8", 0.3, 1)
    words = shlex.split(text["vectors"])
    words[words.index("--out") + 1] = str(tmp_path / "vectors")
    done = command(*words[1:], "--quiet")
    assert done.exit_code == 0, done.output


def test_markdown_holds_the_verdict_and_numbers_of_the_page(command, store, tmp_path):
    page = command("report", store, "--page-only", "--quiet")
    done = command("report", store, "--out", tmp_path / "report.md", "--quiet")
    assert done.exit_code == 0
    assert done.stdout == page.stdout
    text = (tmp_path / "report.md").read_text()
    for line in done.stdout.splitlines():
        assert line.partition(": ")[2].replace("`", "\\`")[:60] in text.replace("\\_", "_")
    html = (store / "report.html").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| \\* |", "| * |"))]
    assert rows
    for row in rows:
        for cell in row.strip("| ").split(" | ")[1:]:
            assert f">{cell.strip()}</td>" in html
    assert list(tmp_path.glob("report_files")) == []


def test_two_stores_are_compared_case_by_case(command, store, sweep, tmp_path):
    other = tmp_path / "before"
    assert sweep(other, "--split", "W8A8", "--layers", "ffn_up").exit_code == 0
    words = ("report", store, "--against", other, "--page-only", "--quiet")
    done = command(*words)
    assert done.exit_code == 0, done.output
    drawn = drawn_in(store / "report.html")
    with ResultStore.open(other / "results.sqlite") as opened:
        splits = {row["split"] for row in opened.rows()}
    assert {point["label"] for point in drawn["before"]} == splits
    text = (store / "report.html").read_text()
    assert "Before and now on aie2" in text
    assert "sums of different layers" in text
    empty = command("report", store, "--against", tmp_path / "nowhere", "--force")
    assert empty.exit_code == 2
