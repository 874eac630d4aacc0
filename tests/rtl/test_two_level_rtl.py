"""Two-level accumulation against Verilog: golden vectors always, the simulator where installed."""

import json
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.two_level import emulate_two_level, emulate_two_level_report

FOLDER = Path(__file__).parent.parent / "golden" / "two_level"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def read_golden(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def array_of(config):
    column = MacArray(
        acc_bits=config["acc_bits"],
        overflow=config["overflow"],
        products_per_add=config["c"],
        accumulators=config["p"],
        tree_bits=config["tree_bits"],
        tree_overflow=config["tree_overflow"],
    )
    return TwoLevelArray(
        column=column,
        column_k=config["column_k"],
        acc_bits=config["wide_acc_bits"],
        overflow=config["wide_overflow"],
    )


def assert_emulator_gives(record, config, inputs):
    a, w = np.array(inputs["a"]), np.array(inputs["w"])
    init = np.array(inputs["init"], dtype=np.int64)
    array = array_of(config)
    report = emulate_two_level_report(a, w, array, init=init)
    np.testing.assert_array_equal(report.acc.reshape(-1), record["acc"])
    np.testing.assert_array_equal(
        emulate_two_level(a, w, array, init=init).reshape(-1), record["acc"]
    )
    assert report.overflow_count == sum(record["overflows"])
    assert report.outputs_affected == np.count_nonzero(record["overflows"])
    assert report.column_overflow_count == sum(record["column_overflows"])
    assert report.column_tree_overflow_count == sum(record["tree_overflows"])


@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors_agree_with_the_emulator(name):
    golden = read_golden(name)
    assert len(golden["acc"]) >= 200
    assert_emulator_gives(golden, golden["config"], golden)


@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors_come_from_the_verilog_beside_them(name, two_level_rtl, icarus_module):
    expected = icarus_module.sources_digest(two_level_rtl.SOURCES)
    assert read_golden(name)["rtl_sha256"] == expected


def test_every_configuration_has_golden_vectors_and_they_overflow(two_level_rtl):
    assert sorted(two_level_rtl.CONFIGURATIONS) == NAMES
    records = {name: read_golden(name) for name in NAMES}
    assert all(sum(record["overflows"]) > 0 for record in records.values())
    quiet = [name for name, record in records.items() if not sum(record["column_overflows"])]
    assert quiet == ["gemmini"]  # 16 products of int8 fit its 20 bits
    assert sum(records["tree_column_wide_wrap"]["tree_overflows"]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_still_gives_the_golden_vectors(name, simulator, two_level_rtl):
    golden = read_golden(name)
    simulated = two_level_rtl.simulate(golden["config"], golden)
    assert simulated == {key: golden[key] for key in simulated}


@pytest.mark.parametrize("name", NAMES)
def test_fresh_vectors_agree_with_the_simulator(name, simulator, two_level_rtl):
    config = two_level_rtl.configuration(name)
    inputs = two_level_rtl.draw_inputs(config, np.random.default_rng(99))
    assert_emulator_gives(two_level_rtl.simulate(config, inputs), config, inputs)
