"""The page as text: complete, closed to the outside, equal for equal input, honest on odd input."""

import builtins
import json
import os
import re
import subprocess
import sys

import pytest

from loraq_sim.errors import InputError
from loraq_sim.reporting.page import check_report_extra, html_report

SECTIONS = ("answer", "front", "layers", "costs", "accumulators", "methods", "mixed", "trust")


def drawn(text):
    content = re.search(r'id="drawn">(.*?)</script>', text, re.DOTALL)[1]
    # JSON.parse of a browser knows neither NaN nor Infinity, json.loads reads both.
    return json.loads(content, parse_constant=pytest.fail)


def test_the_page_has_every_section_and_is_small(gathered):
    text = html_report(gathered(methods=("loraq", "svdquant")))
    for name in (*SECTIONS, "origin"):
        assert f'<section id="{name}">' in text, name
    assert len(text.encode()) < 3_500_000


def test_a_whole_model_on_two_accelerators_stays_small(gathered):
    splits = ("W4A4", "W4A8", "W8A8", *(f"W4A4+W8A8r{8 * i}" for i in range(1, 11)))
    text = html_report(gathered(n_layers=280, splits=splits))
    assert len(drawn(text)["layers"]["aie2"]["names"]) == 280
    assert len(text.encode()) < 4_000_000


def test_the_page_names_no_address_to_load_from(gathered):
    text = html_report(gathered())
    head = text.split('id="library"')[0]
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", head)
    assert "@import" not in head
    assert "url(" not in head
    policy = re.search(r'Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src &#39;none&#39;") or policy.startswith(
        "default-src 'none'"
    )
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def test_equal_data_give_an_equal_page_in_every_process(invented_rows, gathered, tmp_path):
    # Sets of words are walked in another order under another hash seed.
    rows, path, page = invented_rows(n_layers=3), tmp_path / "rows.json", tmp_path / "page.html"
    path.write_text(json.dumps(rows))
    code = (
        "import json, sys; from pathlib import Path\n"
        "from loraq_sim.reporting.gather import gather\n"
        "from loraq_sim.reporting.page import html_report\n"
        "from loraq_sim.reporting import points\n"
        "points.CONTROLS = (('columns', 'units.columns', (1.0, 2.0)),)\n"
        "rows = json.loads(Path(sys.argv[1]).read_text())\n"
        "Path(sys.argv[2]).write_text(html_report(gather(rows, (), title=None)), 'utf-8')\n"
    )
    command = [sys.executable, "-c", code, str(path), str(page)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert page.read_text("utf-8") == html_report(gathered(rows))


def test_the_headline_is_the_first_heading_and_the_title(gathered):
    text = html_report(gathered())
    heading = re.search(r"<h1>(.*?)</h1>", text)[1]
    assert heading.startswith("Build ")
    assert f"<title>{heading} ·" in text


def test_one_row_is_enough(invented_rows, gathered):
    rows = invented_rows(n_layers=1, splits=("W4A4",), accelerators=("aie2",))
    assert len(rows) == 1
    text = html_report(gathered(rows))
    assert "Build W4A4 on aie2" in text
    assert '<section id="mixed">' not in text
    assert '<section id="methods">' not in text


def test_a_store_without_activations_is_judged_by_its_weights(invented_rows, gathered):
    rows = invented_rows()
    unknown = ("output_error", "sqnr_db", "safe_acc_bits", "guaranteed_acc_bits", "overflow_count")
    for row in rows:
        row |= dict.fromkeys(unknown)
    data = gathered(rows)
    text = html_report(data)
    assert data.error == "weight_error"
    assert "weight error" in re.search(r"<ul>.*?</ul>", text, re.DOTALL)[0]
    assert '<section id="accumulators">' not in text


def test_failed_rows_are_counted_listed_and_drawn_as_gaps(invented_rows, gathered):
    rows = invented_rows(accelerators=("aie2",))
    broken = rows[0] | {"status": "failed", "message": "the disk was full"}
    for key in ("output_error", "latency_s", "weight_bytes", "rank", "bound"):
        broken[key] = None
    text = html_report(gathered([broken, *rows[1:]]))
    assert "1 of 42 layer cases failed" in text
    assert "the disk was full" in text
    assert len(drawn(text)["layers"]["aie2"]["failed"]) == 1


def test_a_store_in_which_everything_failed_still_makes_a_page(invented_rows, gathered):
    rows = [
        row | {"status": "failed", "message": "no", "output_error": None, "latency_s": None}
        for row in invented_rows(n_layers=2, accelerators=("aie2",))
    ]
    assert "No split could be evaluated" in html_report(gathered(rows))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", (0, 1, 2)),
        ("preset", ("fast", "best")),
        ("acc_bits", (16, 20)),
        ("family", ("int", "mxint")),
        ("token_limit", (None, 16)),
        ("options", ("", '{"fused": false}')),
        ("dump", ("a.pt", "b.pt")),
    ],
)
def test_settings_that_differ_make_cases_of_their_own(invented_rows, gathered, key, values):
    rows = invented_rows(n_layers=3, splits=("W4A4", "W4A4+W8A8r16"), accelerators=("aie2",))
    data = gathered([row | {key: value} for value in values for row in rows])
    assert len(data.totals) == 2 * len(values)
    names = {(row["context"], row["label"]) for row in data.totals}
    assert len(names) == len(data.totals)
    assert len(drawn(html_report(data))["points"]) == len(data.totals)


def test_infinite_and_missing_numbers_do_not_break_the_data(invented_rows, gathered):
    rows = invented_rows(n_layers=2, accelerators=("aie2",))
    rows[0] |= {"sqnr_db": float("inf"), "output_error": 0.0, "energy_j": None}
    rows[1] |= {"dram_bytes": None, "calls_per_step": None, "group": None, "kind": None}
    text = html_report(gathered(rows))
    assert len(drawn(text)["points"]) == len({row["split"] for row in rows})
    assert not re.search(r">\s*-?(nan|inf|None|undefined)\b", text.split('id="library"')[0], re.I)


@pytest.mark.parametrize("name", ["jinja2", "plotly"])
def test_a_missing_extra_says_what_to_install(monkeypatch, name):
    real = builtins.__import__

    def refuse(wanted, *rest):
        if wanted == name:
            raise ImportError(wanted)
        return real(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=rf"needs {name}.*pip install 'loraq-sim\[report\]'"):
        check_report_extra()
