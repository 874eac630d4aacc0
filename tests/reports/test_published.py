"""Published reports: the command that makes them, and that what is shown is what the rows say."""

import importlib.util
import json
import re

import pytest

import loraq_sim as lq
from loraq_sim.results.totals import model_totals


def script(root, name):
    spec = importlib.util.spec_from_file_location(name, root / "reports" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def publish(request):
    return script(request.config.rootpath, "publish")


@pytest.fixture(scope="module")
def published(request):
    return request.config.rootpath / "reports" / "pixart_sigma_on_aie2"


@pytest.fixture(scope="module")
def study(published):
    return lq.open_study(published)


def test_the_page_shows_the_totals_of_its_rows(published, study):
    text = (published / "report.html").read_text(encoding="utf-8")
    drawn = json.loads(re.search(r'id="drawn">(.*?)</script>', text)[1])
    totals = {row["split"]: row for row in model_totals(study.rows)}
    assert {point["label"] for point in drawn["points"]} == totals.keys()
    for point in drawn["points"]:
        for key in ("output_error", "latency_s", "weight_bytes", "energy_j", "dram_bytes"):
            # The page holds five digits.
            assert point[key] == pytest.approx(totals[point["label"]][key], rel=1e-4)
    verdict = study.verdict()
    assert f"<h1>{verdict.headline}</h1>" in text
    assert drawn["grids"]["aie2"]["labels"] == list(totals)


def test_the_readme_is_what_the_rows_say(published, publish):
    plan = publish.read_plan(published)
    text = publish.readme_text(publish.data_of(plan, published), plan)
    assert (published / "README.md").read_text(encoding="utf-8") == text, (
        "run: python reports/publish.py pixart_sigma_on_aie2 --pages"
    )


def test_the_project_s_readme_quotes_the_verdict_and_the_end_of_the_demo(
    request, publish, study, monkeypatch, capsys
):
    root = request.config.rootpath
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert " ".join(publish.verdict_line(study).split()) in " ".join(readme.split())
    monkeypatch.chdir(root)
    script(root, "show").main()
    printed = capsys.readouterr().out
    assert printed.startswith("\nAt the size of a real model: ")
    assert printed in readme


def test_the_report_is_of_the_whole_model_says_it_is_drawn_and_is_small(published, study):
    assert len({row["layer"] for row in study.rows}) == 224
    assert {row["inputs"] for row in study.rows} == {"synthetic model"}
    assert all("drawn once, counted for each of 28 blocks" in row["message"] for row in study.rows)
    assert "rest on synthetic weights and inputs" in study.verdict().text
    latencies = [row["latency_s"] for row in study.totals]
    assert max(latencies) > 1.3 * min(latencies)
    files = {path.name: path.stat().st_size for path in published.iterdir()}
    assert {"report.html", "front.png", "images.png", "README.md", "results.sqlite"} <= files.keys()
    assert sum(files.values()) <= 5_000_000


def test_the_command_makes_a_report_of_a_small_plan(publish, published, tmp_path):
    plan = publish.read_plan(published)
    plan["layers"] |= {"of_block": "attn1.to_q", "tokens": 16, "blocks": 2}
    plan["sweep"] |= {"splits": ["W4A4", "W4A8"], "presets": "fast"}
    out = tmp_path / "out"
    publish.sweep(plan, out, jobs=0, work=tmp_path / "work")
    names = {path.name for path in publish.write_pages(plan, out)}
    assert names == {"report.html", "front.png", "images.png", "README.md"}
    rows = lq.open_study(out).rows
    assert {row["layer"] for row in rows} == {
        f"transformer_blocks.{i}.attn1.to_q" for i in range(2)
    }
    (one, other) = (
        [row["output_error"] for row in rows if f".{i}." in row["layer"]] for i in range(2)
    )
    assert one == other
    text = (out / "README.md").read_text()
    assert text.startswith(f"# {plan['title']}: Build ")
    assert "in all 2\nblocks" in text
