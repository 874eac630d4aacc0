"""Upshift, SRS and multipliers against Verilog: golden vectors always, the simulator if there."""

import json
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.emulator.requantize import gemmlowp_requantize, single_rounding_requantize, srs, ups
from loraq_sim.formats import Rounding, Saturation

FOLDER = Path(__file__).parent.parent / "golden" / "requantize"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def read_golden(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def assert_emulator_gives(record, config, inputs):
    """Compare every vector with what the RTL computed; return how many results were compared."""
    output = {"out_bits": config["out_bits"], "signed": config["out_signed"]}
    count = 0
    for i, x in enumerate(inputs["x"]):
        raised = {"acc_bits": config["ups_acc_bits"]}
        shift = inputs["up_shift"][i]
        got = {
            "ups_wrap": ups([x], shift, **raised),
            "ups_after": ups([x], shift, saturate=True, **raised),
            "ups_before": ups([x], shift, saturate=True, clamp="before", **raised),
            "srs": srs([inputs["wide"][i]], **inputs["settings"][i], **output),
        }
        acc, factor, zero = inputs["acc"][i], inputs["factor"][i], inputs["zero_point"][i]
        scaled = output | {"zero_point": zero}
        got["twice"] = gemmlowp_requantize([acc], factor, inputs["exponent"][i], **scaled)
        if factor >= 0:
            got["once"] = single_rounding_requantize([acc], factor, inputs["shift"][i], **scaled)
        for name, value in got.items():
            assert int(value[0]) == record[name][i], f"vector {i}: {name}"
        count += len(got)
    return count


@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors_agree_with_the_emulator(name):
    golden = read_golden(name)
    assert assert_emulator_gives(golden, golden["config"], golden) >= 1200


@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors_come_from_the_verilog_beside_them(name, requantize_rtl, icarus_module):
    expected = icarus_module.sources_digest(requantize_rtl.SOURCES)
    assert read_golden(name)["rtl_sha256"] == expected


def test_every_configuration_has_golden_vectors_and_they_reach_every_mode(requantize_rtl):
    assert sorted(requantize_rtl.CONFIGURATIONS) == NAMES
    for name in NAMES:
        golden = read_golden(name)
        modes = {(s["rounding"], s["saturation"]) for s in golden["settings"]}
        assert modes == {(r.value, s.value) for r in Rounding for s in Saturation}
        # Neither all clamped nor all in range, and the two multipliers do differ.
        for result in ("srs", "twice", "once"):
            assert len(set(golden[result])) > (5 if golden["config"]["out_bits"] == 4 else 40)
        assert golden["ups_wrap"] != golden["ups_after"] != golden["ups_before"]


@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_still_gives_the_golden_vectors(name, simulator, requantize_rtl):
    golden = read_golden(name)
    simulated = requantize_rtl.simulate(golden["config"], golden)
    assert simulated == {key: golden[key] for key in simulated}


@pytest.mark.parametrize("name", NAMES)
def test_fresh_vectors_agree_with_the_simulator(name, simulator, requantize_rtl):
    config = requantize_rtl.configuration(name)
    inputs = requantize_rtl.draw_inputs(config, np.random.default_rng(77))
    assert_emulator_gives(requantize_rtl.simulate(config, inputs), config, inputs)
