"""``hw synth`` as a user types it: rows, nodes, messages; new synthesis only where Yosys is."""

import json

import pytest
from typer.testing import CliRunner

import hwmodels
import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.silicon import synthesize as synthesis
from loraq_sim.silicon.toggles import layer_energy


def invoke(*words):
    return CliRunner().invoke(app, ["hw", "synth", *(str(word) for word in words)])


def rows_of(*words):
    done = invoke(*words, "--format", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_rows_are_every_combination_with_the_numbers_of_hwmodels():
    words = ("--a-bits", "4,8", "--w-bits", 4, "--acc-bits", "16,23", "--products-per-add", "1,8")
    printed = rows_of(*words, "--overflow", "wrap,saturate")
    assert len(printed["rows"]) == 16
    for row in printed["rows"]:
        array = hwmodels.synthesized_array(
            type(
                "Mac", (), {key: row[key] for key in ("acc_bits", "overflow", "products_per_add")}
            ),
            a_bits=row["a_bits"],
            w_bits=row["w_bits"],
        )
        assert row["area_ge"] == array.area_ge
        assert row["source"] == array.source
        parts = ("multiplier_ge", "tree_ge", "accumulator_ge", "saturation_ge")
        assert sum(row[part] for part in parts) == pytest.approx(row["area_ge"])
        assert {"srs_ge", "zero_point_ge", "group_sum_ge", "depth", "flip_flops"} <= row.keys()


def test_a_node_adds_area_and_energy_with_sources():
    printed = rows_of("--node", 7)
    assert printed["node"]["sources"]["nand2_um2"]
    assert printed["rows"][0]["area_um2"] > 0
    assert printed["rows"][0]["energy_pj_per_mac"] > 0


def test_people_read_how_sure_the_figures_of_a_node_are():
    said = " ".join(invoke("--node", 16).output.split())
    assert "0.13 um2 (recalled)" in said
    assert "0.112 pJ (interpolated)" in said
    assert "70% full (assumed)" in said
    assert "(recalled)" not in invoke().output


def test_people_read_how_many_rows_were_synthesized():
    done = invoke("--acc-bits", "32,33")
    assert done.exit_code == 0
    assert "1 synthesized, 1 from the closed form" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--acc-bits", 7), "acc_bits must be an integer from 8 to 64, got 7"),
        (("--a-bits", 99), "a_bits must be a whole number from 2 to 16, got 99"),
        (("--a-bits", "eight"), "--a-bits must be whole numbers such as 16,20,24"),
        (("--overflow", "clip"), "overflow"),
        (
            ("--node", 6),
            "no figures for a node of 6 nm; known: 45, 28, 22, 16, 12, 7, 5, 4, 3; nearest",
        ),
        (("--rounding", "up"), "rounding 'up'"),
    ],
)
def test_bad_input_is_one_line(words, said):
    done = invoke(*words)
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_without_yosys_only_new_synthesis_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(synthesis, "yosys_command", lambda: None)
    assert invoke().exit_code == 0
    for words in (("--synthesize",), ("--fill", tmp_path / "gates.csv")):
        done = invoke(*words)
        assert done.exit_code != 0
        assert "Yosys is not installed" in done.output
        assert "Traceback" not in done.output


DUMP = ("--layer-dump", "examples/tiny_pixart.pt", "--layers", "*.0.attn1.to_q")


def energy(*words):
    return CliRunner().invoke(app, ["hw", "energy", *(str(word) for word in words)])


def test_operands_of_a_layer_are_counted_as_python_counts_them(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    done = energy(*DUMP, "--split", "W4A4,W8A8", "--cycles", 512, "--node", 28, "--format", "json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    (name,) = {row["layer"] for row in printed["rows"]}
    layer = lq.read_layer_dump("examples/tiny_pixart.pt")[name]
    mac = lq.MacArray(acc_bits=24, products_per_add=8)
    for row in printed["rows"]:
        found = layer_energy(layer, lq.parse_split(row["split"]), mac, node_nm=28, cycles=512)
        assert row["pj_per_mac"] == found.pj_per_mac
        assert row["random_pj_per_mac"] == found.random_pj_per_mac
        assert row["glitch_factor"] == found.glitch_factor > 1
        parts = ("multiplier_pj", "tree_pj", "accumulator_pj", "saturation_pj")
        assert sum(row[part] for part in parts) == pytest.approx(row["pj_per_mac"])
    first = printed["rows"][0]
    share = f"{first['pj_per_mac'] / first['random_pj_per_mac']:.2f} of the"
    assert printed["said"][0].startswith("W4A4: ")
    assert share in printed["said"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--split", "W4A4u"), "toggles need symmetric integers"),
        (("--split", "W4A4+W8A8r8"), "name W4A4 alone"),
        (("--node", 6), "no figures for a node of 6 nm"),
        (("--cycles", 3), "--cycles must be a whole number from 16"),
        (("--dataflow", "row"), "dataflow 'row'"),
        (("--acc-bits", 99), "acc_bits must be an integer from 8 to 64, got 99"),
    ],
)
def test_operands_that_cannot_be_counted_are_one_line(request, monkeypatch, words, said):
    monkeypatch.chdir(request.config.rootpath)
    done = energy(*DUMP, *words)
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1
