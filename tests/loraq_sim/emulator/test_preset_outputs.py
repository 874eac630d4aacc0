"""Vectors of array presets: sums of the array, outputs of its requantizer, files that say so."""

import json

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.presets import array_preset, list_array_presets
from loraq_sim.emulator.requantizers import (
    DoubleScale,
    FixedPoint,
    FloatSteps,
    NvdlaStages,
    XmosTransform,
)
from loraq_sim.emulator.vector_files import MANIFEST, VECTOR_FILES, write_vectors
from loraq_sim.emulator.vectors import SrsSetting, filling_requantizer, make_vectors
from loraq_sim.errors import InputError
from loraq_sim.quantizers import quantize

ONE_LEVEL = [n for n in list_array_presets() if isinstance(array_preset(n).array, MacArray)]
KINDS = {
    "float": FloatSteps,
    "double": DoubleScale,
    "nvdla": NvdlaStages,
    "xmos": XmosTransform,
}


def operands(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((6, 48)).astype(np.float32) * scale for _ in range(2))
    return quantize(x, "int8/row"), quantize(w, "int4/row")


def rebuilt(described):
    """A requantizer made of the manifest's values alone."""
    values = dict(described)
    rule = values.pop("rule")
    if "steps" in values:
        values["steps"] = tuple((name, np.array(term)) for name, term in values["steps"])
    if rule in KINDS:
        return KINDS[rule](**values)
    return FixedPoint(by=rule, **values)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_vectors_of_a_preset_are_its_array_and_its_requantizer(name, tmp_path):
    preset = array_preset(name)
    x, w = operands()
    setting = SrsSetting(rounding=preset.rounding, saturation=preset.saturation)
    vectors = make_vectors(x, w, (5, 4, 48), preset.array, setting, preset=preset)
    acc = emulate_gemm(x.codes[:5], w.codes[:4], preset.array)
    np.testing.assert_array_equal(vectors.acc[0], acc)
    manifest = write_vectors(vectors, tmp_path, {"title": name})
    assert json.loads((tmp_path / MANIFEST).read_text()) == manifest
    has_testbench = (tmp_path / "testbench.sv").exists()
    assert has_testbench == (preset.requantize == "srs")
    assert ("simulate" in manifest) == has_testbench
    if has_testbench:
        return
    assert manifest["testbench"].startswith("none: outputs are requantized by")
    out = rebuilt(manifest["requantizer"])(acc)
    np.testing.assert_array_equal(vectors.out[0], out)
    # The largest sum of each column is the largest code, or next to it.
    top = np.abs(out).max(axis=0)
    assert (top >= 126).all() or preset.runtime == "openvino"
    words = [int(line, 16) for line in (tmp_path / "out.hex").read_text().splitlines()]
    assert words == (out.astype(np.int64) & 0xFF).reshape(-1).tolist()
    assert manifest["files"]["out.hex"]["signed"] == (out.dtype.kind == "i")


def test_a_testbench_of_earlier_vectors_does_not_stay(tmp_path):
    x, w = operands()
    write_vectors(make_vectors(x, w, (2, 2, 8), MacArray(), SrsSetting()), tmp_path, {})
    assert (tmp_path / "testbench.sv").exists()
    xmos = array_preset("xmos")
    vectors = make_vectors(x, w, (2, 2, 8), xmos.array, SrsSetting(), preset=xmos)
    write_vectors(vectors, tmp_path, {}, force=True)
    assert {path.name for path in tmp_path.iterdir()} < set(VECTOR_FILES)
    assert not (tmp_path / "testbench.sv").exists()


@pytest.mark.parametrize("name", ONE_LEVEL)
@pytest.mark.parametrize("size", [0, 1, 2**20, 2**31 - 1])
def test_scales_fit_sums_of_every_size(name, size):
    preset = array_preset(name)
    acc = np.array([[size, -size, size // 3], [0, 1, -1]])
    requantizer = filling_requantizer(preset, acc, 8)
    assert (requantizer is None) == (preset.requantize == "srs")
    if requantizer is not None:
        out = requantizer(acc)
        assert out[0, 0] >= (126 if size else 0)
        assert out[1, 0] == 0


def test_xmos_has_outputs_of_8_bits_only():
    with pytest.raises(InputError, match="array xmos gives outputs of 8 bits, got out_bits=16"):
        filling_requantizer(array_preset("xmos"), np.array([[1]]), 16)
