"""One store, one answer: every door names the same split in the same words.

A real sweep is run once; its rows are then replaced by invented ones and all doors are asked about
them, the sweep itself too, which finds its cases done and only says what they mean.
"""

import html
import json
import math
import random
import re
import shutil

import pytest
from typer.testing import CliRunner

import loraq_sim as lq
import loraq_sim.reporting.figures
from loraq_sim.cli.app import app
from loraq_sim.files import markdown_text
from loraq_sim.results.store import ResultStore
from loraq_sim.results.totals import model_totals
from loraq_sim.results.verdict import verdict_of

SPLITS = ("W4A4", "W4A8", "W4A4+W8A8r8", "W4A4+W4A4r8")
COMMON = (
    *("sweep", "--layer-dump", "examples/tiny_pixart.pt", "--preset", "fast", "--tokens", "8"),
    *("--layers", "*.0.attn1.to_q,*.0.attn1.to_k", "--jobs", "0"),
)


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module", params=["aie2", "aie2,h100"], ids=["one", "two"])
def swept(request, tmp_path_factory):
    """Command line of a sweep, and the folder of its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        out = tmp_path_factory.mktemp("swept") / "demo"
        words = (*COMMON, "--hw", request.param, "--split", ",".join(SPLITS))
        run(*words, "--quiet", "--out", out)
        yield words, out


def facts(errors, latencies, weights):
    """What to write into the rows of each split."""
    values = zip(errors, latencies, weights, strict=True)
    keys = ("output_error", "latency_s", "weight_bytes")
    return {s: dict(zip(keys, v, strict=True)) for s, v in zip(SPLITS, values, strict=True)}


def invented(seed):
    rng = random.Random(seed)
    errors = [rng.choice([0.3, rng.uniform(0.005, 0.25)]) for _ in SPLITS]
    latencies = [1e-3 * rng.choice([1.0, 1.04, rng.uniform(1, 3)]) for _ in SPLITS]
    return facts(errors, latencies, [rng.randint(10**5, 10**6) for _ in SPLITS])


STORES = {
    "as swept": {},
    "ties": facts((0.2, 0.1, 0.05, 0.15), (1e-3, 1.01e-3, 1.02e-3, 1.03e-3), (1e5, 1e5, 2e5, 3e5)),
    "equal": facts((0.1,) * 4, (1e-3,) * 4, (4e5, 3e5, 2e5, 1e5)),
    "apart": facts((0.2, 0.05, 0.045, 0.3), (1e-3, 1.3e-3, 3e-3, 9e-3), (1e5, 1e5, 2e5, 3e5)),
    "all too rough": facts((0.5, 0.4, 0.31, 0.6), (1e-3, 2e-3, 3e-3, 4e-3), (1e5, 2e5, 3e5, 4e5)),
    "overflow": facts((math.inf, 0.1, math.inf, 0.2), (1e-3,) * 4, (1e5, 2e5, 3e5, 4e5)),
    "all overflow": facts((math.inf,) * 4, (1e-3,) * 4, (1e5, 2e5, 3e5, 4e5)),
    "weights only": facts((None,) * 4, (1e-3, 1.3e-3, 2e-3, 3e-3), (1e5, 2e5, 3e5, 4e5)),
    "no cost": facts((None,) * 4, (None,) * 4, (1e5, 2e5, 3e5, 4e5)),
    **{f"random {seed}": invented(seed) for seed in range(2)},
}
# Where the report's pictures are looked at too, which takes seconds.
WITH_FILES = ("ties", "weights only")


def replaced(row, changes):
    """`row` with the values of its split, the second accelerator's a little off."""
    own = dict(changes.get(row["split"], {}))
    if row["accelerator"] == "h100" and own.get("output_error"):
        own["output_error"] *= 1.5 if row["split"] == "W4A8" else 1.0
    if own.get("output_error") == math.inf:
        own["status"] = "overflow"
    return row | own


def shown_in(page):
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


@pytest.mark.parametrize("name", STORES)
def test_every_door_gives_the_same_verdict(swept, name, tmp_path, monkeypatch):
    words, folder = swept
    out = tmp_path / "demo"
    shutil.copytree(folder, out)
    with ResultStore.open(out / "results.sqlite", create=True) as store:
        for row in store.rows():
            case_id = row.pop("case_id")
            store.add(case_id, replaced(row, STORES[name]))
        rows = store.rows()
    expected = verdict_of(model_totals(rows))
    plain = json.loads(json.dumps(expected.as_dict()))
    headings = []
    draw = loraq_sim.reporting.figures.draw_heading
    monkeypatch.setattr(
        *(loraq_sim.reporting.figures, "draw_heading"),
        lambda figure, heading, told: (headings.append(heading), draw(figure, heading, told)),
    )

    said = run(*words, "--out", out, "--quiet")
    assert expected.text in said
    made = json.loads(run(*words, "--out", out, "--quiet", "--format", "json"))
    assert made["verdict"] == plain
    assert expected.text in run("pareto", out)
    for line in expected.text.split("\n"):
        assert markdown_text(line) in run("pareto", out, "--format", "md")
    assert json.loads(run("pareto", out, "--format", "json"))["verdict"] == plain
    study = lq.open_study(out)
    assert study.verdict().text == expected.text
    if name != "all overflow":
        study.plot_front()
    assert len(headings) == (0 if name == "all overflow" else 3)
    assert {*headings} <= {expected.headline}

    headings.clear()
    with_files = name in WITH_FILES
    told = run("report", out, "--quiet", *([] if with_files else ["--page-only"]))
    assert told.split("\n")[0] == expected.headline
    page = shown_in((out / "report.html").read_text(encoding="utf-8"))
    assert expected.headline in page
    for own in expected.on.values():
        for sentence in own.sentences:
            assert sentence in page
            assert sentence in told
    if expected.joint:
        assert expected.joint in page
    if with_files:
        # Pictures of one accelerator carry its own headline.
        own = {verdict.headline for verdict in expected.on.values()}
        assert {h for h in headings if h.startswith(("Build", "No split"))} == own
        summary = (out / "report_files" / "summary.md").read_text(encoding="utf-8")
        assert summary.startswith(f"# {markdown_text(expected.headline)}")


def test_nothing_evaluated_is_one_answer_too(tmp_path):
    with ResultStore.open(tmp_path / "results.sqlite", create=True) as store:
        row = {"layer": "a", "split": "W4A4", "accelerator": "aie2", "dump": "d"}
        store.add("case", row | {"status": "failed", "message": "broken"})
        expected = verdict_of(model_totals(store.rows()))
    assert expected.headline == "No split could be evaluated on aie2"
    assert expected.text in run("pareto", tmp_path)
    assert run("report", tmp_path, "--quiet").startswith(expected.headline)
