"""Methods at equal bytes: who is compared with whom, and what is said of it."""

import pytest

from loraq_sim.reporting.report_data import ReportData
from loraq_sim.reporting.sections import compare_methods, method_sentences


def data_of(*cases):
    totals = [
        {
            **{"context": "npu", "accelerator": "npu", "status": "ok", "split": split},
            **{"method": method, "weight_bytes": weights, "output_error": error},
            **{"label": f"{split} {method}", "bits_per_weight": weights / 100},
        }
        for split, method, weights, error in cases
    ]
    return ReportData(title="t", error="output_error", rows=(), totals=totals)


def test_equal_bytes_and_equal_main_precision_are_compared_best_case_of_each():
    data = data_of(
        ("W4A4+W8A8r8", "loraq", 500, 0.10),
        ("W4A4+W4A8r16", "loraq", 504, 0.08),
        ("W4A4+W16A16r4", "svdquant", 502, 0.12),
        ("W4A8+W8A8r8", "svdquant", 500, 0.05),
        ("W4A4+W8A8r64", "svdquant", 900, 0.01),
    )
    (found,) = compare_methods(data)
    assert found.name == "W4A4, 5.00 bits per weight"
    assert {method: row["output_error"] for method, row in found.best.items()} == {
        "loraq": 0.08,
        "svdquant": 0.12,
    }
    (said,) = method_sentences([found], "npu")
    assert said == (
        "At equal bytes loraq has less output error than svdquant in the only case; "
        "at the median 33 % less."
    )
    assert method_sentences([found], "elsewhere") == []


def test_one_percent_more_bytes_is_equal_and_two_is_not():
    alike = data_of(("W4A4+a", "x", 1000, 0.1), ("W4A4+b", "y", 1010, 0.1))
    assert len(compare_methods(alike)) == 1
    assert compare_methods(data_of(("W4A4+a", "x", 1000, 0.1), ("W4A4+b", "y", 1020, 0.1))) == []


def test_the_winner_is_named_first_and_a_tie_is_a_tie():
    data = data_of(
        ("W4A4+a", "x", 1000, 0.2),
        ("W4A4+a", "y", 1000, 0.1),
        ("W4A4+b", "x", 2000, 0.1),
        ("W4A4+b", "y", 2000, 0.09),
    )
    (said,) = method_sentences(compare_methods(data), "npu")
    assert said.startswith("At equal bytes y has less output error than x in 2 of 2 comparisons")
    tie = data_of(("W4A4+a", "x", 1000, 0.1), ("W4A4+a", "y", 1000, 0.1))
    assert "the same output error" in method_sentences(compare_methods(tie), "npu")[0]


@pytest.mark.parametrize("error", [None, float("nan")])
def test_cases_without_an_error_are_left_out(error):
    data = data_of(("W4A4+a", "x", 1000, error), ("W4A4+a", "y", 1000, 0.1))
    assert compare_methods(data) == []
