"""The title sentence says what the rows say."""

import pytest

from reports.findings import front_rows, knee, pareto_finding, pareto_title


def make_row(split, error, latency, pareto=True):
    return {"split": split, "output_error": error, "latency_s": latency, "pareto": pareto}


def finding(rows):
    return pareto_finding(rows, ["latency_s"], "output_error")


@pytest.mark.parametrize(
    ("error", "latency", "sentence"),
    [
        (0.10, 1.04, "W4A4+W8A8r16 halves the error of W4A4 for +4 % latency"),
        (0.15, 1.10, "W4A4+W8A8r16 cuts the error of W4A4 by 25 % for +10 % latency"),
        (0.05, 2.50, "W4A4+W8A8r16 has 4.0× less error than W4A4 for 2.5× the latency"),
        (0.10, 1.001, "W4A4+W8A8r16 halves the error of W4A4 at the same latency"),
    ],
)
def test_finding_states_gain_and_price(error, latency, sentence):
    assert finding([make_row("W4A4", 0.20, 1.0), make_row("W4A4+W8A8r16", error, latency)]) == (
        sentence
    )


def test_finding_is_about_the_knee_of_three():
    rows = [make_row("a", 0.4, 1.0), make_row("b", 0.1, 1.2), make_row("c", 0.09, 4.0)]
    assert finding(rows).startswith("b has 4.0× less error than a")


def test_rows_off_the_front_do_not_speak():
    rows = [make_row("a", 0.4, 1.0), make_row("b", 0.1, 1.2), make_row("x", 0.2, 5.0, pareto=False)]
    assert "x" not in finding(rows).split()


def test_single_front_row_is_best_in_both():
    rows = [make_row("best", 0.1, 1.0), make_row("worse", 0.2, 2.0, pareto=False)]
    assert finding(rows) == "best has the least output error and the least latency of 2 splits"


def test_equal_rows_are_called_equal():
    rows = [make_row("a", 0.1, 1.0), make_row("b", 0.1, 1.0)]
    assert finding(rows) == "All 2 splits have the same output error and latency"


def test_one_row_is_called_the_only_one():
    assert finding([make_row("W4A4", 0.1, 1.0)]) == "W4A4 is the only split evaluated"


def test_no_front_is_said():
    assert finding([make_row("a", 0.1, 1.0, pareto=False)]) == (
        "No split on the front of output error against latency"
    )


def test_front_mark_may_be_an_integer():
    assert len(front_rows([make_row("a", 0.1, 1.0, pareto=1)], "latency_s", "output_error")) == 1


def test_knee_of_an_empty_front_is_none():
    assert knee([], "latency_s", "output_error") is None


def test_title_over_accelerators_names_each_choice():
    rows = [make_row("a", 0.4, 1.0), make_row("b", 0.1, 1.2)]
    only_a = [make_row("a", 0.1, 1.0)]
    groups = {"aie2": rows, "a100": only_a, "h100": only_a}
    assert pareto_title(groups, ["latency_s"], "output_error") == (
        "Best trade: b on aie2, a on a100 and h100"
    )
    same = {"aie2": rows, "a100": rows}
    assert pareto_title(same, ["latency_s"], "output_error") == (
        "b is the best trade on aie2 and a100"
    )


def test_finding_names_other_costs():
    rows = [
        {"split": "a", "output_error": 0.4, "weight_bytes": 100, "pareto": True},
        {"split": "b", "output_error": 0.2, "weight_bytes": 120, "pareto": True},
    ]
    assert pareto_finding(rows, ["weight_bytes"], "output_error") == (
        "b halves the error of a for +20 % weight memory"
    )


def test_finding_tells_every_price_and_every_saving():
    rows = [
        {"split": "a", "output_error": 0.4, "latency_s": 1.0, "weight_bytes": 100, "pareto": True},
        {"split": "b", "output_error": 0.2, "latency_s": 1.1, "weight_bytes": 80, "pareto": True},
    ]
    assert pareto_finding(rows, ["latency_s", "weight_bytes"], "output_error") == (
        "b halves the error of a for +10 % latency and with 20 % less weight memory"
    )


def test_eight_bit_reference_is_not_the_headline_of_a_four_bit_front():
    rows = [
        make_row("W4A4", 0.20, 1.0),
        make_row("W4A8+W8A8r16", 0.10, 1.1),
        make_row("W8A8", 0.01, 1.11),
    ]
    assert finding(rows) == "W4A8+W8A8r16 halves the error of W4A4 for +10 % latency"


def test_cheapest_row_alone_in_its_width_is_compared_with_all():
    rows = [make_row("W4A4", 0.20, 1.0), make_row("W8A8", 0.01, 1.11)]
    assert finding(rows) == "W8A8 has 20.0× less error than W4A4 for +11 % latency"


def test_prices_share_one_preposition():
    rows = [
        {"split": "a", "output_error": 0.4, "latency_s": 1.0, "weight_bytes": 100, "pareto": True},
        {"split": "b", "output_error": 0.2, "latency_s": 1.1, "weight_bytes": 120, "pareto": True},
    ]
    assert pareto_finding(rows, ["latency_s", "weight_bytes"], "output_error") == (
        "b halves the error of a for +10 % latency and +20 % weight memory"
    )
