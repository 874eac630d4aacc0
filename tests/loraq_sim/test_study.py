"""`lq.sweep`: the same rows and verdict as the command line, in a script, interrupted, in words."""

import itertools
import json
import math
import re
import subprocess
import sys
from html import escape

import pandas as pd
import pytest
from typer.testing import CliRunner

import hwmodels
import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.errors import StoreError
from loraq_sim.recipe import read_recipe
from loraq_sim.results.choice import objectives_of
from loraq_sim.results.store import ResultStore
from loraq_sim.results.totals import model_totals
from loraq_sim.results.verdict import verdict_of
from loraq_sim.results.wording import labelled
from loraq_sim.study import Study

SPLITS = ["W4A4", "W4A8", "W4A4+W8A8r8"]
SETTINGS = {"layers": ["*.0.attn1.to_q", "*.0.attn1.to_k"], "tokens": 16, "presets": "fast"}
# What depends on when and how fast a row was made.
NOT_COMPARED = ("seconds", "case_id")


@pytest.fixture(autouse=True)
def in_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def study(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        return lq.sweep(
            "examples/tiny_pixart.pt", "aie2", splits=SPLITS, jobs=0, out=folder, **SETTINGS
        )


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
    assert study.report(tmp_path / "r.md").read_text().startswith(f"# {study.verdict().headline}")
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
    assert "Partial: 21 of 22 planned cases have no result yet: " in said
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


def command(*words):
    done = CliRunner().invoke(app, [*map(str, words), "--format", "json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def by_hand(study, split):
    """Latency and bytes of a split over the layers, added up here; output error likewise."""
    rows = [row for row in study.rows if row["split"] == split]
    # The error of the model: squares of relative errors weighted by the number of outputs.
    weight = [row["calls_per_step"] * row["m"] * row["n"] for row in rows]
    square = sum(w * r["output_error"] ** 2 for w, r in zip(weight, rows, strict=True))
    return {
        "latency_s": sum(row["calls_per_step"] * row["latency_s"] for row in rows),
        "weight_bytes": sum(row["weight_bytes"] for row in rows),
        "output_error": math.sqrt(square / sum(weight)),
    }


def test_the_columns_of_the_frame_have_types(study):
    types = study.df.dtypes.astype(str)
    assert set(types[["layer", "split", "bound", "status", "accelerator"]]) == {"category"}
    assert set(types[["m", "rank", "weight_bytes", "overflow_count"]]) == {"int64"}
    assert set(types[["latency_s", "output_error", "smooth"]]) == {"float64"}
    assert list(study.df["split"].cat.categories) == SPLITS
    assert dict(Study([]).df.dtypes.astype(str)) == dict(types) | dict.fromkeys(
        [name for name, kind in types.items() if kind == "int64"], "Int64"
    ) | {"cycles": "Int64"}  # fmt: skip
    assert list(study.df["layer"].cat.categories) == list(
        dict.fromkeys(row["layer"] for row in study.rows)
    )


def test_a_frame_of_many_unlike_rows_has_their_cells(study):
    one, other = dict(study.rows[0]), {k: v for k, v in study.rows[1].items() if k != "rank"}
    rows = [(other | {"note": n}) if n % 7 == 0 else (one | {"m": n}) for n in range(600)]
    frame = Study(rows).df
    assert list(frame["note"].dropna()) == list(range(0, 600, 7))
    for place in (0, 1, 255, 256, 257, 511, 512, 599):
        for name, value in frame.iloc[place].items():
            expected = rows[place].get(name)
            assert pd.isna(value) if expected is None else value == expected, (place, name)


def test_counts_that_are_missing_stay_integers(study):
    rows = [dict(row) for row in study.rows]
    rows[1]["safe_acc_bits"] = None
    rows[1]["latency_s"] = None
    frame = Study(rows).df
    assert str(frame["safe_acc_bits"].dtype) == "Int64"
    assert frame["safe_acc_bits"].isna().tolist().count(True) == 1
    assert math.isnan(frame["latency_s"][1])
    # Frames go back in wherever rows do.
    for read in (model_totals, lambda given: lq.pareto_front(given, ["output_error", "latency_s"])):
        assert len(read(frame)) == len(read(rows))
    assert lq.verdict_of(model_totals(frame)).text == lq.verdict_of(model_totals(rows)).text
    assert lq.allocate(frame, {"weight_bytes": 1e9}).splits == (
        lq.allocate(rows, {"weight_bytes": 1e9}).splits
    )


@pytest.mark.parametrize("column", ["latency_s", "weight_bytes"])
def test_the_best_within_a_limit_is_that_of_the_command_and_of_hand(study, column):
    sums = {split: by_hand(study, split) for split in SPLITS}
    limit = sorted(own[column] for own in sums.values())[1]
    within = [split for split in SPLITS if sums[split][column] <= limit]
    expected = min(within, key=lambda split: sums[split]["output_error"])
    best = study.best(**{column: limit})
    assert best["split"] == expected
    for name, value in sums[expected].items():
        assert best[name] == pytest.approx(value)
    told = command("pareto", study.path.parent, "--under", f"{column}={limit!r}")
    assert [row["split"] for row in told["rows"] if row["best_under"]] == [expected]
    assert len(repr(best).splitlines()) <= 12


def test_limits_are_written_as_on_the_command_line(study):
    assert study.best(latency_s="1s", weight_bytes="1GB") == study.best(
        latency_s=1, weight_bytes=1e9
    )
    assert study.best(latency_s=1.0, minimize="weight_bytes")["split"] in ("W4A4", "W4A8")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "best needs a limit, such as"),
        ({"latency": 1.0}, "unknown column 'latency'; did you mean"),
        ({"latency_s": "3 parsecs"}, "latency_s=3 parsecs: want a number, with"),
        ({"latency_s": 1e-9}, r"no row is within latency_s <= 1e-09 \(least: "),
        ({"latency_s": True}, "the limit of latency_s must be a number, got True"),
        ({"latency_s": 1.0, "accelerator": "aie3"}, "unknown accelerator 'aie3'; did you mean"),
        ({"latency_s": 1.0, "minimize": "eror"}, "eror"),
    ],
)
def test_what_best_cannot_answer_is_one_line(study, asked, told):
    with pytest.raises(lq.InputError, match=told) as caught:
        study.best(**asked)
    assert "\n" not in str(caught.value)


def test_an_explanation_is_of_the_case_as_it_was_run(study):
    layer = "transformer_blocks.0.attn1.to_k"
    found = study.explain("*.to_k", "W4A4+W8A8r8")
    (row,) = [r for r in study.rows if (r["layer"], r["split"]) == (layer, "W4A4+W8A8r8")]
    different = {name for name in row if row[name] != found.row.get(name)}
    # What only a sweep knows, or the clock.
    assert different <= {
        *("seconds", "case_id", "pareto", "dump", "m_source", "family", "group_size", "options"),
        "token_limit",
    }
    assert found.summary["total_error"] == pytest.approx(row["output_error"])
    assert sum(term["share"] for term in found.errors) == pytest.approx(1.0)
    words = ["explain", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt", "--layer", layer]
    words += ["--split", "W4A4+W8A8r8", "--preset", "fast", "--tokens", "16", "--quiet"]
    told = command(*words)
    shares = {term["source"]: term["share"] for term in told["errors"]}
    assert {term["source"]: term["share"] for term in found.errors} == pytest.approx(shares)


def test_arrays_and_transforms_of_a_row_are_explained_with_it(request):
    options = {"layers": SETTINGS["layers"][:1], "tokens": 8, "presets": "fast", "jobs": 0}
    datapath = {"acc_bits": (10, 32), "overflow": "saturate"}
    own = lq.sweep(
        "examples/tiny_pixart.pt", "aie2", splits=["W8A8"], rotate="hadamard", fused=False,
        datapath=datapath, **options,
    )  # fmt: skip
    layer = own.rows[0]["layer"]
    labels = [case["label"] for case in labelled(own.rows)]
    assert len(set(labels)) == 2
    for row, label in zip(own.rows, labels, strict=True):
        found = own.explain(layer, label)
        assert found.summary["total_error"] == pytest.approx(row["output_error"])
        assert (found.row["latency_s"], found.row["rotation"]) == (row["latency_s"], "hadamard")
    with pytest.raises(lq.InputError, match=r"W8A8 has several cases: W8A8 \(rotated"):
        own.explain(layer, "W8A8")


def test_a_study_allocates_as_the_command_does(study, tmp_path):
    cheap, dear = (by_hand(study, split)["weight_bytes"] for split in ("W4A4", "W4A4+W8A8r8"))
    limit = (cheap + dear) // 2
    found = study.allocate(weight_bytes=limit)
    words = ["allocate", study.path.parent, "--budget", f"weight_bytes={limit}", "--quiet"]
    told = command(*words, "--out", tmp_path)
    assert found.splits == {row["layer"]: row["split"] for row in told["rows"]}
    # Every combination of a split per layer, tried one by one.
    layers = list(found.splits)
    options = [[r for r in study.rows if r["layer"] == layer] for layer in layers]
    fitting = [
        combination
        for combination in itertools.product(*options)
        if sum(row["weight_bytes"] for row in combination) <= limit
    ]
    squares = [
        sum(
            row["calls_per_step"] * row["m"] * row["n"] * row["output_error"] ** 2
            for row in combination
        )
        for combination in fitting
    ]
    best = fitting[squares.index(min(squares))]
    assert list(found.splits.values()) == [row["split"] for row in best]
    recipe = study.recipe(tmp_path / "mine.toml", weight_bytes=limit)
    theirs = read_recipe(tmp_path / "recipe.toml")
    for layer in layers:
        assert recipe.settings(layer) == theirs.settings(layer)
    assert read_recipe(tmp_path / "mine.toml").layers == recipe.layers
    with pytest.raises(lq.InputError, match="unknown column 'weight_byte'"):
        study.allocate(weight_byte=1)


def test_without_a_budget_the_recipe_is_the_verdicts_split(study, tmp_path):
    recipe = study.recipe(tmp_path / "r.toml")
    for row in study.rows:
        assert recipe.split(row["layer"]).text == study.verdict().split
    assert read_recipe(tmp_path / "r.toml").layers == recipe.layers


def test_an_interrupted_study_says_what_is_missing_and_continues(tmp_path):
    def pressed(event):
        if event.kind == "case" and event.done == 2:
            raise KeyboardInterrupt

    arguments = {"splits": SPLITS, "jobs": 0, "out": tmp_path / "demo", **SETTINGS}
    first = lq.sweep("examples/tiny_pixart.pt", "aie2", on_event=pressed, **arguments)
    assert (len(first), first.n_missing, first.outcome.interrupted) == (2, 4, True)
    missing = {(case["layer"], case["split"]) for case in first.missing}
    done = {(row["layer"], row["split"]) for row in first.rows}
    assert len(missing) == 4
    assert not missing & done
    told = "Partial: 4 of 6 planned cases have no result yet: "
    assert repr(first).split("\n")[1].startswith(told)
    assert "the same sweep into this store continues" in repr(first)
    # Usable: rows, verdict and page of what is there.
    assert len(first.df) == 2
    assert first.verdict().sentences[0] == first.partial
    assert first.partial in first.verdict().notes
    opened = lq.open_study(tmp_path / "demo")
    assert (len(opened), opened.n_missing) == (2, 4)
    assert opened.missing == first.missing
    assert opened.partial == first.partial
    assert repr(opened) == repr(first)
    second = lq.sweep("examples/tiny_pixart.pt", "aie2", **arguments)
    assert (second.outcome.n_ok, second.outcome.n_skipped, second.n_missing) == (4, 2, 0)
    assert second.partial == ""
    assert "Partial" not in repr(second) + second.verdict().text
    assert told in opened.verdict().text
    assert lq.open_study(tmp_path / "demo").n_missing == 0


FAILED = [
    {"layer": name, "split": "W4A4+W8A8r99", "accelerator": "aie2", "dump": "m.pt"}
    | {"status": "failed", "message": "rank 99 is more than 64", "seed": 0}
    for name in "ab"
]
ASKED = {
    "best": lambda s: s.best(latency_s=1.0),
    "plot_front": lambda s: s.plot_front(),
    "plot_layers": lambda s: s.plot_layers(),
    "plot_roofline": lambda s: s.plot_roofline(),
    "explain": lambda s: s.explain("a"),
    "recipe": lambda s: s.recipe(),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_study_of_failures_says_why_there_is_no_answer(ask):
    told = r"2 of 2 cases failed, the first W4A4\+W8A8r99 in a: rank 99 is more than 64"
    with pytest.raises(lq.InputError, match=told):
        ask(Study(FAILED))
    assert re.search(told, repr(Study(FAILED)))


@pytest.mark.parametrize(
    "ask",
    [ask for name, ask in ASKED.items() if name != "plot_front"]
    + [lambda s: s.allocate(latency_s=1.0), lambda s: s.report("r.html")],
)
def test_an_empty_study_says_how_to_fill_it(ask):
    with pytest.raises(lq.InputError, match=r"holds no row; sweep into its store first: lq\.sweep"):
        ask(Study([]))
    assert "all of ." not in repr(Study([])) + Study([]).verdict().text


def test_objects_in_place_of_names_are_told_what_to_do():
    with pytest.raises(lq.InputError, match=r"names of accelerators .*sketch_text"):
        lq.sweep("examples/tiny_pixart.pt", hwmodels.sketch("mine"))
    with pytest.raises(lq.InputError, match="must be the path of a layer dump"):
        lq.sweep(lq.read_layer_dump("examples/tiny_pixart.pt"), "aie2")
    with pytest.raises(lq.InputError, match="needs an accelerator, such as hw='aie2'"):
        lq.sweep("examples/tiny_pixart.pt", [])


def test_a_report_that_is_no_page_is_refused(study, tmp_path):
    with pytest.raises(lq.InputError, match=r"HTML file such as report\.html, or a \.md, got"):
        study.report(tmp_path / "r.pdf")
    assert not (tmp_path / "r.pdf").exists()


def test_an_empty_store_has_no_front(tmp_path):
    with ResultStore.open(tmp_path / "results.sqlite", create=True):
        pass
    done = CliRunner().invoke(app, ["pareto", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "holds no row yet; run loraq-sim sweep into it first" in done.stderr
    with ResultStore.open(tmp_path / "results.sqlite", create=True) as store:
        store.add_all({row["layer"]: row for row in FAILED})
    done = CliRunner().invoke(app, ["pareto", str(tmp_path)])
    assert "error: 2 of 2 cases failed, the first W4A4+W8A8r99 in a: rank 99" in done.stderr


def test_one_of_several_accelerators_is_named(tmp_path):
    options = {"layers": SETTINGS["layers"][:1], "tokens": 8, "presets": "fast", "jobs": 0}
    both = lq.sweep("examples/tiny_pixart.pt", ["aie2", "a100"], splits=["W8A8", "W4A8"], **options)
    with pytest.raises(lq.InputError, match=r"there are aie2 and a100; choose one by accelerator"):
        both.best(latency_s=1.0)
    for name in ("aie2", "a100"):
        best = both.best(latency_s=1.0, accelerator=name)
        assert (best["accelerator"], best["split"]) == (name, "W8A8")
        assert both.explain(best and both.rows[0]["layer"], "W4A8", accelerator=name).row[
            "accelerator"
        ] == name  # fmt: skip
        assert both.recipe(accelerator=name).provenance["accelerator"] == name


@pytest.mark.pictures
def test_arrays_of_a_sweep_are_drawn_with_their_gates(study):
    with pytest.raises(
        lq.InputError, match=r"is of one array; sweep over several, such as datapath"
    ):
        study.plot_arrays()
    arrays = {"acc_bits": (16, 20, 32), "overflow": "wrap"}
    settings = {"layers": SETTINGS["layers"][:1], "tokens": 4, "jobs": 0, "datapath": arrays}
    found = lq.sweep("examples/tiny_pixart.pt", "aie2", splits=["W8A8"], **settings)
    bars, errors = found.plot_arrays().axes
    assert [label.get_text().split()[2] for label in bars.get_yticklabels()] == ["16", "20", "32"]
    ends = [0.0, 0.0, 0.0]
    for patch in bars.patches:
        place = round(patch.get_y() + patch.get_height() / 2)
        ends[place] = max(ends[place], patch.get_x() + patch.get_width())
    assert ends == pytest.approx(sorted(found.df["area_ge"]), rel=1e-6)
    assert errors.get_ylabel() == "Error (%)"


@pytest.mark.pictures
def test_pictures_of_layers_and_roofs_show_every_layer(study):
    layers = study.plot_layers()
    texts = [label.get_text() for label in layers.axes[0].get_xticklabels()]
    assert texts == ["to_q", "to_k"]
    with pytest.raises(lq.InputError, match="unknown quantity 'output_eror'; did you mean"):
        study.plot_layers("output_eror")
    roof = study.plot_roofline("W4A8")
    rows = [row for row in study.rows if row["split"] == "W4A8"]
    drawn = [
        (x, y) for line in roof.axes[0].lines[1:] for x, y in zip(*line.get_data(), strict=True)
    ]
    macs = [row["m"] * row["n"] * row["k"] for row in rows]
    expected = [
        (count / row["dram_bytes"], count / row["latency_s"] / 1e9)
        for count, row in zip(macs, rows, strict=True)
    ]
    assert sorted(drawn) == pytest.approx(sorted(expected))
    assert roof._repr_png_().startswith(b"\x89PNG")


def test_a_notebook_shows_study_and_verdict_as_tables(study):
    html = study._repr_html_()
    assert study.verdict().headline in html
    for row in study.totals:
        assert (f">{row['split']}</td>" in html) == row["pareto"]
    page = study.verdict()._repr_html_()
    assert all(escape(sentence, quote=False) in page for sentence in study.verdict().sentences)
