"""How work and size grow with a store, by counts and bytes, never by a clock.

`benchmarks/big_store.py` measures time and memory on 100,000 rows.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraq_sim.allocation import solve
from loraq_sim.cli.app import app
from loraq_sim.reporting.figures import save_figure
from loraq_sim.reporting.gather import gather
from loraq_sim.reporting.layer_figures import accumulators_figure, heat_map_figure
from loraq_sim.reporting.page import html_report
from loraq_sim.reporting.plot_data import layer_cells, plot_data
from loraq_sim.reporting.report_data import answers
from loraq_sim.reporting.sections import compare_methods
from loraq_sim.results import store_file
from loraq_sim.results.store import ResultStore

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def big_store():
    spec = importlib.util.spec_from_file_location("big_store", ROOT / "benchmarks/big_store.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(big_store, tmp_path):
    big_store.write_store(tmp_path / "results.sqlite", 600)
    return tmp_path / "results.sqlite"


@pytest.mark.parametrize(
    ("words", "most"), [(("export", "--csv", "e.csv"), 1), (("pareto",), 1), (("merge", "m"), 1)]
)
def test_a_command_reads_the_rows_as_often_as_it_must(store, tmp_path, monkeypatch, words, most):
    reads = []
    fetched = ResultStore._fetched

    def count(self, query, *more):
        # Names of cases that were planned are short, and few where all have a row.
        reads.extend([query] if "extra" in query else [])
        return fetched(self, query, *more)

    monkeypatch.setattr(ResultStore, "_fetched", count)
    monkeypatch.chdir(tmp_path)
    words = [words[0], str(store), *words[1:]] if words[0] != "merge" else [*words, str(store)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert 1 <= len(reads) <= most, reads


def test_the_page_stores_each_number_once(store):
    with ResultStore.open(store) as opened:
        data = gather(opened.rows(), [])
    cells = layer_cells(data, data.contexts[0])
    width = len(cells["names"])
    found = {quantity["key"]: quantity for quantity in cells["quantities"]}
    assert len(found["output_error"]["z"][0]) == width > 1
    # No layer of these rows overflows: a line is one number.
    assert set(found["overflow_count"]["z"]) == {0}
    # What the page can divide is not stored, but means the same.
    relative = found["relative:output_error"]
    assert (relative["of"], "z" in relative) == ("output_error", False)
    totals = {row["label"]: row["output_error"] for row in data.totals_of(data.contexts[0])}
    for label, by in zip(cells["labels"], relative["by"], strict=True):
        assert by == pytest.approx(totals[label], rel=1e-4)


def test_the_bytes_of_a_cell_are_few(big_store, store, monkeypatch):
    with ResultStore.open(store) as opened:
        data = gather(opened.rows(), [])
    sizes = {}
    for many in (10**9, 100):
        monkeypatch.setattr("loraq_sim.reporting.plot_data._MANY_CELLS", many)
        cells = [layer_cells(data, context)["quantities"] for context in data.contexts]
        sizes[many] = len(json.dumps(cells, separators=(",", ":"))) / len(data.rows)
    # Four matrices of three digits, and lines that are one number.
    assert sizes[100] < 45
    assert sizes[100] < 0.9 * sizes[10**9]


@pytest.mark.parametrize(
    ("words", "most"), [(("export", "--csv", "e.csv"), 1), (("pareto",), 1), (("merge", "m"), 1)]
)
def test_a_row_is_checked_and_sealed_once(store, tmp_path, monkeypatch, words, most):
    made = []
    checksum = store_file._row_checksum
    monkeypatch.setattr(
        store_file, "_row_checksum", lambda *values: made.append(0) or checksum(*values)
    )
    monkeypatch.chdir(tmp_path)
    words = [words[0], str(store), *words[1:]] if words[0] != "merge" else [*words, str(store)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert len(made) == most * 600


def test_texts_are_kept_once_and_rows_not_twice(store):
    with ResultStore.open(store) as opened:
        rows = opened.possible_rows()
    assert len({id(row["split"]) for row in rows}) == len({row["split"] for row in rows})
    # A tuple of its own, and names that all rows share.
    assert len({id(row.places) for row in rows}) == 1
    data = gather(rows, [])
    assert len({id(row.places) for row in data.rows}) == 1
    assert all(
        mine["output_error"] is own["output_error"]
        for mine, own in zip(data.rows, rows, strict=True)
    )
    assert sys.getsizeof(data.rows[0].cells) < sys.getsizeof(dict(rows[0])) / 2


def test_mixes_of_many_layers_come_from_one_front(big_store, tmp_path, monkeypatch):
    """One choice for each context, whatever the number of costs and splits."""
    path = tmp_path / "results.sqlite"
    # 110 layers in 60 splits on 5 accelerators.
    big_store.write_store(path, 110 * 300)
    with ResultStore.open(path) as opened:
        rows = opened.rows()
    chosen = []
    choose = solve.choose_by_prices
    monkeypatch.setattr(
        "loraq_sim.allocation.model.choose_by_prices",
        lambda problem: chosen.append(problem) or choose(problem),
    )
    data = gather(rows, [])
    assert len(data.mixed) == 10
    assert len(chosen) == 5
    assert all(len(mix.gains) == 60 and len(mix.frontier) <= 200 for mix in data.mixed)
    text = html_report(data)
    own = len(text) - len(re.search(r'id="library">(.*?)</script>', text)[1])
    # 1.82 MB when this was written; plain matrices would add 0.5 MB.
    assert 'id="packed-layers"' in text
    assert own < 2_000_000, own


def test_pictures_of_many_cases_draw_some(store):
    with ResultStore.open(store) as opened:
        data = gather(opened.rows(), [])
    drawn = plot_data(data, answers(data), compare_methods(data))
    context = data.contexts[0]
    assert len(drawn["layers"][context]["labels"]) == 60
    for figure in (
        heat_map_figure(drawn, context, data.error),
        accumulators_figure(drawn, context),
    ):
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len(labels) == 24
        assert drawn["answers"][context] in labels
        assert "24 of 60 cases" in " ".join(text.get_text() for text in figure.texts)


def test_a_cost_that_fewer_rows_know_has_a_problem_of_its_own(store):
    with ResultStore.open(store) as opened:
        rows = opened.rows()
    rows[0]["latency_s"] = None
    data = gather(rows, [])
    context = str(rows[0]["accelerator"])
    totals = {
        mix.cost: {gain["split"]: gain[mix.cost] for gain in mix.gains}
        for mix in data.mixed
        if mix.context == context
    }
    # The split of the row without a time runs in all layers by its bytes only.
    assert rows[0]["split"] not in totals["latency_s"]
    own = [r for r in rows if (r["split"], r["accelerator"]) == (rows[0]["split"], context)]
    assert totals["weight_bytes"][rows[0]["split"]] == sum(row["weight_bytes"] for row in own)


@pytest.mark.pictures
def test_a_heat_map_is_no_image_and_its_file_has_few_pixels(store, tmp_path):
    from PIL import Image

    with ResultStore.open(store) as opened:
        data = gather(opened.rows(), [])
    drawn = plot_data(data, answers(data), compare_methods(data))
    figure = heat_map_figure(drawn, data.contexts[0], data.error)
    # Matplotlib scales images to the pixels of the file as floats.
    assert not any(axes.images for axes in figure.axes[:1])
    (cells,) = [found for found in figure.axes[0].collections if found.get_array() is not None]
    assert cells.get_array().shape == (24, len(drawn["layers"][data.contexts[0]]["names"]))
    with Image.open(save_figure(figure, tmp_path / "few.png", most_pixels=1e6)) as few:
        assert 0.9e6 < few.width * few.height <= 1e6
    with Image.open(save_figure(figure, tmp_path / "all.png")) as every:
        assert every.width == 11 * 200


def test_pictures_of_some_cases_show_the_answer_the_least_error_and_the_front(store):
    """They are read for these; what lies between them is drawn where there is room."""
    with ResultStore.open(store) as opened:
        data = gather(opened.rows(), [])
    drawn = plot_data(data, answers(data), compare_methods(data))
    for context in data.contexts:
        totals = data.totals_of(context)
        least = min(totals, key=lambda row: row[data.error])["label"]
        front = {row["label"] for row in totals if drawn["answerCosts"][context] in row["fronts"]}
        assert 2 < len(front) < 24
        for figure in (
            heat_map_figure(drawn, context, data.error),
            accumulators_figure(drawn, context),
        ):
            labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
            assert {least, drawn["answers"][context], *front} <= labels
