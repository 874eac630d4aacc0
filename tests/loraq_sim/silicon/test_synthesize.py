"""Synthesis where Yosys is installed: rows of the table come out again; what is said elsewhere."""

import json
from pathlib import Path

import pytest

from hwmodels.gates import (
    FLIP_FLOP,
    MODEL_JSON,
    Column,
    GroupSum,
    Narrowing,
    part_terms,
    read_gates,
)
from loraq_sim.errors import LoraqError
from loraq_sim.silicon import synthesize as synthesis
from loraq_sim.silicon.gate_fit import check_fit, fit_gates, published_scalable, read_scalable
from loraq_sim.silicon.netlist import read_netlist

TABLE, NOTES = read_gates()
SCALABLE_CSV = Path(MODEL_JSON).parent / "scalable_gates.csv"
# Another version maps other gates: what it may differ by.
OTHER_VERSION = 0.12
SAMPLE = [
    Column(acc_bits=16),
    Column(a_bits=4, w_bits=4, acc_bits=24),
    Column(accumulators=2, acc_bits=20),
    Column(acc_bits=16, zero_point=True),
    Column(a_bits=4, w_bits=4, a_signed=False, acc_bits=24),
    Narrowing(modes="floor"),
    GroupSum(shift_bits=4),
]


@pytest.fixture(scope="module")
def yosys():
    if synthesis.yosys_command() is None:
        pytest.skip("Yosys is not installed (pip install 'loraq-sim[synth]')")
    return synthesis.yosys_version()


def test_the_table_was_made_of_the_rtl_that_ships():
    assert any(f"RTL sha256 {synthesis.rtl_digest()}" in note for note in NOTES)


def test_units_of_the_table_stand_in_the_order_of_its_list():
    assert list(TABLE) == [unit for unit in synthesis.table_units() if unit in TABLE]


@pytest.mark.parametrize("unit", SAMPLE, ids=str)
def test_a_row_of_the_table_synthesizes_again(unit, yosys):
    again, row = synthesis.synthesize(unit).gates, TABLE[unit]
    if any(f"Yosys {yosys}," in note for note in NOTES):
        assert again == row
    else:
        assert again.transistors == pytest.approx(row.transistors, rel=OTHER_VERSION)
        assert again.flip_flops == row.flip_flops


def test_filling_takes_up_where_a_table_stops(yosys, tmp_path):
    path = tmp_path / "gates.csv"
    seen = []
    units = SAMPLE[:2]
    assert synthesis.fill_table(path, units[:1], on_unit=seen.append) == 1
    assert synthesis.fill_table(path, units, on_unit=seen.append) == 1
    assert seen == units
    assert list(read_gates(path)[0]) == units


def test_without_yosys_the_message_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(synthesis, "yosys_command", lambda: None)
    with pytest.raises(
        LoraqError, match=r"Yosys is not installed.*pip install 'loraq-sim\[synth\]'"
    ):
        synthesis.synthesize(Column())


def test_the_closed_form_predicts_units_it_has_not_seen():
    checks = check_fit(TABLE)
    assert set(checks) == {"column", "srs", "group_sum"}
    assert checks["column"].units >= 37
    for check in checks.values():
        assert check.mean_area_error < 0.05
        assert check.worst_area_error < 0.12
        assert check.mean_depth_error < 0.08
        assert check.worst_depth_error < 0.15


def test_the_errors_stated_are_those_on_units_that_the_fit_has_not_seen():
    columns = [unit for unit in TABLE if isinstance(unit, Column)]
    left_out = {unit for kind in (Column, Narrowing, GroupSum)
                for unit in [u for u in TABLE if isinstance(u, kind)][1::4]}  # fmt: skip
    known = fit_gates({unit: gates for unit, gates in TABLE.items() if unit not in left_out})
    errors = []
    for unit in columns[1::4]:
        parts = part_terms(unit).items()
        predicted = sum(known[p][name] * n for p, terms in parts for name, n in terms.items())
        gates = TABLE[unit]
        errors.append(abs((predicted + FLIP_FLOP * gates.flip_flops) / gates.transistors - 1))
    stated = json.loads(MODEL_JSON.read_text())["left_out"]["column"]
    for found in (stated, vars(check_fit(TABLE)["column"])):
        assert found["worst_area_error"] == pytest.approx(max(errors), abs=1e-4)
        assert found["mean_area_error"] == pytest.approx(sum(errors) / len(errors), abs=1e-4)


def test_the_closed_form_that_ships_is_the_fit_to_the_table():
    shipped = json.loads(MODEL_JSON.read_text())["coefficients"]
    for part, terms in fit_gates(TABLE).items():
        assert shipped[part] == pytest.approx(terms, abs=1e-3)
        assert min(terms.values()) >= 0


@pytest.mark.parametrize("offset", range(4))
def test_areas_are_predicted_whichever_columns_are_left_out(offset):
    columns = [unit for unit in TABLE if isinstance(unit, Column)]
    left_out = set(columns[offset::4])
    known = fit_gates({unit: gates for unit, gates in TABLE.items() if unit not in left_out})
    errors = []
    for unit in left_out:
        predicted = FLIP_FLOP * TABLE[unit].flip_flops + sum(
            known[part][name] * count
            for part, terms in part_terms(unit).items()
            for name, count in terms.items()
        )
        errors.append(abs(predicted / TABLE[unit].transistors - 1))
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) < 0.12


def netlist_text(cells, ports=None):
    return json.dumps({"modules": {"top": {"cells": cells, "ports": ports or {}}}})


def gate(kind, output, *inputs):
    pins = dict(zip("ABCD", ([net] for net in inputs), strict=False))
    return {"type": kind, "connections": pins | {"Y": [output]}}


def test_a_netlist_is_counted_and_leveled():
    flop = {"type": "$_DFF_P_", "connections": {"C": [1], "D": [5], "Q": [2]}}
    text = netlist_text(
        {
            "$flatten\\array.\\lane[0].multiplier.$abc$1$x": gate("$_NAND_", 4, 2, 3),
            "$flatten\\array.\\narrow_sum.$abc$2$x": gate("$_XOR_", 5, 4, 3),
            "\\array.acc": flop,
        }
    )
    netlist = read_netlist(text, "top")
    assert netlist.transistors == {
        "multiplier": 4,
        "tree": 0,
        "accumulator": 20,
        "saturation": 12,
    }
    assert netlist.depth == 2
    assert netlist.flip_flops == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (netlist_text({"x": gate("$_ANDNOT_", 4, 2, 3)}), r"cell x of top is a \$_ANDNOT_"),
        (
            netlist_text({"x": gate("$_NOT_", 4, 5), "y": gate("$_NOT_", 5, 4)}),
            "2 gates of the netlist read themselves",
        ),
        (json.dumps({"modules": {}}), "synthesis left no module top"),
    ],
)
def test_a_netlist_that_cannot_be_counted_says_why(text, said):
    with pytest.raises(LoraqError, match=said):
        read_netlist(text, "top")


def test_precision_scalable_macs_were_made_of_the_rtl_that_ships():
    files = synthesis._SCALABLE_FILES
    assert f"RTL sha256 {synthesis.rtl_digest(files)}" in SCALABLE_CSV.read_text()
    assert list(read_scalable()) == list(synthesis.SCALABLE)


@pytest.mark.parametrize("design", ["subword_4", "fused"])
def test_a_precision_scalable_mac_synthesizes_again(design, yosys):
    again = sum(synthesis.scalable_netlist(design).transistors.values())
    exact = f"Yosys {yosys}," in SCALABLE_CSV.read_text()
    known = read_scalable()[design]["transistors"]
    assert again == pytest.approx(known, rel=1e-9 if exact else OTHER_VERSION)


def test_published_precision_scalable_macs_agree_within_factors_that_the_page_states():
    rows = published_scalable()
    assert {row["source"].split(",")[0] for row in rows} == {
        "Camus et al.",
        "Ryu et al.",
        "Ibrahim et al.",
    }
    known = read_scalable()
    for row in rows:
        most = 1.35 if row["quantity"] == "area" else 2.15
        assert 1 / most < row["factor"] < most, row
        assert row["differs"]
    overhead = {row["design"]: row["model_ratio"] - 1 for row in rows[:2]}
    assert 0 < overhead["subword_4"] < overhead["subword_2"] < 0.2
    (row,) = (row for row in rows if row["design"] == "fused_16" and row["model_um2"])
    assert row["model_um2"] == pytest.approx(known["fused_16"]["transistors"] / 4 * 0.316)
    assert row["factor"] == pytest.approx(row["model_um2"] / 10603)
    (row,) = (row for row in rows if row["design"] == "subword_2" and row["quantity"] == "energy")
    # Four products of 2 bits a cycle, against one in the array whose low bits are zero.
    per_product = known["subword_2"]["units_2"] / 4 / known["fixed"]["units_2"]
    assert row["model_ratio"] == pytest.approx(per_product)
    assert all(design["units_8"] > 0 for design in known.values())
