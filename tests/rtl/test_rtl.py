"""The emulator against Verilog: committed golden vectors always, the simulator where installed."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.requantize import srs
from loraq_sim.formats import Rounding, Saturation

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.json"))
NAMES = [path.stem for path in GOLDEN]


def read_golden(name):
    path = Path(__file__).parent.parent / "golden" / f"{name}.json"
    return json.loads(path.read_text())


def mac_of(config):
    return MacArray(
        acc_bits=config["acc_bits"],
        overflow=config["overflow"],
        products_per_add=config["c"],
        accumulators=config["p"],
        tree_bits=config["tree_bits"],
        tree_overflow=config["tree_overflow"],
    )


def assert_emulator_gives(record, config, inputs):
    """Compare accumulators, counts and every SRS output with what the RTL computed."""
    a = np.array(inputs["a"], dtype=np.int16 if config["a_bits"] == 16 else np.int64)
    w = np.array(inputs["w"], dtype=np.int8 if config["w_signed"] else np.uint8)
    init = np.array(inputs["init"], dtype=np.int64)
    mac = mac_of(config)
    report = emulate_gemm_report(a, w, mac, init=init, a_bits=max(config["a_bits"], 8))
    np.testing.assert_array_equal(report.acc.reshape(-1), record["acc"])
    np.testing.assert_array_equal(emulate_gemm(a, w, mac, init=init).reshape(-1), record["acc"])
    assert report.overflow_count == sum(record["overflows"])
    assert report.tree_overflow_count == sum(record["tree_overflows"])
    events = np.array(record["overflows"]) + np.array(record["tree_overflows"])
    assert report.outputs_affected == np.count_nonzero(events)
    for setting, expected in zip(config["srs"], record["out"], strict=True):
        out = srs(report.acc, out_bits=config["out_bits"], signed=config["out_signed"], **setting)
        np.testing.assert_array_equal(out.reshape(-1), expected, err_msg=str(setting))


@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors_agree_with_the_emulator(name):
    golden = read_golden(name)
    assert len(golden["acc"]) >= 200
    assert_emulator_gives(golden, golden["config"], golden)


@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors_come_from_the_verilog_beside_them(name, icarus_module):
    assert read_golden(name)["rtl_sha256"] == icarus_module.sources_digest()


def test_every_configuration_has_golden_vectors(icarus_module):
    assert sorted(icarus_module.CONFIGURATIONS) == NAMES
    assert len(NAMES) >= 12


def test_golden_vectors_reach_every_mode_and_overflow():
    records = [read_golden(name) for name in NAMES]
    settings = [s for record in records for s in record["config"]["srs"]]
    modes = {(s["rounding"], s["saturation"]) for s in settings}
    assert modes == {(r.value, s.value) for r in Rounding for s in Saturation}
    assert all(sum(record["overflows"]) > 0 for record in records)
    assert sum(sum(record["tree_overflows"]) > 0 for record in records) >= 2


@pytest.mark.parametrize("name", ["mac.sv", "srs.sv", "tile.sv"])
def test_the_package_ships_the_verilog_tested_here(name):
    shipped = resources.files("loraq_sim.emulator") / "rtl" / name
    assert shipped.read_bytes() == Path(__file__).with_name(name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_still_gives_the_golden_vectors(name, icarus):
    golden = read_golden(name)
    simulated = icarus.simulate(golden["config"], golden)
    assert simulated == {key: golden[key] for key in simulated}


@pytest.mark.parametrize("name", NAMES)
def test_fresh_vectors_agree_with_the_simulator(name, icarus):
    config = icarus.configuration(name)
    inputs = icarus.draw_inputs(config, np.random.default_rng(2024))
    assert_emulator_gives(icarus.simulate(config, inputs), config, inputs)
