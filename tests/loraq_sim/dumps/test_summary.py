import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps.layer_dump import LayerDump, read_layer_dump
from loraq_sim.dumps.steps import summarize
from loraq_sim.dumps.write import write_layer_dump
from loraq_sim.layers import Layer

EXAMPLES = Path(__file__).parents[3] / "examples"

# Sums of a few hundred float64 terms: 1e-12 is thousands of times their rounding error.
RTOL = 1e-12


def dump_of(tmp_path, *layers):
    return read_layer_dump(write_layer_dump(tmp_path / "a.safetensors", layers))


def test_sizes_alone_read_no_values(monkeypatch):
    dump = read_layer_dump(EXAMPLES / "minilm.pt")
    monkeypatch.setattr(LayerDump, "__getitem__", lambda *_: pytest.fail("a layer was loaded"))
    rows = summarize(dump, statistics=False)
    assert len(rows) == 8
    assert rows[5] == {
        "layer": "encoder.layer.2.intermediate.dense",
        "kind": "ffn_up",
        "group": "encoder.layer.2.intermediate.dense",
        "n": 1536,
        "k": 384,
        "tokens": 256,
        "rows_per_call": None,
        "calls_per_step": 1,
        "dtype": "float16",
        "bytes": 2 * (1536 * 384 + 1536),
        "status": "ok",
        "message": "",
    }


def test_statistics_match_plain_python(tmp_path):
    rng = np.random.default_rng(3)
    weight = rng.standard_t(5, size=(12, 9)).astype(np.float32) + np.float32(0.25)
    x = (rng.standard_normal((20, 9)) * np.geomspace(1, 30, 9)).astype(np.float32)
    row = summarize(dump_of(tmp_path, Layer(name="fc", weight=weight, activations=x)))[0]

    values = [float(v) for v in weight.ravel()]
    mean = math.fsum(values) / len(values)
    std = statistics.pstdev(values)
    fourth = math.fsum((v - mean) ** 4 for v in values) / len(values)
    rms = [math.sqrt(math.fsum(float(v) ** 2 for v in column) / 20) for column in x.T]
    expected = {
        "weight_std": std,
        "weight_max_abs": max(abs(v) for v in values),
        "weight_max_over_std": max(abs(v) for v in values) / std,
        "weight_kurtosis": fourth / std**4 - 3,
        "activation_rms": math.sqrt(math.fsum(float(v) ** 2 for v in x.ravel()) / x.size),
        "activation_max_abs": max(abs(float(v)) for v in x.ravel()),
        "activation_outlier_ratio": max(rms) / statistics.median(rms),
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=RTOL)


def test_a_gaussian_weight_has_no_excess_kurtosis(tmp_path):
    weight = np.random.default_rng(1).standard_normal((300, 300))
    row = summarize(dump_of(tmp_path, Layer(name="fc", weight=weight)))[0]
    # The standard error of a Gaussian's kurtosis is sqrt(24 / count); five of them.
    assert abs(row["weight_kurtosis"]) < 5 * math.sqrt(24 / weight.size)
    assert row["activation_rms"] is None


def test_constant_and_zero_tensors_give_none_instead_of_dividing_by_zero(tmp_path):
    layer = Layer(name="fc", weight=np.zeros((4, 3)), activations=np.zeros((2, 3)))
    row = summarize(dump_of(tmp_path, layer), singular_values=True)[0]
    assert row["weight_std"] == row["weight_max_abs"] == row["activation_rms"] == 0
    for column in (
        "weight_max_over_std",
        "weight_kurtosis",
        "weight_top32_energy",
        "activation_outlier_ratio",
    ):
        assert row[column] is None


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_top_energy_is_the_share_of_the_32_largest_singular_values(tmp_path, shape):
    rng = np.random.default_rng(5)
    left = np.linalg.qr(rng.standard_normal((shape[0], 40)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], 40)))[0]
    spectrum = np.arange(40, 0, -1.0)
    weight = (left * spectrum) @ right.T
    row = summarize(
        dump_of(tmp_path, Layer(name="fc", weight=weight)), statistics=False, singular_values=True
    )[0]
    energies = [s * s for s in range(40, 0, -1)]
    # float32 storage perturbs every singular value by at most eps * norm: 1e-6 of the energy.
    assert row["weight_top32_energy"] == pytest.approx(sum(energies[:32]) / sum(energies), rel=1e-6)
    assert "weight_std" not in row


def test_a_bad_layer_gives_a_failed_row_and_the_others_their_numbers(tmp_path):
    path = tmp_path / "a.npz"
    weight = np.ones((2, 3), dtype=np.float32)
    spoiled = weight * np.float32("nan")
    np.savez(path, **{"a.weight": weight, "b.weight": spoiled, "c.weight": np.ones((2, 3), int)})
    rows = summarize(read_layer_dump(path))
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]
    assert "layer 'b': weight holds 6 of 6 values that are NaN or Inf" in rows[1]["message"]
    assert (rows[1]["n"], rows[1]["weight_std"]) == (2, None)
    assert "layer 'c': weight has dtype int64" in rows[2]["message"]
    assert rows[2]["n"] is None
    assert len({tuple(row) for row in rows}) == 1
