"""Text of strangers at every place where it leaves the program."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import loraq_sim.cli
from loraq_sim.cli.app import app
from loraq_sim.files import csv_cell, json_escaped, markdown_line, shown, shown_line
from loraq_sim.results.store import ResultStore

# Written out anew: what a terminal obeys, or what turns a line around.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

NASTY = (
    "esc\x1b[31mred",
    "\x9b2Jclear",
    "bell\x07back\x08del\x7f",
    "two\nlines\rover",
    "re\u202eversed",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=tab",
    "a|b",
    "<script>alert(1)</script>",
    "![x](http://evil/p.png)",
    "[link](javascript:1)",
    "`code` *bold* __under__ ~~gone~~ $x$",
    "[red]rich[/red]",
    "tr{name}%s\\",
    "$\\frac{",
)


@given(st.text())
def test_nothing_a_terminal_obeys_is_left(text):
    assert not OBEYED.search(shown(text))
    line = shown_line(text)
    assert not OBEYED.search(line)
    assert "\n" not in line
    assert "\t" not in line


@given(st.text())
def test_escaped_json_means_the_same(text):
    printed = json_escaped(json.dumps({text: text}, ensure_ascii=False))
    assert json.loads(printed) == {text: text}
    assert not OBEYED.search(printed)


@given(st.one_of(st.text(), st.sampled_from(NASTY)))
def test_no_cell_of_a_csv_file_is_a_formula(text):
    cell = csv_cell(text)
    assert cell[:1] not in tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
    assert not OBEYED.search(cell)


def test_numbers_and_plain_names_stay_as_they_are():
    for value in (-1.5, 3, None, True, "transformer_blocks.0.attn1.to_q", "W4A4+W8A8r8", "Größe"):
        assert csv_cell(value) == value
    assert csv_cell("=1") == "'=1"
    assert shown("Größe 3 µs\tok\n") == "Größe 3 µs\tok\n"
    assert shown("\x1b[2J") == "\\x1b[2J"


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_a_line_of_markdown_has_as_many_cells_as_it_was_given(texts):
    line = markdown_line(texts)
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == len(texts) + 1
    assert "\n" not in line
    assert "<" not in line


def test_markup_in_a_cell_is_shown_and_not_obeyed():
    assert markdown_line(["a|b", "*", "to_q"]) == "| a\\|b | * | to_q |"
    assert markdown_line(["[x](y)"]) == "| \\[x\\](y) |"
    assert markdown_line(["<b>"]) == "| &lt;b&gt; |"
    assert markdown_line(["__init__"]) == "| \\_\\_init\\_\\_ |"


def row(layer, split, error):
    return {
        **{"layer": layer, "kind": layer, "group": layer, "split": split, "method": "rtn"},
        **{"m": 4, "n": 8, "k": 16, "tokens": 2, "calls_per_step": 1, "preset": "fast"},
        **{"accelerator": "aie2", "seed": 0, "rank": 0, "weight_bytes": 64},
        **{"bits_per_weight": 4.0, "weight_error": error, "output_error": error},
        **{"latency_s": 1e-3 / error, "energy_j": 1e-3, "dram_bytes": 100, "cycles": 10},
        **{"status": "ok", "message": layer, "seconds": 0.1, "dump": layer, "family": "int"},
        **{"group_size": 64, layer: layer, "bound": "memory", "utilization": 0.5},
    }


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "results.sqlite"
    with ResultStore.open(path, create=True) as opened:
        rows = {}
        for number, name in enumerate(NASTY):
            for split, error in (("W4A4", 0.2), ("W8A8", 0.1)):
                rows[f"{number}-{split}"] = row(name, split, error)
        facts = {"command": NASTY[0], "cpu": NASTY[1], "plan": {"dump": NASTY[0]}, "x": list(NASTY)}
        opened.begin_run(facts, list(rows))
        opened.add_all(rows)
    return path


COMMANDS = (
    ("pareto", "{store}"),
    ("pareto", "{store}", "--by", "layer"),
    ("compare", "{store}", "{store}"),
    ("allocate", "{store}", "--hw", "aie2"),
    ("report", "{store}", "--out", "{folder}/r.html"),
    ("export", "{store}", "--csv", "{folder}/e.csv"),
    ("merge", "{folder}/m", "{store}"),
)
FORMATS = ("table", "md", "csv", "json")


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words[:1] + words[2:3]))
def test_no_command_prints_what_a_terminal_obeys(store, tmp_path, words):
    words = [word.format(store=store, folder=tmp_path) for word in words]
    runs = [words]
    if words[0] in ("pareto", "compare"):
        runs = [[*words, "--format", name] for name in FORMATS]
    for run in runs:
        result = CliRunner().invoke(app, run)
        assert result.exception is None or isinstance(result.exception, SystemExit), run
        assert not OBEYED.search(result.output), run
    for path in tmp_path.rglob("*"):
        if path.suffix in (".csv", ".md", ".html", ".toml"):
            found = OBEYED.search(path.read_text(encoding="utf-8"))
            assert not found or found[0] == "\r", path  # the line ends of CSV files
    for path in tmp_path.rglob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.reader(file):
                for cell in line:
                    is_number = re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", cell)
                    assert is_number or cell[:1] not in tuple("=+-@\t\r"), (path, cell)


def test_csv_on_the_screen_is_escaped_like_files(store):
    result = CliRunner().invoke(app, ["pareto", str(store), "--by", "layer", "--format", "csv"])
    assert result.exit_code == 0, result.output
    cells = [cell for line in csv.reader(io.StringIO(result.stdout)) for cell in line]
    assert "'=cmd|' /C calc'!A0" in cells
    assert not [c for c in cells if c[:1] in tuple("=+@\t\r")]


def test_json_is_exact(store):
    result = CliRunner().invoke(app, ["pareto", str(store), "--by", "layer", "--format", "json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = {row["layer"] for row in found["rows"]}
    assert names == set(NASTY)


def test_every_line_of_the_program_goes_through_one_door():
    folder = Path(loraq_sim.cli.__file__).parent
    doors = [p.name for p in folder.glob("*.py") if "typer.echo(" in p.read_text(encoding="utf-8")]
    assert sorted(doors) == ["app.py", "output.py"]
