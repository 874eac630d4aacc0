import math

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.errors import InputError
from loraq_sim.metrics import AGGREGATES
from loraq_sim.results.totals import model_totals
from loraq_sim.time_steps import StepErrors, evaluate_steps, step_report

# Shares are a handful of float64 sums and quotients of at most 100 positive terms.
RTOL = 100 * 2.0**-52


def errors_of(name, miss, size, rows, **case):
    known = {
        **{"layer": name, "kind": "fc", "m": 64, "n": 8, "k": 8, "calls_per_step": 1},
        **{"accelerator": "aie2", "split": "W4A4", "method": "rtn", "preset": "fast"},
        **{"smooth": None, "rotation": "", "condition": "", "finish": ""},
        **{"calibration": "all", "calibration_rows": 9, "seed": 0},
        **{
            "tokens": sum(rows),
            "output_error": math.sqrt(sum(miss) / sum(size) if sum(size) else 0),
        },
        "output_rms": math.sqrt(sum(size) / (sum(rows) * 8)),
    }
    return StepErrors(
        case=known | case,
        steps=np.array([1000.0, 500.0]),
        rows=np.array(rows),
        squared_error=np.array(miss, dtype=np.float64),
        squared_output=np.array(size, dtype=np.float64),
        solution=None,
    )


def test_shares_by_hand():
    a = errors_of("a", [3, 1], [100, 100], [3, 1])
    b = errors_of("b", [2, 2], [50, 50], [2, 2], calls_per_step=2)
    report = step_report([a, b], aggregate="rms")
    # e_a^2 = 4/200 = 0.02, e_b^2 = 4/100 = 0.04 at weight 2: the sum is 0.1, of weight 3.
    assert report.case["output_error"] == pytest.approx(math.sqrt(0.1 / 3), rel=RTOL)
    shares = [cell["share"] for cell in report.cells]
    assert shares == pytest.approx([0.15, 0.05, 0.4, 0.4], rel=RTOL)
    # Per row a has errors 1, 1 and outputs 100/3, 100: 0.0075 at each step; b 0.02 as before.
    run_shares = [cell["run_share"] for cell in report.cells]
    whole = 2 * 0.0075 + 2 * 0.04
    assert run_shares == pytest.approx(
        [0.0075 / whole, 0.0075 / whole, 0.04 / whole, 0.04 / whole], rel=RTOL
    )
    assert [row["share"] for row in report.steps] == pytest.approx([0.55, 0.45], rel=RTOL)
    assert [row["share"] for row in report.layers] == pytest.approx([0.2, 0.8], rel=RTOL)
    # At the first step alone, e^2 is 3/100 and 2/50, of weights 1 and 2.
    assert report.steps[0]["output_error"] == pytest.approx(math.sqrt(0.11 / 3), rel=RTOL)
    assert (report.case["dominant_layer"], report.case["half_layers"]) == ("b", 1)


def test_where_every_step_has_as_many_rows_both_shares_agree():
    errors = [errors_of("a", [3, 1], [90, 100], [4, 4]), errors_of("b", [2, 5], [50, 60], [4, 4])]
    for cell in step_report(errors).cells:
        assert cell["share"] == pytest.approx(cell["run_share"], rel=RTOL)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_totals_are_those_of_the_model_and_its_layers(request, aggregate):
    dump = lq.read_layer_dump(request.config.rootpath / "examples" / "tiny_pixart.pt")
    dump = dump.select("*.0.attn1.to_q,*.3.attn1.to_v,*.0.attn2.to_k")
    errors = [evaluate_steps(dump, name, "W4A4", "aie2") for name in dump]
    report = step_report(errors, aggregate=aggregate)
    rows = [lq.evaluate_layer(layer, "W4A4", "aie2") for layer in dump.values()]
    (total,) = model_totals(rows, aggregate=aggregate)
    # Sums of up to 512 * 128 squares per layer in another order, see test_errors.
    rtol = 4 * 512 * 128 * 2.0**-53
    assert report.case["output_error"] == pytest.approx(total["output_error"], rel=rtol)
    assert sum(row["share"] for row in report.layers) == pytest.approx(1.0, rel=RTOL)
    for table, key in ((report.steps, "step"), (report.layers, "layer")):
        for name in ("share", "run_share"):
            for row in table:
                cells = [c[name] for c in report.cells if c[key] == row[key]]
                assert math.fsum(cells) == pytest.approx(row[name], rel=RTOL)
    for row, cells in zip(rows, np.array_split(report.cells, len(rows)), strict=True):
        miss = math.fsum(cell["squared_error"] for cell in cells)
        size = math.fsum(cell["squared_output"] for cell in cells)
        assert math.sqrt(miss / size) == pytest.approx(row["output_error"], rel=rtol)


def test_a_step_without_rows_and_a_layer_without_error_have_no_part():
    a = errors_of("a", [3, 0], [100, 0], [3, 0])
    zero = errors_of("zero", [0, 0], [0, 0], [2, 1])
    report = step_report([a, zero])
    assert [cell["share"] for cell in report.cells] == [1.0, None, 0.0, 0.0]
    assert report.steps[1]["output_error"] is None
    assert report.layers[1]["dominant_step"] is None
    assert (report.steps[1]["dominant_layer"], report.steps[0]["dominant_layer"]) == ("", "a")


def test_without_any_error_all_shares_are_zero():
    report = step_report([errors_of("a", [0, 0], [5, 5], [1, 1])])
    assert {cell["share"] for cell in report.cells} == {0.0}
    assert (report.case["output_error"], report.case["half_layers"]) == (0.0, 0)


def test_no_layer_and_layers_of_other_steps_are_refused():
    with pytest.raises(InputError, match="no layer was measured"):
        step_report([])
    a, b = (errors_of(name, [1, 1], [5, 5], [1, 1]) for name in "ab")
    b.steps[0] = 999.0
    with pytest.raises(InputError, match="different time steps"):
        step_report([a, b])
