"""Files beside the page: all there, readable by programs, safe in their names and their text."""

import csv

import pytest
from PIL import Image

from loraq_sim.errors import InputError
from loraq_sim.reporting.page import files_folder, write_report

pytestmark = pytest.mark.pictures


@pytest.fixture(scope="module")
def written(gathered, tmp_path_factory):
    page = tmp_path_factory.mktemp("bundle") / "new" / "report.html"
    data = gathered(accelerators=("aie2",), methods=("loraq", "svdquant"))
    return page, write_report(data, page), data


def test_page_pictures_tables_and_summary_are_written(written):
    page, paths, _ = written
    folder = files_folder(page)
    assert folder.name == "report_files"
    assert sorted(p for p in page.parent.rglob("*") if p.is_file()) == sorted(paths)
    names = {path.name for path in paths}
    for stem in ("pareto_aie2", "layers_aie2", "latency_aie2", "accumulators_aie2"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names
        with Image.open(folder / f"{stem}.png") as picture:
            assert picture.width > 1000
    for stem in ("cases", "layers", "kinds", "cost_parts", "methods_aie2", "mixed_aie2"):
        assert f"{stem}.csv" in names


def test_csv_holds_every_case_at_full_precision(written):
    page, _, data = written
    with (files_folder(page) / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [row["label"] for row in data.totals]
    for row, total in zip(rows, data.totals, strict=True):
        assert float(row["output_error"]) == total["output_error"]


def test_parts_in_the_csv_add_up_to_the_latency_of_the_model(written):
    page, _, data = written
    with (files_folder(page) / "cost_parts.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cost"] == "latency_s"]
    for total in data.totals:
        own = [row for row in rows if row["label"] == total["label"]]
        added = sum(float(row["value"]) * int(row["calls"]) for row in own)
        # A few dozen additions of float64, in another order.
        assert added == pytest.approx(total["latency_s"], rel=1e-12)


def test_the_summary_says_the_answer_and_shows_the_pictures(written):
    page, _, _ = written
    text = (files_folder(page) / "summary.md").read_text()
    assert text.startswith("# Build ")
    for line in text.splitlines():
        if line.startswith("!["):
            assert (files_folder(page) / line.split("(")[1].rstrip(")")).exists()
    assert "pareto_aie2.png" in text


def test_names_of_strangers_neither_leave_the_folder_nor_become_markup(
    gathered, invented_rows, tmp_path
):
    rows = []
    for name in ("../../evil", "..\\evil", "<b>$\\frac{$</b>"):
        rows += [
            row | {"accelerator": name, "layer": f"$\\frac{{{row['layer']}|", "kind": "$\\frac{$"}
            for row in invented_rows(n_layers=3, accelerators=("aie2",))
        ]
    page = tmp_path / "report.html"
    paths = write_report(gathered(rows, title="<script>"), page)
    assert {path.parent for path in paths} == {tmp_path, files_folder(page)}
    assert len({path.name.lower() for path in paths}) == len(paths)
    assert "<script>" not in (files_folder(page) / "summary.md").read_text()


def test_only_the_page_on_request(gathered, tmp_path):
    page = tmp_path / "r.html"
    assert write_report(gathered(n_layers=1), page, with_files=False) == [page]
    assert list(tmp_path.iterdir()) == [page]


def test_a_place_that_cannot_be_written_is_said_and_nothing_is_left(gathered, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make this folder"):
        write_report(gathered(n_layers=1), tmp_path / "file" / "r.html", with_files=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
