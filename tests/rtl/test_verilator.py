"""One testbench of each kind in a second simulator: the golden vectors, bit for bit."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "golden"


def assert_simulates(driver, path):
    golden = json.loads((GOLDEN / path).read_text())
    simulated = driver.simulate(golden["config"], golden)
    assert simulated
    assert simulated == {key: golden[key] for key in simulated}


def test_the_mac_and_srs_testbench_runs_in_verilator(in_verilator, icarus_module):
    assert_simulates(icarus_module, "saturate_acc17_c4_p2.json")


def test_the_two_level_testbench_runs_in_verilator(in_verilator, two_level_rtl):
    assert_simulates(two_level_rtl, min((GOLDEN / "two_level").glob("*.json")))


def test_the_requantize_and_multiplier_testbench_runs_in_verilator(in_verilator, requantize_rtl):
    assert_simulates(requantize_rtl, min((GOLDEN / "requantize").glob("*.json")))
