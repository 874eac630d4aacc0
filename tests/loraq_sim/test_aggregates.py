import pytest

from loraq_sim.errors import InputError
from loraq_sim.metrics import AGGREGATES, aggregate_of
from loraq_sim.results.totals import model_totals

ROWS = [
    {"layer": "a", "m": 2, "n": 3, "k": 5, "calls_per_step": 2, "output_rms": 1.0},
    {"layer": "b", "m": 7, "n": 1, "k": 4, "calls_per_step": 1, "output_rms": 3.0},
]
ERRORS = (0.1, 0.4)


@pytest.mark.parametrize(
    ("name", "weights"),
    # Calls * m * n; calls; calls * m * n * rms^2; calls * m * n * k.
    [("outputs", (12, 7)), ("rms", (2, 1)), ("energy", (12, 63)), ("macs", (60, 28))],
)
def test_each_aggregate_weighs_squares_as_its_formula_says(name, weights):
    rows = [
        row | {"output_error": error, "weight_error": error, "status": "ok", "split": "W4A4"}
        for row, error in zip(ROWS, ERRORS, strict=True)
    ]
    (total,) = model_totals(rows, aggregate=name)
    square = sum(w * e**2 for w, e in zip(weights, ERRORS, strict=True))
    assert total["output_error"] == pytest.approx((square / sum(weights)) ** 0.5, rel=1e-14)
    # The weight error is weighed by the numbers of weights whatever the aggregate: 15 and 4.
    square = 15 * 0.1**2 + 4 * 0.4**2
    assert total["weight_error"] == pytest.approx((square / 19) ** 0.5, rel=1e-14)


def test_formulas_are_stated_and_unknown_names_refused():
    for name in AGGREGATES:
        assert "sqrt( sum_l c_l" in aggregate_of("output_error", name).formula
    with pytest.raises(InputError, match="unknown aggregate 'enrgy'; did you mean 'energy'"):
        aggregate_of("output_error", "enrgy")
