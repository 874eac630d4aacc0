"""`lq.sweep`: the same rows and verdict as the command line, in a script, interrupted, in words."""

import json
import math
import re
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.errors import StoreError
from loraq_sim.results.choice import objectives_of
from loraq_sim.results.store import ResultStore
from loraq_sim.results.verdict import verdict_of

SPLITS = ["W4A4", "W4A8", "W4A4+W8A8r8"]
SETTINGS = {"layers": ["*.0.attn1.to_q", "*.0.attn1.to_k"], "tokens": 16, "presets": "fast"}
# What depends on when and how fast a row was made.
NOT_COMPARED = ("seconds", "case_id")


@pytest.fixture(autouse=True)
def in_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def study(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        return lq.sweep("examples/tiny_pixart.pt", "aie2", splits=SPLITS, jobs=0, **SETTINGS)


def test_rows_and_verdict_are_those_of_the_command_line(study, tmp_path):
    words = ["sweep", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt", "--tokens", "16"]
    words += ["--layers", ",".join(SETTINGS["layers"]), "--split", ",".join(SPLITS)]
    words += ["--preset", "fast", "--jobs", "0", "--quiet", "--no-solution-cache"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "demo"), "--format", "json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)

    def compared(rows):
        return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows]

    assert compared(study.rows) == compared(told["rows"])
    assert json.loads(json.dumps(study.verdict().as_dict())) == told["verdict"]
    again = lq.open_study(tmp_path / "demo")
    assert again.verdict().text == study.verdict().text
    assert compared(again.rows) == compared(study.rows)


def test_the_frame_and_the_fronts(study):
    assert isinstance(study.df, pd.DataFrame)
    assert list(study.df["split"]) == [row["split"] for row in study.rows]
    assert study.df["pareto"].dtype == bool
    front = study.front()
    assert set(front["split"]) <= set(SPLITS)
    assert front["latency_s"].is_monotonic_increasing
    assert front["output_error"].is_monotonic_decreasing
    layers = study.front(by="layer")
    assert sorted(layers["case_id"]) == sorted(study.df[study.df["pareto"]]["case_id"])
    with pytest.raises(lq.InputError, match="unknown front 'layers'; did you mean 'layer'"):
        study.front("layers")


def test_the_picture_and_the_page_say_the_verdict(study, tmp_path):
    words = [text.get_text() for text in study.plot_front().texts]
    assert study.verdict().headline in words
    page = study.report(tmp_path / "r.html")
    assert f"<h1>{study.verdict().headline}</h1>" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "r_files").exists()
    study.report(tmp_path / "r.html", files=True)
    assert (tmp_path / "r_files" / "summary.md").exists()


def test_a_study_shows_itself_in_a_few_lines(study):
    shown = repr(study)
    assert len(shown.splitlines()) < 12
    assert shown.startswith(f"Study of {len(study)} cases: 2 layers, 3 splits")
    assert study.verdict().headline in shown


def test_an_out_folder_is_continued(study, tmp_path):
    arguments = {"splits": SPLITS[:2], "jobs": 0, "out": tmp_path / "demo", **SETTINGS}
    first = lq.sweep("examples/tiny_pixart.pt", hw=["aie2"], **arguments)
    assert (first.outcome.n_ok, first.path) == (4, tmp_path / "demo" / "results.sqlite")
    arguments["splits"] = SPLITS
    second = lq.sweep("examples/tiny_pixart.pt", hw=["aie2"], **arguments)
    assert (second.outcome.n_ok, second.outcome.n_skipped) == (2, 4)
    assert second.verdict().text == study.verdict().text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"splitz": ["W4A4"]}, "unknown key 'splitz'; did you mean 'splits'"),
        ({"tokens": "many"}, "tokens must be a whole number, got 'many'"),
        ({"splits": ["W4B4"]}, "W4B4"),
    ],
)
def test_wrong_settings_are_named(settings, told):
    with pytest.raises(lq.InputError, match=told):
        lq.sweep("examples/tiny_pixart.pt", "aie2", **settings)


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional argument"):
        lq.sweep("examples/tiny_pixart.pt", "aie2", ["W4A4"])


def test_the_function_and_the_package_of_the_name_live_together():
    import loraq_sim.sweeps.plan

    assert callable(lq.sweep)
    assert loraq_sim.sweeps.plan.compose is not None
    from loraq_sim.sweeps import compose

    assert compose is loraq_sim.sweeps.plan.compose


SCRIPT = """
import sys
import loraq_sim as lq
print("once", flush=True)
study = lq.sweep(
    "examples/tiny_pixart.pt", hw="aie2", splits=["W4A4", "W4A8"], layers="*.0.*", tokens=16,
    presets="{preset}", jobs={jobs},
    on_event=lambda event: print(event.kind, flush=True) if event.kind != "note" else None,
)
print(len(study), study.outcome.interrupted, flush=True)
print(repr(study), flush=True)
print(study.verdict().headline, flush=True)
"""


@pytest.mark.parametrize("from_stdin", [False, True], ids=["file", "stdin"])
def test_a_script_without_a_guard_runs_once(request, tmp_path, from_stdin):
    text = SCRIPT.format(preset="fast", jobs=1)
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-" if from_stdin else str(script)],
        input=text if from_stdin else None,
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
        check=True,
    )
    assert done.stdout.split("\n").count("once") == 1
    assert "22 False" in done.stdout
    assert "Build W4A8 on aie2" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_a_study_of_what_was_done(request, tmp_path):
    """The interrupt comes when the first case of six is stored, however slow the machine is."""
    script = tmp_path / "script.py"
    text = SCRIPT.format(preset="fast", jobs=1)
    printing = 'print(event.kind, flush=True) if event.kind != "note" else None'
    assert printing in text
    text = text.replace(printing, "pressed(event)").replace(
        "import loraq_sim as lq",
        # What runs the tests in the background may have its children ignore SIGINT.
        """import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import loraq_sim as lq
def pressed(event):
    if event.kind == "case" and event.done == 1:
        os.kill(os.getpid(), signal.SIGINT)""",
    )
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
        check=False,
    )
    said, errors = done.stdout, done.stderr
    assert done.returncode == 0, errors
    assert said.split("\n")[1] == "1 True"
    assert "interrupted: 21 cases left" in said
    assert "Traceback" not in errors
    assert said.strip().split("\n")[-1].startswith(("Build", "No split"))


@pytest.mark.parametrize(
    ("column", "value"), [("latency_s", -1e-3), ("m", 0), ("energy_j", math.inf)]
)
def test_a_number_that_nothing_can_have_is_refused_by_all_that_adds_up(
    study, tmp_path, column, value
):
    wrong = lq.open_study(study_copy(study, tmp_path, column, value))
    what = f"cannot be used: in the row of layer .*, {column} is "
    for ask in (
        wrong.verdict,
        wrong.front,
        wrong.plot_front,
        lambda: wrong.report(tmp_path / "r.html"),
    ):
        with pytest.raises(StoreError, match=what):
            ask()
    assert not (tmp_path / "r.html").exists()
    # The rows are there to look at, and it can be shown.
    assert len(wrong.df) == len(study)
    assert "cannot be used" in repr(wrong)
    done = CliRunner().invoke(app, ["pareto", str(wrong.path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.search(what, " ".join(done.stderr.split()))


def study_copy(study, folder, column, value):
    """A store of the study's rows, in one of which `column` has another value."""
    path = folder / "results.sqlite"
    with ResultStore.open(path, create=True) as store:
        rows = {str(index): dict(row) for index, row in enumerate(study.rows)}
        rows["1"][column] = value
        store.add_all(
            {case: {k: v for k, v in row.items() if k != "case_id"} for case, row in rows.items()}
        )
    return path


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], ("output_error", "")),
        (
            [{"output_error": 0.1, "latency_s": 1.0, "weight_bytes": 3}],
            ("output_error", "latency_s"),
        ),
        (
            [{"output_error": 0.1, "weight_error": 0.2, "weight_bytes": 3}],
            ("output_error", "weight_bytes"),
        ),
        (
            [{"output_error": None, "weight_error": 0.2, "energy_j": 3.0}],
            ("weight_error", "energy_j"),
        ),
        # An output that is not finite is known to be wrong, whatever the weights are.
        (
            [{"status": "overflow", "weight_error": 0.2, "latency_s": 1.0}],
            ("output_error", "latency_s"),
        ),
        # A cost of rows that cannot be judged decides nothing.
        (
            [
                {"status": "failed", "latency_s": 1.0},
                {"output_error": 0.1, "latency_s": math.nan, "weight_bytes": 3},
            ],
            ("output_error", "weight_bytes"),
        ),
    ],
)
def test_verdict_and_marks_judge_by_the_same_columns(rows, expected):
    assert objectives_of(rows) == expected
    named = [{"split": "W4A4", "accelerator": "aie2"} | row for row in rows]
    verdict = verdict_of(named)
    assert (verdict.error, verdict.cost) == expected
