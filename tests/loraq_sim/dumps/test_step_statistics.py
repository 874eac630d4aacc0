import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.dumps.steps import (
    plain_step,
    step_counts,
    step_statistics,
    step_statistics_of_rows,
    steps_of_layer,
)
from loraq_sim.dumps.stored import step_record
from loraq_sim.dumps.write import write_layer_dump
from loraq_sim.errors import DumpError
from loraq_sim.layers import Layer

EXAMPLES = Path(__file__).parents[3] / "examples"
VALUES, COUNTS = [999.5, 500.0, 20.0], [7, 0, 9]

# Sums of a few hundred float64 terms: 1e-12 is thousands of times their rounding error.
RTOL = 1e-12


def layer_of(name="fc", *, k=6, **options):
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((4, k)).astype(np.float32)
    x = (rng.standard_t(4, size=(16, k)) * np.geomspace(1, 9, k) + 0.5).astype(np.float32)
    return Layer(name=name, weight=weight, **{"activations": x, "group": name} | options)


def dump_of(tmp_path, *layers, suffix="safetensors", counts=None):
    meta = {"time_steps": {"values": VALUES, "rows": counts or {"*": COUNTS}}}
    return read_layer_dump(write_layer_dump(tmp_path / f"a.{suffix}", layers, meta=meta))


def rms(values):
    return math.sqrt(math.fsum(v * v for v in values) / len(values))


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
def test_statistics_of_each_step_match_plain_python(tmp_path, suffix):
    layer = layer_of()
    rows = step_statistics(dump_of(tmp_path, layer, suffix=suffix))
    assert [(row["step"], row["rows"]) for row in rows] == [(999.5, 7), (500, 0), (20, 9)]
    x = [[float(v) for v in row] for row in layer.activations]
    first = [rms(column) for column in zip(*x[:7], strict=True)]
    for row, own in ((rows[0], x[:7]), (rows[2], x[7:])):
        values = [v for line in own for v in line]
        columns = list(zip(*own, strict=True))
        amax = [max(map(abs, column)) for column in columns]
        mean, std = statistics.fmean(values), statistics.pstdev(values)
        expected = {
            "rms": rms(values),
            "amax": max(amax),
            "channel_amax_ratio": max(amax) / statistics.median(amax),
            "kurtosis": statistics.fmean((v - mean) ** 4 for v in values) / std**4 - 3,
            "first_step_correlation": statistics.correlation([rms(c) for c in columns], first),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=RTOL), name
    assert rows[0]["first_step_correlation"] == pytest.approx(1.0, rel=RTOL)
    for name in ("rms", "amax", "channel_amax_ratio", "kurtosis", "first_step_correlation"):
        assert rows[1][name] is None


def test_a_layer_without_activations_or_with_a_wrong_count_has_one_row(tmp_path):
    layers = (layer_of("a"), layer_of("none", activations=None), layer_of("odd"))
    rows = step_statistics(dump_of(tmp_path, *layers, counts={"*": COUNTS, "odd": [1, 2, 3]}))
    assert [row["layer"] for row in rows] == ["a", "a", "a", "none", "odd"]
    assert (rows[3]["status"], rows[3]["message"], rows[3]["step"]) == (
        "ok",
        "no activations",
        None,
    )
    assert rows[4]["status"] == "failed"
    assert "counts 6 rows for layer 'odd', which has 16" in rows[4]["message"]


def test_a_dump_without_a_record_says_what_to_do():
    with pytest.raises(DumpError, match="does not record which time step .* capture it again"):
        step_statistics(read_layer_dump(EXAMPLES / "minilm.pt"))


def test_constant_and_zero_rows_have_no_ratios():
    rows = step_statistics_of_rows(np.zeros((3, 4), dtype=np.float32), np.array([1, 2]))
    assert rows[0] == {
        "rms": 0.0,
        "amax": 0.0,
        "channel_amax_ratio": None,
        "kurtosis": None,
        "first_step_correlation": None,
    }


def test_rows_of_a_captured_dump_drift_away_from_the_first_step():
    dump = read_layer_dump(EXAMPLES / "tiny_pixart.pt").select("ffn_down")
    rows = step_statistics(dump)
    assert len(rows) == 2 * 25
    assert sum(row["rows"] for row in rows) == 2 * 512
    first, *_, last = rows[:25]
    assert first["first_step_correlation"] == pytest.approx(1.0, rel=RTOL)
    assert last["first_step_correlation"] < 0.8
    assert json.loads(json.dumps(rows)) == rows


def test_counts_and_values_of_a_layer_agree_with_its_steps_row_by_row(tmp_path):
    dump = dump_of(tmp_path, layer_of())
    values, counts = step_counts(dump, "fc")
    np.testing.assert_array_equal(values, VALUES)
    np.testing.assert_array_equal(counts, COUNTS)
    np.testing.assert_array_equal(steps_of_layer(dump, "fc"), [999.5] * 7 + [20.0] * 9)
    assert step_record(VALUES, {"fc": np.repeat([0, 2], [7, 9])}) == {
        "values": VALUES,
        "rows": {"fc": COUNTS},
    }


@pytest.mark.parametrize("values", [[999.5, float("nan"), 1.0], [1.0, float("inf"), 2.0]])
def test_values_that_are_no_numbers_are_refused(tmp_path, values):
    dump = dump_of(tmp_path, layer_of())
    dump.meta["time_steps"] = {"values": values, "rows": {"*": COUNTS}}
    with pytest.raises(DumpError, match="is incomplete"):
        step_counts(dump, "fc")


def test_whole_steps_are_written_without_a_fraction():
    assert [str(plain_step(value)) for value in (960.0, 999.5, 0.0)] == ["960", "999.5", "0"]
