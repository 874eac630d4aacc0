"""What a report says first: which case it chooses, why, and what it warns of."""

import pytest

from loraq_sim.reporting.report_data import MixedModel, ReportData, answers
from loraq_sim.results.wording import limit_text, listing, value_text


def total(label, error, latency, weights, **more):
    split = label.partition(" ")[0]
    return {
        **{"context": "aie2", "accelerator": "aie2", "label": label, "split": split},
        **{"output_error": error, "sqnr_db": 20.0, "latency_s": latency, "weight_bytes": weights},
        **{"bits_per_weight": 4.5, "energy_j": latency * 2, "dram_bytes": weights * 3},
        **{"status": "ok", "message": "", "overflow_count": 0, "safe_acc_bits": 18, "acc_bits": 32},
    } | more


def data_of(totals, **more):
    costs = ("latency_s", "weight_bytes", "energy_j", "dram_bytes")

    def on_front(row, cost):
        return row["status"] == "ok" and not any(
            other["status"] == "ok"
            and other[cost] <= row[cost]
            and other["output_error"] <= row["output_error"]
            and (other[cost], other["output_error"]) != (row[cost], row["output_error"])
            for other in totals
        )

    marked = [row | {"fronts": tuple(c for c in costs if on_front(row, c))} for row in totals]
    rows = [row | {"layer": "l"} for row in totals]
    return ReportData(title="t", error="output_error", rows=rows, totals=marked, **more)


TOTALS = (
    total("W4A4", 0.20, 1.0e-3, 1.0e6),
    total("W4A4+W8A8r16", 0.10, 1.2e-3, 1.1e6),
    total("W4A4+W8A8r64", 0.09, 2.0e-3, 1.5e6),
    total("W8A8", 0.01, 2.5e-3, 2.0e6),
)


def test_the_verdict_is_told_first_and_is_the_choice():
    data = data_of(TOTALS)
    (answer,) = answers(data)
    assert answer.best["label"] == data.verdict.label == "W4A4+W8A8r16"
    assert answer.cost == "latency_s"
    assert tuple(answer.sentences[: len(data.verdict.sentences)]) == data.verdict.sentences
    assert [role for role, _ in answer.choices][0] == "verdict"


def test_latencies_within_the_model_s_error_do_not_choose():
    close = [row | {"latency_s": 1e-3 * (1 + i / 100)} for i, row in enumerate(TOTALS)]
    (answer,) = answers(data_of(close))
    assert answer.best["label"] == "W8A8"


def test_without_a_measurement_the_report_says_so():
    (answer,) = answers(data_of(TOTALS))
    assert any("Too little was measured on aie2" in sentence for sentence in answer.sentences)
    elsewhere = {"aie2": {"bound": 0.2, "seen": "worst of 9 GEMMs of 3 devices"}}
    (answer,) = answers(data_of(TOTALS, uncertainty=elsewhere))
    assert any("20.0 %, worst of 9 GEMMs of 3" in sentence for sentence in answer.sentences)


def test_overflows_of_the_choice_are_told_with_the_width_that_helps():
    rows = [row | {"overflow_count": 1234, "acc_bits": 16} for row in TOTALS]
    (answer,) = answers(data_of(rows))
    told = "1,234 sums overflow its 16-bit accumulators; 18 bits would hold every sum"
    assert any(sentence.startswith(told) for sentence in answer.sentences)


def test_a_mix_that_beats_the_choice_is_told_and_one_that_does_not_is_not():
    def said(mixed_error):
        gains = [{"label": "W4A4+W8A8r16", "output_error": 0.1, "mixed_error": mixed_error}]
        mix = MixedModel(
            context="aie2", cost="latency_s", error="output_error", frontier=(), gains=gains
        )
        (answer,) = answers(data_of(TOTALS, mixed=[mix]))
        return " ".join(answer.sentences)

    assert "with no more latency a mix has 20 % less error" in said(0.08)
    assert "mix" not in said(0.1)


def test_one_case_is_an_answer_too():
    (answer,) = answers(data_of(TOTALS[:1]))
    assert answer.verdict.headline == "Build W4A4 on aie2"
    assert not any("least" in sentence.lower() for sentence in answer.sentences)


def test_nothing_evaluated_is_said_and_no_choice_is_made_up():
    failed = [TOTALS[0] | {"status": "incomplete", "output_error": None, "message": "1 missing"}]
    (answer,) = answers(data_of(failed))
    assert answer.best is None
    assert answer.sentences[0] == "No split could be evaluated on aie2."
    assert "1 of 1 layer cases failed" in " ".join(answer.sentences)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("output_error", 0.0417, "4.17 %"),
        ("latency_s", 2.97e-3, "2.97 ms"),
        ("latency_s", 84.4e-6, "84.4 µs"),
        ("weight_bytes", 319 * 1024, "319 KiB"),
        ("energy_j", None, "not known"),
        ("energy_j", float("nan"), "not known"),
    ],
)
def test_values_carry_their_unit(key, value, text):
    assert value_text(key, value) == text


def test_listing():
    assert [listing(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_limits_are_rounded_towards_what_keeps_them_true():
    assert limit_text("weight_bytes", 2.004 * 2**20, 2**20) == "2.00 MiB"
    assert limit_text("weight_bytes", 1.996 * 2**20, 2**20) == "1.99 MiB"
    assert limit_text("weight_bytes", 2.004 * 2**20, 2.001 * 2**20) == "2.004 MiB"
    assert limit_text("output_error", 0.05, 0.0) == "5.00 %"
    assert limit_text("latency_s", 1234.5, 1234.0) == "1,234.5 s"
