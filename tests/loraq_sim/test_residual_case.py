"""A split with a residual input says the same at every door."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import hwmodels
import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError
from loraq_sim.explain.terms import explain_case
from loraq_sim.machine import datapath_for
from loraq_sim.recipe import read_recipe, split_of
from loraq_sim.solvers import solve

SPLITS = ("W4A4+W8A8r12", "W4A4~W8A8r12f5", "W4A4~W8A8@fp16r6")


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """Two layers whose inputs share a few loud directions."""
    rng = np.random.default_rng(4)
    loud = rng.standard_normal((4, 96)) * 5
    x = (rng.standard_normal((80, 4)) @ loud + rng.standard_normal((80, 96))).astype(np.float32)
    layers = [
        lq.Layer(name=name, weight=rng.standard_normal((64, 96)).astype(np.float32), activations=x)
        for name in ("a", "b")
    ]
    path = tmp_path_factory.mktemp("dump") / "layers.safetensors"
    lq.write_layer_dump(path, layers)
    return path


def _run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def rows(dump, tmp_path_factory):
    out = tmp_path_factory.mktemp("store")
    done = _run(
        "sweep", "--hw", "aie2", "--layer-dump", dump, "--preset", "fast", "--rows", 80,
        *(word for split in SPLITS for word in ("--split", split)), "--out", out,
        "--format", "json", "--jobs", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["rows"], out


def test_the_row_is_the_data_path_worked_out_by_hand(dump, rows):
    """The layer's formulas in float64, around the stored codes; sums of integers are exact."""
    layer = lq.read_layer_dump(dump)["a"]
    row = next(r for r in rows[0] if r["layer"] == "a" and r["split"] == "W4A4~W8A8r12f5")
    solution = solve(
        layer.weight, main="int4/g64", branch="int8/g64", rank=12, feedback=5, preset="fast",
        activations=layer.activations,
    )  # fmt: skip

    def rounded(values, text):
        return lq.quantize(values.astype(np.float32), text).dequantize().astype(np.float64)

    x = layer.activations.astype(np.float64)
    stored = {name: part.dequantize().astype(np.float64) for name, part in solution.parts.items()}
    p_f = rounded(rounded(x, "int8/g64") @ stored["feedback"].T, "int8/g64")
    d = x - p_f @ stored["feedback"]
    p_w = rounded(rounded(d, "int8/g64") @ stored["right"].T, "int8/g64")
    y = rounded(d, "int4/g64") @ stored["main"].T + p_w @ stored["left"].T
    y = rounded(y + p_f @ stored["feedback_left"].T, "bf16")
    exact = x @ layer.weight.T.astype(np.float64)
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    # What is left out here: sums in float32, which turn a few ties of the output.
    assert row["output_error"] == pytest.approx(error, rel=1e-4)
    assert (row["rank"], row["feedback_rank"]) == (12, 5)
    assert row["weight_bytes"] == sum(len(part.pack()) for part in solution.parts.values())


def test_python_command_and_explanation_say_the_same(dump, rows):
    layer = lq.read_layer_dump(dump)["b"]
    for split in SPLITS:
        row = next(r for r in rows[0] if r["layer"] == "b" and r["split"] == split)
        again = lq.evaluate_layer(layer, split, "aie2", preset="fast", rows=80)
        for key in ("output_error", "weight_error", "weight_bytes", "feedback_rank", "latency_s"):
            assert again[key] == pytest.approx(row[key], rel=1e-12), key
        told = explain_case(layer, split, "aie2", preset="fast", rows=80)
        assert told.summary["total_error"] == pytest.approx(row["output_error"], rel=1e-12)
        assert told.summary["unexplained_error"] < 1e-12
        sources = {term["source"] for term in told.errors}
        assert ({"feedback", "feedback_weight"} <= sources) == ("~" in split)
        parts = {c["part"] for c in told.costs if c["quantity"] == "weight_bytes"}
        assert ("feedback" in parts) == ("~" in split)


def test_loud_directions_are_taken_out_at_equal_bytes(rows):
    by_split = {s: [r for r in rows[0] if r["split"] == s] for s in SPLITS}
    plain = lq.parse_split("W4A4+W8A8@fp16r6")
    for row in by_split["W4A4~W8A8@fp16r6"]:
        assert row["feedback_rank"] > 0
        assert row["weight_bytes"] <= 64 * (96 // 2 + 4) + 6 * 2 * (64 + 96)
        assert row["output_error"] < 0.6 * by_split["W4A4+W8A8r12"][0]["output_error"]
    assert plain.feedback is None


def test_the_report_and_the_front_name_the_split(rows, tmp_path):
    done = _run("report", rows[1], "--out", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert "W4A4~W8A8r12f5" in _run("pareto", rows[1]).stdout
    assert "W4A4~W8A8r12f5" in (tmp_path / "report.html").read_text()


def test_a_solved_model_keeps_it(dump, tmp_path):
    path = tmp_path / "solved.safetensors"
    done = _run(
        "solve", "--layer-dump", dump, "--split", "W4A4~W8A8r12f5", "--preset", "fast",
        "--save", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    layer, solution = lq.read_layer_dump(dump)["a"], lq.read_quantized_model(path)["a"]
    split = lq.parse_split("W4A4~W8A8r12f5")
    assert solution.feedback_rank == 5
    hw = hwmodels.load_accelerator("aie2")
    y = run_layer(layer.activations, solution, split, datapath_for(hw)).y
    row = lq.evaluate_layer(layer, split, hw, solution=solution)
    exact = layer.activations.astype(np.float64) @ layer.weight.T
    assert row["output_error"] == pytest.approx(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def test_a_recipe_sizes_it(dump, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'recipe = 1\n[layers]\n"a" = { split = "W4A4~W8A8@fp16r4", budget = "fp16@6" }\n'
    )
    settings = read_recipe(recipe).settings("a")
    assert split_of(settings).text == "W4A4~W8A8@fp16r6"


def test_layers_without_activations_are_refused_before_anything_runs(tmp_path):
    layer = lq.Layer(name="a", weight=np.ones((64, 96), np.float32))
    path = tmp_path / "w.safetensors"
    lq.write_layer_dump(path, [layer])
    done = _run("sweep", "--hw", "aie2", "--layer-dump", path, "--split", "W4A4~W8A8r8",
                "--out", tmp_path / "s")  # fmt: skip
    assert done.exit_code == 2
    assert "residual input (~) needs the layer's activations" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(lq.InputError, match="needs activations|give activations"):
        lq.evaluate_layer(layer, "W4A4~W8A8r8", "aie2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W4A4+W8A8r8f4", r"f4 is a part of a residual input; write ~"),
        ("W4A4~W8A8r8f9", r"f9 is more than the 8 components"),
        ("W4A4~W8A8r8f0", r"f must be at least 1; write \+"),
        ("W4A4~", r"not understood"),
        ("W4A4~W8A8", r"not understood"),
    ],
)
def test_splits_that_cannot_be(text, message):
    with pytest.raises(lq.InputError, match=message):
        lq.parse_split(text)


@pytest.mark.parametrize(
    "text", ["W4A4~W8A8r62f31", "W4A4~W8A8@fp16r32", "W4A8~W6A6r8", "W4A4~W8A8@fp16r32f4"]
)
def test_a_split_is_written_as_it_was_read(text):
    assert lq.parse_split(text).text == text
    assert lq.parse_split(lq.parse_split(text.lower()).text).text == text


def _words(path, bits):
    """Two's complement words of a $readmemh file."""
    words = [int(word, 16) for word in path.read_text().split()]
    return [word - (1 << bits) if word >> (bits - 1) else word for word in words]


@pytest.mark.parametrize(
    ("part", "tile"),
    [("feedback_down", (4, 64, 5)), ("feedback_back", (4, 5, 16)), ("feedback_up", (4, 5, 16))],
)
def test_vectors_of_its_products_are_integers_of_the_stored_codes(dump, tmp_path, part, tile):
    m, k, n = tile
    out = tmp_path / part
    done = _run(
        "vectors", "--hw", "aie2", "--layer-dump", dump, "--layer", "a", "--split",
        "W4A4~W8A8r12f5", "--preset", "fast", "--part", part, "--tile", f"{m}x{k}x{n}",
        "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    a, w = _words(out / "a.hex", 8), _words(out / "w.hex", 8)
    assert (len(a), len(w)) == (m * k, n * k)
    sums = [sum(a[i * k + c] * w[j * k + c] for c in range(k)) for i in range(m) for j in range(n)]
    assert _words(out / "acc.hex", 32) == sums


def test_a_layer_without_it_has_no_such_vectors(dump, tmp_path):
    done = _run(
        "vectors", "--hw", "aie2", "--layer-dump", dump, "--layer", "a", "--split", "W4A4+W8A8r8",
        "--preset", "fast", "--part", "feedback_back", "--out", tmp_path / "v",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "no residual input in this layer" in done.stderr


def test_a_machine_without_the_subtraction_says_so_before_it_solves(dump, tmp_path, monkeypatch):
    bare = hwmodels.load_accelerator("aie2").model_copy(update={"transforms": ("smooth",)})
    layer = lq.read_layer_dump(dump)["a"]

    def too_late(*_, **__):
        raise AssertionError("solved first")

    monkeypatch.setattr("loraq_sim.evaluate.solve_case", too_late)
    with pytest.raises(hwmodels.AcceleratorError, match="no residual input .*write [+] for ~"):
        lq.evaluate_layer(layer, "W4A4~W8A8r12f5", bare, preset="fast")
    with pytest.raises(hwmodels.AcceleratorError, match="no Hadamard rotation"):
        lq.evaluate_layer(layer, "W4A4+W8A8r12", bare, preset="fast", rotate="hadamard")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A machine file like that of aie2, whose kernels can smooth and nothing else."""
    text = (Path(hwmodels.__file__).parent / "accelerators" / "aie2.yaml").read_text()
    text = re.sub(r"^name: aie2$", "name: bare", text, flags=re.MULTILINE)
    text = re.sub(r"^aliases: .*$", "aliases: []", text, flags=re.MULTILINE)
    path = tmp_path_factory.mktemp("machine") / "bare.yaml"
    path.write_text(text + "\ntransforms: [smooth]\n")
    return path


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A layer with one loud input channel, which a rotation quiets most."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((160, 64)).astype(np.float32)
    x[:, 7] *= 50
    weight = rng.standard_normal((48, 64)).astype(np.float32)
    path = tmp_path_factory.mktemp("dump") / "loud.safetensors"
    lq.write_layer_dump(path, [lq.Layer(name="a", weight=weight, activations=x)])
    return path


def test_a_condition_chooses_only_what_each_machine_has(loud, bare, tmp_path):
    dump = loud
    done = _run(
        "sweep", "--hw", "aie2", "--hw", bare, "--layer-dump", dump, "--layers", "a", "--preset",
        "fast", "--split", "W4A4a+W8A8r12", "--condition", "auto", "--out", tmp_path / "s",
        "--format", "json", "--jobs", 0,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = {row["accelerator"]: row for row in json.loads(done.stdout)["rows"]}
    assert "chose hadamard:64" in rows["aie2"]["message"]
    assert "hadamard" not in rows["bare"]["message"]
    layer = lq.read_layer_dump(dump)["a"]
    for machine, row in rows.items():
        # The same by Python, and by what was chosen, named.
        how = {"condition": "auto", "preset": "fast"}
        hw = {"aie2": "aie2", "bare": str(bare)}[machine]
        again = lq.evaluate_layer(layer, "W4A4a+W8A8r12", hw, **how)
        assert (again["output_error"], again["message"]) == (row["output_error"], row["message"])
    explained = _run(
        "explain", "--hw", bare, "--layer-dump", dump, "--layer", "a", "--split", "W4A4a+W8A8r12",
        "--condition", "auto", "--preset", "fast", "--format", "json",
    )  # fmt: skip
    assert explained.exit_code == 0, explained.output
    assert "hadamard" not in explained.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "W4A4~W8A8r12"), "bare has no residual input"),
        (("--split", "W4A4", "--rotate", "hadamard"), "bare has no Hadamard rotation"),
        (("--split", "W4A4a+W8A8r12"), "who chooses the grid of inputs that is left open"),
    ],
)
def test_a_sweep_refuses_at_its_door_what_its_machine_lacks(dump, bare, tmp_path, words, message):
    common = ("sweep", "--layer-dump", dump, "--out", tmp_path / "s", *words)
    done = _run(*common, "--hw", bare)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "s").exists()


def test_a_solution_is_rounded_as_it_was_made_for(dump, tmp_path):
    layer = lq.read_layer_dump(dump)["a"]
    options = {"main": "int4/g64", "branch": "int8/g64", "rank": 8, "preset": "fast"}
    solution = solve(
        layer.weight, **options, activations=layer.activations, main_rule="auto", condition="auto"
    )
    own, other = solution.grid, "s" if solution.grid != "s" else "u"
    lq.write_quantized_model(tmp_path / "m.safetensors", {"a": solution})
    solution = lq.read_quantized_model(tmp_path / "m.safetensors")["a"]
    rows = [
        lq.evaluate_layer(layer, split, "aie2", solution=solution, condition="auto")
        for split in (f"W4A4{own}+W8A8r8", "W4A4a+W8A8r8")
    ]
    assert rows[0]["output_error"] == rows[1]["output_error"]
    message = f"rounds inputs as A4{other}, the solution was made for A4{own}; write A4a"
    with pytest.raises(InputError, match=message):
        lq.evaluate_layer(layer, f"W4A4{other}+W8A8r8", "aie2", solution=solution)
