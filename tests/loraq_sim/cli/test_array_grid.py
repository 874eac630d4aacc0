"""``sweep --array-grid``: every point is emulated, priced, labelled and judged as its own array."""

import csv
import json

import pytest

import hwmodels
import loraq_sim as lq
from loraq_sim.results.store import ResultStore
from loraq_sim.settings import parse_array_grid

LAYER = "transformer_blocks.0.attn1.to_q"
DUMP = "examples/tiny_pixart.pt"


@pytest.fixture(scope="module")
def swept(request, tmp_path_factory):
    """A grid of 12 arrays on one layer in one split: the printed object, and the text."""
    from typer.testing import CliRunner

    from loraq_sim.cli.app import app

    folder = tmp_path_factory.mktemp("grid")
    words = (
        *("sweep", "--hw", "aie2", "--layer-dump", str(request.config.rootpath / DUMP)),
        *("--layers", LAYER, "--split", "W8A8", "--tokens", "8", "--jobs", "0", "--quiet"),
        *("--array-grid", "acc_bits=14..17:3,32,products_per_add=1,8,overflow=wrap,saturate"),
        *("--out", str(folder)),
    )
    printed = CliRunner().invoke(app, [*words, "--format", "json"], env={"COLUMNS": "200"})
    text = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert (printed.exit_code, text.exit_code) == (0, 0), printed.output + text.output
    return json.loads(printed.stdout), text.stdout, folder


def mac_of(row):
    names = ("acc_bits", "overflow", "products_per_add", "accumulators")
    return lq.MacArray(**{name: row[name] for name in names})


def test_every_point_of_the_grid_is_a_row_with_its_own_emulation_and_gates(swept, request):
    rows = swept[0]["rows"]
    arrays = [(row["acc_bits"], row["products_per_add"], row["overflow"]) for row in rows]
    assert len(rows) == len(set(arrays)) == 12
    assert {bits for bits, _, _ in arrays} == {14, 17, 32}
    layer = lq.read_layer_dump(request.config.rootpath / DUMP)[LAYER]
    hw = hwmodels.load_accelerator("aie2")
    node = hwmodels.load_node(hw.energy.node_nm)
    for place, row in enumerate(rows):
        mac = mac_of(row)
        path = {name: row[name] for name in ("acc_bits", "overflow", "products_per_add")}
        own = lq.evaluate_layer(layer, "W8A8", hw, datapath=path, tokens=8) if place % 3 else row
        for name in ("output_error", "overflow_count", "energy_j", "area_mm2", "array_energy_j"):
            assert row[name] == own[name], name
        gates = hwmodels.synthesized_array(mac, a_bits=8, w_bits=8, node_nm=hw.energy.node_nm)
        assert row["area_ge"] == gates.area_ge
        # 256 MACs a cycle in each of 16 units, at 70 % filled rows.
        assert row["area_mm2"] == pytest.approx(
            gates.area_ge * node.nand2_um2 / node.placed * 16 * 256 * 1e-6
        )
        macs = row["m"] * row["n"] * row["k"]
        assert row["array_energy_j"] == pytest.approx(macs * gates.energy_pj_per_mac * 1e-12)
        assert (row["latency_s"], row["cycles"]) == (rows[0]["latency_s"], rows[0]["cycles"])


def test_energies_of_a_grid_differ_by_the_same_gates(swept):
    rows = swept[0]["rows"]
    first = rows[0]
    assert len({row["energy_j"] for row in rows}) > 8
    for row in rows:
        gates = row["array_energy_j"] - first["array_energy_j"]
        # Sums of parts of 1e-6 J in another order.
        assert row["energy_j"] - first["energy_j"] == pytest.approx(gates, abs=1e-18)


def test_the_verdict_takes_the_smallest_array_without_overflow_and_says_what_width_buys(swept):
    printed, text, folder = swept
    verdict = printed["verdict"]
    free = [row for row in printed["model"] if row["overflow_count"] == 0]
    least = min(free, key=lambda row: row["area_ge"])
    label = f"W8A8 (acc {least['acc_bits']}, {least['overflow']}, products "
    assert verdict["label"] == label + f"{least['products_per_add']})"
    (said,) = [note for note in verdict["notes"] if note.startswith("Arrays of W8A8")]
    widest = next(
        row
        for row in free
        if (row["acc_bits"], row["products_per_add"], row["overflow"]) == (32, 1, "wrap")
    )
    one = min((row for row in free if row["products_per_add"] == 1), key=lambda row: row["area_ge"])
    saved = 100 * (1 - one["area_ge"] / widest["area_ge"])
    assert f"{one['acc_bits']} bits (wrap) takes {saved:.0f} % less area than 32" in said
    assert "with one product an add, no add overflows on these layers" in said
    assert f"with eight products an add {least['acc_bits']} bits (wrap) for 32 buys nothing" in said
    assert said in text
    assert "Pareto front of output error, latency and GE per MAC" in text
    with ResultStore.open(folder / "results.sqlite") as store:
        assert {row["area_ge"] for row in store.rows()} == {
            row["area_ge"] for row in printed["rows"]
        }


def test_the_front_of_a_grid_is_one_of_error_latency_and_area(swept):
    model = swept[0]["model"]
    on_front = [row for row in model if row["pareto"]]
    assert on_front == swept[0]["front"]
    for row in model:
        beaten = any(
            other["output_error"] <= row["output_error"]
            and other["area_ge"] <= row["area_ge"]
            and (other["output_error"], other["area_ge"]) != (row["output_error"], row["area_ge"])
            for other in model
        )
        assert row["pareto"] is not beaten


def test_pareto_of_a_grid_is_the_front_and_the_verdict_of_its_sweep(swept, command):
    printed, _, folder = swept
    done = command("pareto", folder, "--format", "json")
    found = json.loads(done.stdout)
    arrays = ("acc_bits", "overflow", "products_per_add")
    assert {tuple(row[name] for name in arrays) for row in found["rows"]} == {
        tuple(row[name] for name in arrays) for row in printed["front"]
    }
    assert found["verdict"]["text"] == printed["verdict"]["text"]
    assert "products" in command("pareto", folder).stdout


def test_a_range_in_a_plan_or_in_set_is_all_its_values(command, tmp_path):
    done = command(
        *("sweep", "--hw", "aie2", "--layer-dump", DUMP, "--layers", LAYER, "--split", "W8A8"),
        *("--set", "datapath.acc_bits=20..22", "--out", tmp_path / "x", "--dry-run"),
        *("--format", "json"),
    )
    assert json.loads(done.stdout)["cases"] == 3, done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--array-grid", "acc_bits=5"), "acc_bits must be an integer from 8 to 64, got 5"),
        (("--array-grid", "acc_bits=32..14"), "a range goes up"),
        (("--array-grid", "acc_bits=1.5..3"), "no range of whole numbers such as 14..32"),
        (("--array-grid", "overflow=clip"), "overflow"),
        (("--array-grid", "width=3"), "array setting 'width'"),
        (("--array-grid", "acc_bits"), "must look like acc_bits=14..32,overflow=wrap"),
        (("--array-grid", "acc_bits=8,acc_bits=9"), "acc_bits stands there twice"),
        (("--array-grid", "acc_bits=16,20", "--acc-bits", "20"), "in --acc-bits; leave one out"),
        (
            ("--array-grid", "acc_bits=16,20", "--family", "mxfp"),
            "a grid of arrays needs integer products, and aie2 has no integer mode for W8A8",
        ),
    ],
)
def test_bad_grids_are_one_line(command, tmp_path, words, said):
    done = command(
        *("sweep", "--hw", "aie2", "--layer-dump", DUMP, "--layers", LAYER, "--split", "W8A8"),
        *("--tokens", 8, "--out", tmp_path / "bad", *words),
    )
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_splits_that_run_in_floats_are_named(command, tmp_path):
    done = command(
        *("sweep", "--hw", "aie2", "--layer-dump", DUMP, "--layers", LAYER, "--dry-run"),
        *("--split", "W8A8,W4A16", "--array-grid", "acc_bits=20,32", "--out", tmp_path / "x"),
    )
    assert done.exit_code == 0
    assert "W4A16 on aie2 runs in a float mode" in " ".join(done.stderr.split())


def test_grids_are_read_as_lists_and_ranges():
    assert parse_array_grid("acc_bits=14..16, 32 ,tree_bits=12,overflow=wrap,saturate,wrap") == {
        "acc_bits": (14, 15, 16, 32),
        "tree_bits": (12,),
        "overflow": ("wrap", "saturate"),
    }


def test_the_report_shows_area_by_part_and_where_the_error_climbs(swept, command, tmp_path):
    printed, _, folder = swept
    page = tmp_path / "page.html"
    done = command("report", folder, "--out", page)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "What a width costs in gates, and in error" in text
    assert 'id="arrays-plot"' in text
    files = tmp_path / "page_files"
    assert (files / "arrays_aie2.png").exists()
    with (files / "arrays_aie2.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(printed["rows"])
    for row in rows:
        parts = ("multiplier", "tree", "accumulator", "saturation")
        assert sum(float(row[part]) for part in parts) == pytest.approx(float(row["area_ge"]))
    answer = [row for row in rows if row["pareto"] == "True"]
    least = min(row["area_ge"] for row in printed["rows"] if row["overflow_count"] == 0)
    assert [float(row["area_ge"]) for row in answer] == [least]


def allocated(command, folder, *words):
    done = command("allocate", folder, *words, "--format", "json")
    assert done.exit_code == 0, done.output
    return done, json.loads(done.stdout)["allocations"]


def test_a_budget_of_area_takes_one_array_for_all_layers(swept, command):
    rows = swept[0]["rows"]
    sizes = sorted({row["area_mm2"] for row in rows})
    for budget in (sizes[0], sizes[len(sizes) // 2], 1.0):
        done, (one,) = allocated(command, swept[2], "--budget", f"area_mm2={budget}mm2")
        within = [row for row in rows if row["area_mm2"] <= budget]
        least = min((row["output_error"], row["area_mm2"]) for row in within)
        assert one["value"] == pytest.approx(least[0])
        assert one["totals"]["area_mm2"] == least[1]
        assert one["machine"]["acc_bits"] == one["layers"][0]["acc_bits"]
        assert f"acc_bits {one['machine']['acc_bits']}" in done.stderr


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("area_mm2=0.001", "no array is within area_mm2=0.001 (the smallest that runs every layer"),
        ("area_mm2=1nm", "area_mm2=1nm: want a number, with mm2, um2 if any unit"),
        ("area_ge=1e6,weight_bytes=1B", "weight_bytes=1 cannot be met"),
    ],
)
def test_budgets_that_no_array_meets_are_one_line(swept, command, budget, said):
    done = command("allocate", swept[2], "--budget", budget)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("array", [{"acc_bits": 20}, {"acc_bits": 24, "products_per_add": 1}])
def test_an_array_costs_the_same_whoever_brings_it(array, request):
    """A case with its own array, and a machine whose file was changed to have it."""
    layer = lq.read_layer_dump(request.config.rootpath / DUMP)[LAYER]
    hw = hwmodels.load_accelerator("aie2")
    changed = hwmodels.with_overrides(hw, {f"datapath.{key}": v for key, v in array.items()})
    by_case = lq.evaluate_layer(layer, "W8A8", hw, tokens=2, datapath=array)
    by_file = lq.evaluate_layer(layer, "W8A8", changed, tokens=2)
    own = lq.evaluate_layer(layer, "W8A8", hw, tokens=2)
    for column in ("energy_j", "area_ge", "area_mm2", "array_energy_j", "output_error"):
        assert by_case[column] == pytest.approx(by_file[column], rel=1e-12), column
    gained = own["array_energy_j"] - by_case["array_energy_j"]
    assert own["energy_j"] - by_case["energy_j"] == pytest.approx(gained, rel=1e-6)
