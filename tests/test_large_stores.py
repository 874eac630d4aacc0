"""How work and size grow with a store, by counts and bytes, never by a clock.

`benchmarks/big_store.py` measures time and memory on 100,000 rows.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.reporting.gather import gather
from loraq_sim.reporting.plot_data import layer_cells
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
    ("words", "most"), [(("export", "--csv", "e.csv"), 1), (("pareto",), 1), (("merge", "m"), 4)]
)
def test_a_command_reads_the_rows_as_often_as_it_must(store, tmp_path, monkeypatch, words, most):
    reads = []
    fetched = ResultStore._fetched

    def count(self, query):
        reads.append(query)
        return fetched(self, query)

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
