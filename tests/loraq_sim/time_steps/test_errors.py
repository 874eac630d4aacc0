import dataclasses
import math

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.dumps.steps import steps_of_layer
from loraq_sim.errors import DumpError, InputError
from loraq_sim.time_steps import evaluate_steps, step_report

LAYER = "transformer_blocks.0.ff.net.2"
SPLIT = "W4A4+W8A8r4"
OPTIONS = {"method": "qera", "preset": "fast"}


@pytest.fixture(scope="module")
def dump(request):
    return lq.read_layer_dump(request.config.rootpath / "examples" / "tiny_pixart.pt")


def made_dump(tmp_path, *, counts, **options):
    rng = np.random.default_rng(1)
    known = {
        "weight": rng.standard_normal((8, 32)).astype(np.float32),
        "activations": rng.standard_normal((sum(counts), 32)).astype(np.float32),
    }
    layer = lq.Layer(name="fc", **known | options)
    meta = {"time_steps": {"values": list(range(len(counts))), "rows": {"*": counts}}}
    return lq.read_layer_dump(lq.write_layer_dump(tmp_path / "a.safetensors", [layer], meta=meta))


@pytest.mark.parametrize("tokens", [None, 200])
def test_squared_errors_of_the_steps_sum_to_what_evaluate_layer_reports(dump, tokens):
    found = evaluate_steps(dump, LAYER, SPLIT, "aie2", tokens=tokens, **OPTIONS)
    row = lq.evaluate_layer(dump[LAYER], SPLIT, "aie2", tokens=tokens, **OPTIONS)
    miss, size = math.fsum(found.squared_error), math.fsum(found.squared_output)
    # Both sides sum n = rows * N squares in float64, in another order: each sum is off by at most
    # n * 2^-53 of itself, a ratio of two by twice that, and its root by half of it again.
    rtol = 2 * row["tokens"] * row["n"] * 2.0**-53
    assert math.sqrt(miss / size) == pytest.approx(row["output_error"], rel=rtol)
    assert found.case["output_error"] == pytest.approx(row["output_error"], rel=rtol)
    assert found.case["output_rms"] == pytest.approx(row["output_rms"], rel=rtol)
    for name in ("rank", "weight_error", "overflow_count", "tokens", "m", "n", "k", "split"):
        assert found.case[name] == row[name]


@pytest.mark.parametrize(
    "asked",
    [
        {"rotate": "hadamard:16", "smooth": 0.5},
        {"condition": "auto"},
        {"condition": "rms", "finish": "data"},
    ],
)
@pytest.mark.parametrize("split", ["W4A4u+W8A8r4", "W4A4~W8A8@fp16r4"])
def test_conditioned_layers_lose_what_their_rows_say(dump, split, asked):
    options = {"preset": "fast", "tokens": 200} | asked
    found = evaluate_steps(dump, LAYER, split, "aie2", **options)
    row = lq.evaluate_layer(dump[LAYER], split, "aie2", **options)
    assert found.case["output_error"] == pytest.approx(row["output_error"], rel=1e-9)
    for name in ("rank", "feedback_rank", "rotation", "smooth", "condition", "finish"):
        assert found.case[name] == row[name]


def test_values_clipped_where_they_are_stored_count(tmp_path):
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((8, 32)) * 1e5).astype(np.float32)
    dump = made_dump(tmp_path, counts=[2, 3], weight=weight)
    found = evaluate_steps(dump, "fc", "W16A16", "h100")
    row = lq.evaluate_layer(dump["fc"], "W16A16", "h100")
    assert row["clipped_count"] > 0
    for name in ("clipped_count", "first_clipped", "status"):
        assert found.case[name] == row[name]


def test_the_error_of_a_step_is_that_of_its_rows_alone(dump):
    found = evaluate_steps(dump, LAYER, SPLIT, "aie2", **OPTIONS)
    of_row = steps_of_layer(dump, LAYER)
    for s in (0, 11, 24):
        rows = dump[LAYER].activations[of_row == found.steps[s]]
        alone = dataclasses.replace(dump[LAYER], activations=rows)
        row = lq.evaluate_layer(alone, SPLIT, "aie2", solution=found.solution)
        assert found.rows[s] == len(rows)
        # As above: n * 2^-52 for sums of n squares; rows are quantized one by one.
        rtol = 2 * rows.size * 2.0**-53
        assert found.output_error[s] == pytest.approx(row["output_error"], rel=rtol)


def test_the_solver_sees_the_chosen_steps_and_nothing_else(dump):
    found = evaluate_steps(dump, LAYER, SPLIT, "aie2", calibrate_on="first:2", **OPTIONS)
    seen = dump[LAYER].activations[np.isin(steps_of_layer(dump, LAYER), [1000.0, 960.0])]
    formats = {"main": "int4/g64", "branch": "int8/g64", "rank": 4}
    expected = lq.solve(dump[LAYER].weight, activations=seen, **formats, **OPTIONS)
    np.testing.assert_array_equal(found.solution.reconstruct(), expected.reconstruct())
    assert (found.case["calibration"], found.case["calibration_rows"]) == ("first:2", len(seen))
    assert found.case["tokens"] == 512


def test_calibration_on_a_step_helps_that_step_more_than_the_far_end(dump):
    on = {
        steps: evaluate_steps(dump, LAYER, SPLIT, "aie2", calibrate_on=steps, **OPTIONS)
        for steps in ("first:5", "last:5")
    }
    first, last = on["first:5"].output_error, on["last:5"].output_error
    assert first[:5].mean() < last[:5].mean()
    assert first[-5:].mean() > last[-5:].mean()


def test_smoothing_takes_its_factors_from_the_chosen_steps(dump):
    factors = [
        evaluate_steps(
            dump, LAYER, "W4A4", "aie2", smooth=0.5, calibrate_on=steps, preset="fast"
        ).solution.smooth
        for steps in ("all", "last")
    ]
    assert (factors[0] != factors[1]).any()


def test_steps_without_rows_have_no_error(tmp_path):
    dump = made_dump(tmp_path, counts=[5, 0, 3])
    found = evaluate_steps(dump, "fc", "W4A4", "aie2")
    np.testing.assert_array_equal(found.rows, [5, 0, 3])
    np.testing.assert_array_equal(np.isnan(found.output_error), [False, True, False])
    assert found.squared_error[1] == 0.0
    with pytest.raises(InputError, match="has no activation row at time steps 1"):
        evaluate_steps(dump, "fc", "W4A4", "aie2", calibrate_on="1")


def test_a_layer_that_gives_zeros_exactly_has_no_error(tmp_path):
    zero = np.zeros((8, 32), dtype=np.float32)
    found = evaluate_steps(made_dump(tmp_path, counts=[2, 2], weight=zero), "fc", "W4A4", "aie2")
    assert found.case["output_error"] == 0.0
    assert np.isnan(found.output_error).all()


def test_inputs_without_steps_activations_or_layer_are_refused(dump, tmp_path, request):
    plain = lq.read_layer_dump(request.config.rootpath / "examples" / "minilm.pt")
    with pytest.raises(DumpError, match="does not record which time step"):
        evaluate_steps(plain, next(iter(plain)), "W4A4", "aie2")
    silent = made_dump(tmp_path, counts=[2, 2], activations=None)
    with pytest.raises(InputError, match="layer 'fc' has no activations"):
        evaluate_steps(silent, "fc", "W4A4", "aie2")
    with pytest.raises(DumpError, match="no layer 'fc'"):
        evaluate_steps(dump, "fc", "W4A4", "aie2")


def test_a_step_whose_output_is_not_finite_has_an_infinite_error_and_the_whole_share(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((9, 32)).astype(np.float32)
    x[4] *= 1e5
    dump = made_dump(tmp_path, counts=[3, 3, 3], activations=x)
    found = evaluate_steps(dump, "fc", "W8A8", "t4", preset="fast")
    assert found.output_error[1] == math.inf
    assert np.isfinite(found.output_error[[0, 2]]).all()
    assert (found.case["output_error"], found.case["status"]) == (math.inf, "overflow")
    assert found.case["clipped_count"] > 0
    assert found.case["first_clipped"] == "y in fp16, row 4"
    report = step_report([found])
    assert report.case["output_error"] == math.inf
    assert [step["output_error"] == math.inf for step in report.steps] == [False, True, False]
    assert [step["share"] for step in report.steps] == [0, 1, 0]
    kept = evaluate_steps(dump, "fc", "W8A8", "aie2", preset="fast")
    assert (kept.case["status"], kept.case["clipped_count"]) == ("ok", 0)
