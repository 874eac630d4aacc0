"""`explain_case`: the same numbers as the sweep's row, costs in parts, layers without input."""

import dataclasses

import numpy as np
import pytest

import hwmodels
import loraq_sim as lq


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(2)
    return lq.Layer(
        name="a",
        weight=rng.standard_normal((64, 128)).astype(np.float32),
        activations=rng.standard_normal((40, 128)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def explained(layer):
    return lq.explain_case(layer, "W4A4+W8A8r8", "aie2", method="lqer", preset="fast")


def test_the_error_taken_apart_is_that_of_the_result_row(layer, explained):
    row = lq.evaluate_layer(layer, "W4A4+W8A8r8", "aie2", method="lqer", preset="fast")
    assert explained.row["output_error"] == row["output_error"]
    # Float64 norms of the same output, summed in another order.
    assert explained.summary["total_error"] == pytest.approx(row["output_error"], rel=1e-9)
    assert explained.summary["measure"] == "output_error"
    assert explained.summary["overflows"] == row["overflow_count"] == 0
    assert explained.notes == ()


def test_every_cycle_byte_and_picojoule_is_in_some_part(explained):
    totals = {}
    for part in explained.costs:
        totals[part["quantity"]] = totals.get(part["quantity"], 0.0) + part["value"]
    row = explained.row
    assert totals["cycles"] == pytest.approx(row["cycles"], rel=1e-12)
    assert totals["energy_j"] == pytest.approx(row["energy_j"], rel=1e-12)
    assert totals["dram_bytes"] == row["dram_bytes"]
    assert totals["weight_bytes"] == row["weight_bytes"]
    by_quantity = {name: 0.0 for name in totals}
    for part in explained.costs:
        by_quantity[part["quantity"]] += part["share"]
    assert all(share == pytest.approx(1.0, rel=1e-12) for share in by_quantity.values())


def test_rotation_and_smoothing_are_parts_of_the_cost(layer):
    explained = lq.explain_case(
        layer, "W4A4", "aie2", preset="fast", rotate="hadamard:64", smooth=0.5
    )
    parts = {(part["quantity"], part["part"]): part["value"] for part in explained.costs}
    # 40 x 128 elements: a multiplication and log2(64) additions each, 256 a cycle, 1.7 pJ.
    assert parts["cycles", "smooth"] == pytest.approx(40 * 128 / 256)
    assert parts["cycles", "rotate"] == pytest.approx(40 * 128 * 6 / 256)
    assert parts["energy_j", "rotate"] == pytest.approx(40 * 128 * 6 * 1.7e-12)
    assert parts["weight_bytes", "smooth"] == parts["dram_bytes", "smooth"] == 2 * 128
    stored = sum(value for (quantity, _), value in parts.items() if quantity == "weight_bytes")
    assert stored == explained.row["weight_bytes"]


def test_without_activations_only_the_weight_is_explained(layer):
    silent = dataclasses.replace(layer, activations=None)
    case = lq.explain_case(silent, "W4A4+W8A8r8", "aie2", method="lqer", preset="fast")
    assert [row["source"] for row in case.errors] == ["main_weight", "branch_weight", "interaction"]
    assert case.summary["measure"] == "weight_error"
    assert case.summary["total_error"] == pytest.approx(case.row["weight_error"], rel=1e-4)
    assert "no activations" in case.notes[0]
    assert case.costs == []
    assert "rows per call not known" in case.notes[1]
    told = lq.explain_case(silent, "W4A4+W8A8r8", "aie2", method="lqer", preset="fast", rows=40)
    assert told.row["m"] == 40
    assert told.costs


def test_tokens_data_path_and_a_given_solution_are_used(layer, explained):
    solution = lq.solve(layer.weight, "rtn", main="int4/g64", branch=None)
    wide = {"acc_bits": 32}
    narrow = {"acc_bits": 8, "overflow": "saturate"}
    machine = hwmodels.load_accelerator("aie2")
    cases = [
        lq.explain_case(layer, "W4A8", machine, solution=solution, tokens=8, datapath=path)
        for path in (wide, narrow)
    ]
    shares = [{row["source"]: row["share"] for row in case.errors}["accumulator"] for case in cases]
    assert shares[0] == 0.0
    assert shares[1] > 0.5
    assert cases[1].row["tokens"] == 8
    with pytest.raises(lq.InputError, match="tokens must be"):
        lq.explain_case(layer, "W4A4", "aie2", tokens=0)
