"""What Jupyter shows of results: the numbers of the object, every text escaped."""

import re

import numpy as np
import pandas as pd
import pytest

import loraq_sim as lq
from hwmodels.errors import html_card


@pytest.fixture(scope="module")
def weight():
    return np.random.default_rng(5).normal(size=(48, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def solution(weight):
    return lq.solve(weight, branch="int8/g64", rank=4, preset="fast")


def cells(html):
    """Texts of all cells, entities resolved by pandas' reader of the same tables."""
    return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", html, re.S)]


def test_a_solution_shows_its_error_and_where_its_bytes_are(solution):
    html = solution._repr_html_()
    shown = cells(html)
    assert "Solution of a 48 x 64 weight" in html
    assert f"{solution.weight_error:.3%}" in shown
    for part, size in solution.bytes_by_part.items():
        assert (part in shown) == (size > 0)
        assert size == 0 or f"{size:,}" in shown


def test_a_smoothed_solution_shows_the_shape_of_its_smoothing(weight):
    x = np.random.default_rng(6).normal(size=(32, 64)).astype(np.float32)
    smoothed = lq.solve(weight, rank=4, preset="fast", activations=x, smooth=0.5, method="svdquant")
    shown = cells(smoothed._repr_html_())
    assert shown[shown.index("smooth") + 1 : shown.index("smooth") + 3] == ["float16", "64"]


def test_a_gemm_report_shows_what_overflowed(weight):
    codes = np.random.default_rng(7).integers(-127, 128, size=(3, 64))
    w = np.full((2, 64), 127)
    mac = lq.MacArray(acc_bits=16, overflow="saturate")
    report = lq.emulate_gemm_report(codes, w, mac)
    shown = cells(report._repr_html_())
    assert report.overflow_count > 0
    assert f"{report.overflow_count:,}" in shown
    assert str(report.safe_acc_bits) in shown


def allocation_of_two_layers():
    rows = [
        {
            **{"layer": layer, "kind": "ffn_up", "split": split, "status": "ok", "rank": 0},
            **{"accelerator": "aie2", "output_error": error, "weight_bytes": size},
            **{"calls_per_step": 1, "weight_error": error, "m": 4, "n": 4, "k": 4},
        }
        for layer in ("<script>alert(1)</script>", "b")
        for split, error, size in (("W4A4", 0.2, 100), ("W8A8", 0.01, 200))
    ]
    return lq.allocate(rows, {"weight_bytes": 300})


def test_an_allocation_shows_budgets_and_splits_and_escapes_names():
    found = allocation_of_two_layers()
    html = found._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert {"W4A4", "W8A8"} <= set(cells(html))
    assert f"{found.totals['weight_bytes']:.4g}" in cells(html)


def test_an_explanation_shows_every_source_and_part():
    layer = lq.read_layer_dump("examples/tiny_pixart.pt")["transformer_blocks.0.attn1.to_q"]
    case = lq.explain_case(layer, "W4A4+W8A8r4", "aie2", preset="fast", tokens=8)
    shown = cells(case._repr_html_())
    assert {term["source"] for term in case.errors} <= set(shown)
    assert {part["part"] for part in case.costs} <= set(shown)


def test_a_dump_lists_its_layers_without_reading_tensors():
    dump = lq.read_layer_dump("examples/minilm.pt")
    html = dump._repr_html_()
    table = cells(html)
    assert all(name in table for name in dump)
    assert "1,536" in table


def test_a_quantized_model_lists_its_layers(solution, tmp_path):
    path = lq.write_quantized_model(tmp_path / "q.safetensors", {"a<b": solution})
    html = lq.read_quantized_model(path)._repr_html_()
    assert "a&lt;b" in html
    assert "int4/g64/fp16 48x64" in cells(html)


def test_long_tables_are_cut_and_say_so():
    html = html_card("many", {}, [{"i": i} for i in range(75)])
    assert html.count("<tr>") + html.count("<tr ") == 61
    assert "15 more rows are not shown" in html


def test_long_texts_are_not_cut():
    assert "x" * 300 in html_card("title", {"fact": "x" * 300})
    assert pd.get_option("display.max_colwidth") == 50
