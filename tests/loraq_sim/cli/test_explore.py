"""``explore`` as a user types it: designs within an area, their file, and what they are worth."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import hwmodels
import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.machine import cost_split
from loraq_sim.silicon.explore import StepWork, explore, model_work, paper_machine

LAYER = "transformer_blocks.0.attn1.to_q"
AREA = 0.4
ATTENTION = next(
    entry for entry in hwmodels.load_model("pixart-sigma").entries if entry.op == "attention"
)


def invoke(*words):
    return CliRunner().invoke(app, ["explore", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def explored(request, tmp_path_factory):
    """The printed object of a small search, the layer, and the file of its knee."""
    root, out = request.config.rootpath, tmp_path_factory.mktemp("explored") / "chip.yaml"
    dump = root / "examples" / "tiny_pixart.pt"
    words = ("--layer-dump", dump, "--layers", LAYER, "--split", "W4A4,W8A8", "--tokens", 8)
    words = (*words, "--products-per-add", 8)
    done = invoke("--area", f"{AREA}mm2", *words, "--out", out, "--format", "json", "--quiet")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), lq.read_layer_dump(dump)[LAYER], out


def test_no_design_of_the_front_beats_another_and_all_fit(explored):
    rows = explored[0]["rows"]
    assert len({row["split"] for row in rows}) == 2
    assert explored[0]["n_designs"] > len(rows)
    points = np.array([[r["output_error"], r["latency_s"], r["energy_j"]] for r in rows])
    for point in points:
        no_worse = (points <= point).all(axis=1) & (points < point).any(axis=1)
        assert not no_worse.any()
    for row in rows:
        parts = ("array_mm2", "columns_mm2", "vector_mm2", "sram_mm2")
        assert sum(row[part] for part in parts) == pytest.approx(row["area_mm2"])
        assert 0.9 * AREA < row["area_mm2"] <= AREA
        peak = 2 * row["rows"] * row["columns"] * row["products_per_add"] * 1e9
        assert row["peak_tops"] == pytest.approx(peak / 1e12)


def test_the_file_of_the_knee_is_that_machine_and_costs_what_was_said(explored):
    printed, layer, path = explored
    (knee,) = [row for row in printed["rows"] if row["point"] == "knee"]
    hw = hwmodels.load_accelerator(path)
    assert (hw.units.rows, hw.units.columns) == (knee["rows"], knee["columns"])
    assert sum(hwmodels.chip_area(hw).values()) == pytest.approx(knee["area_mm2"])
    split = lq.parse_split(knee["split"])
    _, cost = cost_split(layer.m, *layer.weight.shape, split, hw)
    calls = layer.calls_per_step or 1
    assert knee["latency_s"] == pytest.approx(cost.latency_s * calls)
    assert knee["energy_j"] == pytest.approx(cost.energy_j * calls)
    row = lq.evaluate_layer(layer, split, hw, tokens=8)
    assert row["output_error"] == pytest.approx(knee["output_error"])
    assert row["overflow_count"] == knee["overflow_count"]
    gates = hwmodels.synthesized_array(
        hw.datapath,
        a_bits=split.main_activation.element.bits,
        w_bits=split.main_weight.element.bits,
        node_nm=7,
    )
    assert hw.modes[0].energy_pj_per_mac == gates.energy_pj_per_mac


def test_nothing_wider_than_the_narrowest_accumulator_without_overflow_is_offered(explored):
    printed, layer, _ = explored
    for row in printed["rows"]:
        array = {"acc_bits": 48, "products_per_add": row["products_per_add"]}
        wide = lq.evaluate_layer(layer, row["split"], "aie2", datapath=array, tokens=8)
        assert row["acc_bits"] <= max(wide["safe_acc_bits"], 8)
        assert (row["overflow_count"] == 0) == (row["acc_bits"] >= wide["safe_acc_bits"])


def test_the_knee_is_told_in_a_sentence(explored):
    printed = explored[0]
    (knee,) = [row for row in printed["rows"] if row["point"] == "knee"]
    assert printed["said"].startswith(f"{AREA:g} mm2 on 7 nm, {printed['n_designs']} designs: ")
    assert f"{knee['split']} on {knee['rows']} x {knee['columns']} elements" in printed["said"]


def test_what_a_search_rests_on_is_said(explored):
    printed = explored[0]
    (knee,) = [row for row in printed["rows"] if row["point"] == "knee"]
    share = 1 - knee["gates_energy_share"]
    assert 0 < share < 1
    assert f"Assumed: {share:.1%} of the knee's energy (memories" in printed["said"]
    assert "of 7 nm: area of a gate recalled." in printed["said"]
    assert printed["errors_of"].startswith("1 layer of tiny_pixart.pt, 8 rows each at most; ")
    assert printed["work"].startswith("1 linear layer of tiny_pixart.pt in a step: no attention")


def small(layers, work, **options):
    options = {"area_mm2": 0.1, "products_per_add": (8,), "tokens": 4} | options
    return explore([lq.parse_split("W4A4")], layers, work, **options)


def test_attention_runs_in_8_bits_beside_the_main_branch_and_is_charged(request):
    dump = lq.read_layer_dump(request.config.rootpath / "examples" / "tiny_pixart.pt")
    layers, shapes = [dump[LAYER]], {(64, 64, 64): 2}
    heads = replace(ATTENTION, m=64, n=64, k=16, batch=4, calls=3)
    plain = small(layers, StepWork(shapes=shapes))
    both = small(layers, StepWork(shapes=shapes, others=(heads,)))
    wide = small(layers, StepWork(shapes=shapes, others=(heads,)), per_branch=4)
    assert [row["modes"] for row in plain.front] == ["int4"] * len(plain.front)
    assert {row["modes"] for row in (*both.front, *wide.front)} == {"int4, int8"}
    # 16 products of two codes of -128 are 2**18, the least value that 19 bits do not hold.
    assert {row["acc_bits"] for row in both.front} == {20}
    assert max(row["acc_bits"] for row in plain.front) < 19
    for found, beside in ((both, 1), (wide, 2)):
        machine = paper_machine(found.knee["design"])
        assert [mode.macs_per_cycle for mode in machine.modes] == [8, beside]
        costs = [hwmodels.product_cost(heads, machine, qk="int8", pv="int8")] * 3
        costs += [cost_split(64, 64, 64, lq.parse_split("W4A4"), machine)[1]] * 2
        for name in ("latency_s", "energy_j"):
            assert found.knee[name] == pytest.approx(sum(getattr(c, name) for c in costs))
        in_int8 = 3 * (heads.macs / 3) * machine.modes[1].energy_pj_per_mac
        in_int4 = 2 * 64**3 * machine.modes[0].energy_pj_per_mac
        share = (in_int8 + in_int4) * 1e-12 / found.knee["energy_j"]
        assert found.knee["gates_energy_share"] == pytest.approx(share)
    for wrong in ({"per_branch": 0}, {"products_per_add": (8, 0)}, {"products_per_add": (65,)}):
        with pytest.raises(lq.LoraqError, match="products_per_add must be .* from 1 to 64, got"):
            small(layers, StepWork(shapes=shapes), **wrong)


def test_a_design_that_is_fit_to_build_is_the_knee_where_there_is_one(request):
    dump = lq.read_layer_dump(request.config.rootpath / "examples" / "tiny_pixart.pt")
    work, options = StepWork(shapes={(64, 64, 64): 1}), {"area_mm2": 0.1, "tokens": 4}
    splits = [lq.parse_split(text) for text in ("W2A2", "W8A8")]
    both, poor = (
        explore(chosen, [dump[LAYER]], work, products_per_add=(8,), **options)
        for chosen in (splits, splits[:1])
    )
    assert both.knee["output_error"] < 0.25 < max(row["output_error"] for row in both.front)
    assert poor.knee["output_error"] > 0.25


@pytest.mark.parametrize("model", ["pixart-sigma", "wan2.1-1.3b"])
def test_a_step_is_all_of_a_model_but_what_is_said_to_be_left_out(model):
    inventory = hwmodels.load_model(model)
    calls = inventory.guidance_calls
    full = sum(entry.macs for entry in inventory.entries) * calls
    both, linear = model_work(model), model_work(model, attention="none")
    assert both.shapes == linear.shapes
    assert linear.others == ()
    in_shapes = sum(m * n * k * count for (m, n, k), count in linear.shapes.items())
    assert in_shapes == pytest.approx(inventory.mac_shares["linear layers"] * full)
    in_products = sum(e.macs for e in both.others if e.op.endswith("attention"))
    assert linear.told.startswith(f"{in_shapes / full:.1%} of the MACs of a step: linear layers")
    assert both.told.startswith(f"{(in_shapes + in_products) / full:.1%} of the MACs of a step")
    assert f"attention ({in_products / full:.1%})" in linear.told.partition("left out")[2]
    assert "attention" not in both.told.partition("left out")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--area", "4mm2", "--model", "pixart-sigma", "--attention", "fp4"),
            "unknown attention 'fp4'",
        ),
        (("--area", "4cm2", "--model", "pixart-sigma"), "must be a number of mm2, such as 4mm2"),
        (("--area", "0mm2", "--model", "pixart-sigma"), "the area must be above 0"),
        (("--area", "4mm2"), "explore needs --model, --layer-dump, or both"),
        (("--area", "4mm2", "--model", "pixart"), "pixart-sigma"),
        (("--area", "4mm2", "--model", "pixart-sigma", "--node", 6), "no figures for a node of 6"),
        (("--area", "4mm2", "--model", "pixart-sigma", "--clock", "0 GHz"), "--clock must be"),
        (("--area", "4mm2", "--model", "pixart-sigma", "--clock", "fast"), "100 GHz, got 'fast'"),
        (("--area", "4mm2", "--model", "pixart-sigma", "--dram", "68 m"), "--dram must be"),
        (
            ("--area", "4mm2", "--layer-dump", "examples/tiny_pixart.pt", "--layers", LAYER,
             "--split", "W8A8", "--family", "mxfp"),
            "W8A8 left out: ",
        ),
        (
            ("--area", "0.001mm2", "--layer-dump", "examples/tiny_pixart.pt", "--layers", LAYER,
             "--split", "W8A8", "--products-per-add", 1, "--tokens", 4, "--quiet"),
            "no design of 0.001 mm2 on 7 nm",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(request, monkeypatch, words, said):
    monkeypatch.chdir(request.config.rootpath)
    done = invoke(*words)
    assert done.exit_code == 2
    assert said in done.output
    assert len([line for line in done.output.strip().splitlines() if "error:" in line]) == 1


def test_published_chips_and_operations_are_compared_and_the_error_is_stated():
    done = invoke("--published", "--format", "json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert len(printed["rows"]) >= 4
    for row in printed["rows"]:
        parts = ("array_mm2", "columns_mm2", "vector_mm2", "sram_mm2")
        assert sum(row[part] for part in parts) == pytest.approx(row["model_mm2"])
        assert row["area_error"] == pytest.approx(row["model_mm2"] / row["published_mm2"] - 1)
        # Gates and bit cells are a part of a chip, and not a negligible one.
        assert -0.95 < row["area_error"] < 0
        assert -0.75 < row["energy_error"] < 3
        assert row["source"]
    assert len(printed["scalable"]) >= 5
    for row in printed["operations"]:
        # A ripple of generic gates against cells chosen for speed, Booth coding among them.
        assert 1 <= row["energy_ratio"] < 1.6
        assert row["area_ratio"] is None or 1 < row["area_ratio"] < 1.8


def new(*words):
    return CliRunner().invoke(app, ["hw", "new", *(str(word) for word in words)])


def test_a_new_file_is_the_machine_that_was_asked_for(tmp_path):
    path = tmp_path / "paper.yaml"
    words = ("--rows", 32, "--columns", 48, "--split", "W4A4+W8A8r8", "--acc-bits", 20)
    done = new(path, *words, "--products-per-add", 8, "--sram", "512KiB", "--format", "json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    hw = hwmodels.load_accelerator(path)
    assert (hw.units.rows, hw.units.columns, hw.memories.l2.capacity_bytes) == (32, 48, 524288)
    assert [(mode.name, mode.macs_per_cycle) for mode in hw.modes] == [("int4", 8), ("int8", 1)]
    area = hwmodels.chip_area(hw)
    assert row["area_mm2"] == pytest.approx(sum(area.values()))
    node = hwmodels.load_node(7)
    # 1536 elements of 8 multipliers for int4 and 1 for int8, of a column of 8 products each.
    gates = sum(
        macs * hwmodels.synthesized_array(hw.datapath, a_bits=bits, w_bits=bits).area_ge
        for bits, macs in ((4, 8), (8, 1))
    )
    assert area["array"] == pytest.approx(node.logic_mm2(32 * 48 * gates))
    assert new(path, *words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--split", "W16A16"), "W16A16 multiplies 16-bit floats"),
        (("--split", "W4A4+W16A16r8"), "W16A16 multiplies 16-bit floats"),
        (
            ("--split", "W8A8", "--acc-bits", 99),
            "acc_bits: input should be less than or equal to 64",
        ),
        (("--split", "W8A8", "--node", 6), "no figures for a node of 6 nm"),
        (("--split", "W8A8", "--rows", 0), "rows: input should be greater than or equal to 1"),
        (("--split", "W8A8", "--clock", "0Hz"), "clock: input should be greater than 0"),
        (("--split", "W8A8", "--l1", "1KiB"), "--l1 and --split exclude each other"),
        (("--split", "W8A8", "--overflow", "clip"), "overflow: got"),
    ],
)
def test_a_machine_that_cannot_be_is_one_line_and_no_file(tmp_path, words, said):
    done = new(tmp_path / "paper.yaml", *words)
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "paper.yaml").exists()
