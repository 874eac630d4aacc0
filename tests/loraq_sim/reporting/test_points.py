"""What stands behind a point: costs on other machines, its error in images, the static picture."""

import json
import math
import shlex
from dataclasses import fields
from itertools import product

import numpy as np
import pytest

import hwmodels
from loraq_sim.machine import cost_split
from loraq_sim.reporting import points
from loraq_sim.reporting.report_data import answers, error_in_images, image_anchors
from loraq_sim.results.front import mark_front
from loraq_sim.split import parse_split
from loraq_sim.sweeps.plan_file import SweepPlan

SPLITS = ("W4A4", "W4A8", "W4A4+W8A8r16")


@pytest.fixture(scope="module")
def data(gathered, all_machine_controls):
    few, points.CONTROLS = points.CONTROLS, all_machine_controls
    try:
        yield gathered(n_layers=3, splits=SPLITS, accelerators=("aie2",))
    finally:
        points.CONTROLS = few


def test_costs_on_each_machine_are_those_of_its_description(data):
    grid = data.grids["aie2"]
    assert [len(control["values"]) for control in grid["controls"]] == [3, 3, 4]
    assert grid["controls"][0]["values"] == ["2", "4", "8"]
    aie2 = hwmodels.load_accelerator("aie2")
    rows = {label: [r for r in data.rows if r["split"] == label] for label in grid["labels"]}
    machines = list(product((2, 4, 8), (0.75e9, 1e9, 1.5e9), (8.5e9, 17e9, 34e9, 68e9)))
    # Corners, the machine itself and one between.
    for at in (0, 17, 16, 35):
        columns, clock, bandwidth = machines[at]
        changed = hwmodels.with_overrides(
            aie2,
            {"columns": columns, "clock_hz": clock, "dram.bandwidth_bytes_per_s": bandwidth},
        )
        for split in SPLITS:
            expected = dict.fromkeys(points.GRID_COSTS, 0.0)
            for row in rows[split]:
                _, cost = cost_split(row["m"], row["n"], row["k"], parse_split(split), changed)
                for name in expected:
                    expected[name] += row["calls_per_step"] * getattr(cost, name)
            place = grid["labels"].index(split)
            found = {name: grid[name][at][place] for name in expected}
            assert found == pytest.approx(expected, rel=1e-12)


def test_the_machine_itself_is_a_point_of_the_grid_with_its_costs_and_verdict(data):
    grid = data.grids["aie2"]
    at = 0
    for control in grid["controls"]:
        at = at * len(control["values"]) + control["base"]
    for total in data.totals:
        place = grid["labels"].index(total["label"])
        assert grid["latency_s"][at][place] == pytest.approx(total["latency_s"], rel=1e-12)
    (answer,) = answers(data)
    assert grid["answers"][at] == answer.best["label"]


def test_the_verdict_on_each_machine_is_on_its_front(data):
    grid = data.grids["aie2"]
    error = {total["label"]: total["output_error"] for total in data.totals}
    for latencies, label in zip(grid["latency_s"], grid["answers"], strict=True):
        there = [
            {"label": name, "output_error": error[name], "latency_s": latency}
            for name, latency in zip(grid["labels"], latencies, strict=True)
        ]
        marked = mark_front(there, ("output_error", "latency_s"), by=())
        assert label in {row["label"] for row in marked if row["pareto"]}


def test_too_many_cases_are_said_not_priced(gathered, monkeypatch):
    monkeypatch.setattr(points, "_MOST_ESTIMATES", 1)
    data = gathered(n_layers=1, splits=("W4A4",), accelerators=("aie2",))
    assert not data.grids
    assert any("too many to price them on other machines" in note for note in data.notes)


def test_an_error_in_images_is_read_from_the_line_through_what_was_measured():
    known = image_anchors()["anchors"]
    x = [math.log10(anchor["output_error"]) for anchor in known]
    y = [anchor["psnr_db"] for anchor in known]
    # Least squares by the normal equations.
    a = np.array([[len(x), sum(x)], [sum(x), sum(v * v for v in x)]])
    b = np.array([sum(y), sum(v * w for v, w in zip(x, y, strict=True))])
    intercept, slope = np.linalg.solve(a, b)
    said = error_in_images(0.026)
    assert said.startswith("2.6 % is about ")
    assert f" {intercept + slope * math.log10(0.026):.0f} dB" in said
    assert error_in_images(0.9) == error_in_images(1e-5) == ""
    assert error_in_images(None) == error_in_images(math.nan) == ""
    # Twice the error is twice the noise: 6 dB, were layers all there is.
    assert -26 < slope < -16


def test_the_static_picture_has_every_point_in_its_place(data):
    (answer,) = answers(data)
    picture = points.static_front(data, answer)
    totals = {row["label"]: row for row in data.totals}
    by_x = sorted(picture["points"], key=lambda point: point["x"])
    by_latency = sorted(totals, key=lambda label: totals[label]["latency_s"])
    assert [point["label"] for point in by_x] == by_latency
    by_y = sorted(picture["points"], key=lambda point: -point["y"])
    assert [point["label"] for point in by_y] == sorted(
        totals, key=lambda label: totals[label]["output_error"]
    )
    for point in picture["points"]:
        assert picture["left"] <= point["x"] <= picture["right"]
        assert picture["top"] <= point["y"] <= picture["bottom"]
    strong = [note["text"] for note in picture["notes"] if note["strong"]]
    assert strong == [answer.best["label"]]


def test_lines_to_copy_quote_what_strangers_named(gathered, invented_rows):
    hostile = "$(touch x); 'a\" `b`"
    rows = invented_rows(n_layers=1, splits=("W4A4",), accelerators=("aie2",))
    rows = [row | {"layer": hostile, "options": json.dumps({"fused": False})} for row in rows]
    plan = {"dump": f"/data/{hostile}/model.pt", "splits": ["W4A4"], "layers": [hostile]}
    data = gathered(rows, [{"run": 1, "plan": plan}])
    texts = points.case_texts(data, data.totals[0])
    words = shlex.split(texts["command"])
    assert words[words.index("--layer-dump") + 1] == plan["dump"]
    assert words[words.index("--layers") + 1] == hostile
    assert "--unfused" in words
    assert hostile in shlex.split(texts["vectors"])


def test_every_key_of_a_plan_has_its_words():
    # A new key changes what a copied command must say: give it words in `points.case_texts`.
    told = {"dump", "accelerators", "layers", "splits", "methods", "preset", "family", "group"}
    told |= {"tokens", "synthesize_inputs", "lora", "seed", "smooth", "rotate", "condition"}
    told |= {"finish", "rows", "model", "resolution", "batch", "fused", "kernel", "datapath"}
    assert told | {"overrides"} == {field.name for field in fields(SweepPlan)}
    plan = {"dump": "m.pt", "splits": ["W4A4"], "lora": ["a b.safetensors=0.5"], "batch": 2}
    plan |= {"rows": {"ffn_*": 600}, "model": "sana-0.6b", "resolution": 512, "kernel": "iree"}
    plan |= {
        "synthesize_inputs": True,
        "overrides": [{"pattern": "ffn_*", "settings": {"rank": 8}}],
    }
    words = points._plan_flags(plan)
    assert words[:2] == ["--rows", "ffn_*=600"]
    for name, value in (
        *(("--lora", "a b.safetensors=0.5"), ("--batch", "2"), ("--model", "sana-0.6b")),
        *(("--resolution", "512"), ("--kernel", "iree"), ("--override", "ffn_*:rank=8")),
    ):
        assert words[words.index(name) + 1] == value
    assert "--synthesize-inputs" in words
    assert points._plan_of([{"plan": plan}], {"dump": "m.pt", "split": "W4A4"}) == plan
    for broken in (
        {"splits": 3},
        {"lora": {"a": 1}},
        {"rows": [1]},
        {"overrides": [1]},
        {"overrides": [{"settings": 3}]},
    ):
        assert points._plan_of([{"plan": plan | broken}], {"dump": "m.pt", "split": "W4A4"}) == {}
