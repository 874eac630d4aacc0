"""``loraq-sim vectors`` on bundled dumps: what it writes runs in a simulator, and says so."""

import json
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.emulator.vector_files import VECTOR_FILES
from loraq_sim.evaluate import solve_case
from loraq_sim.settings import CaseSettings

LAYER = "transformer_blocks.0.attn1.to_q"
BRANCH = ("--split", "W4A4+W8A8r8", "--preset", "fast", "--tokens", 16)


@pytest.fixture
def run(request, monkeypatch):
    """Run ``loraq-sim vectors`` on a layer of the bundled dump, from the project's root."""
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("COLUMNS", "200")
    place = ("--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt", "--layer", LAYER)

    def invoke(*words):
        return CliRunner().invoke(app, [str(word) for word in ("vectors", *place, *words)])

    return invoke


def simulator(key):
    """A function that builds and runs the testbench of a folder as its manifest says."""

    def build_and_run(folder):
        build, start = json.loads((folder / "manifest.json").read_text())[key]
        subprocess.run(build.split(), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return start_built(folder, start)

    return build_and_run


def start_built(folder, start):
    return subprocess.run(
        start.split(), cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def simulate():
    if shutil.which("iverilog") is None:
        pytest.skip("iverilog is not installed (Debian: apt-get install iverilog)")
    return simulator("simulate")


@pytest.fixture
def simulate_verilator(verilator_library):
    build_and_run = simulator("simulate_verilator")

    def with_library(folder):
        shutil.copytree(verilator_library, folder / "obj_dir")
        return build_and_run(folder)

    return with_library


CASES = {
    "main": ("--part", "main"),
    "down": ("--part", "down"),
    "up": ("--part", "up"),
    "ragged_tile": ("--tile", "3x77x5", "--products-per-add", 6, "--accumulators", 3),
    "saturating": ("--acc-bits", 8, "--overflow", "saturate", "--products-per-add", 1),
    "symmetric_floor": (
        *("--acc-bits", 9, "--overflow", "saturate_symmetric", "--products-per-add", 2),
        *("--rounding", "floor", "--saturation", "none", "--shift", 2, "--out-bits", 5),
    ),
    "wide": ("--acc-bits", 64, "--out-bits", 32, "--shift", -3, "--accumulators", 2),
}


GRIDS = {
    "zero points": ("--split", "W4A4u+W8A8u@fp16r4"),
    "zero points of both": ("--split", "W4uA8u+W8A8r4", "--part", "main"),
    "of P": ("--split", "W4A4u+W8A8u@fp16r4", "--part", "up"),
    "overflow at once": (
        *("--split", "W8A8u120", "--acc-bits", 12, "--overflow", "saturate", "--shift", 0),
        *("--products-per-add", 4),
    ),
    "wrapping, corrected after": (
        *("--split", "W8A8u", "--acc-bits", 14, "--zero-point", "after", "--accumulators", 3),
    ),
    "16 bits": ("--split", "W8A16i", "--acc-bits", 64, "--out-bits", 16),
    "signed scales": ("--split", "W4A4s"),
}


def build_grid(run, simulate, folder, case, *more):
    assert run(*GRIDS[case], *more, "--out", folder).exit_code == 0
    result = simulate(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    words = manifest["counts"]["accumulators"]
    assert f"PASS: {words} accumulators and {words} outputs agree" in result.stdout
    assert result.returncode == 0
    return manifest


@pytest.mark.parametrize("case", GRIDS)
def test_every_grid_of_activations_simulates_and_agrees(run, simulate, tmp_path, case):
    manifest = build_grid(run, simulate, tmp_path, case)
    signed = {name: manifest["files"][name].get("signed") for name in ("a.hex", "w.hex")}
    assert signed["a.hex"] is ("u" not in GRIDS[case][1].partition("A")[2][:4])
    assert signed["w.hex"] is ("W4u" not in GRIDS[case][1])
    assert manifest["zero_point"] == ("after" if "after" in case else "initial")
    if case == "overflow at once":
        assert manifest["counts"]["overflows"] > 0


@pytest.mark.parametrize("case", ["zero points of both", "wrapping, corrected after"])
def test_unsigned_operands_and_zero_points_agree_in_verilator(
    run, simulate_verilator, tmp_path, case
):
    build_grid(run, simulate_verilator, tmp_path, case, "--tile", "3x64x2")


@pytest.mark.parametrize("case", CASES)
def test_what_was_written_simulates_and_agrees(run, simulate, tmp_path, case):
    done = run(*BRANCH, *CASES[case], "--out", tmp_path)
    assert done.exit_code == 0, done.output
    result = simulate(tmp_path)
    words = json.loads((tmp_path / "manifest.json").read_text())["counts"]["accumulators"]
    assert f"PASS: {words} accumulators and {words} outputs agree" in result.stdout
    assert result.returncode == 0
    assert words >= 30


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("acc.hex", "FAIL: 1 of 84 accumulators and 0 of 84 outputs differ"),
        ("out.hex", "FAIL: 0 of 84 accumulators and 1 of 84 outputs differ"),
    ],
)
def test_one_flipped_bit_fails(run, simulate, tmp_path, name, report):
    assert run(*BRANCH, "--tile", "6x100x7", "--out", tmp_path).exit_code == 0
    lines = (tmp_path / name).read_text().splitlines()
    lines[50] = f"{int(lines[50], 16) ^ 1:0{len(lines[50])}x}"
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    result = simulate(tmp_path)
    assert report in result.stdout
    assert "pass 1 row 1 column 1" in result.stdout
    assert result.returncode != 0


def test_a_device_that_never_finishes_and_a_cut_file_fail(run, simulate, tmp_path):
    assert run(*BRANCH, "--tile", "2x32x2", "--out", tmp_path).exit_code == 0
    lines = (tmp_path / "acc.hex").read_text().splitlines()
    (tmp_path / "acc.hex").write_text("\n".join(lines[:-1]) + "\n")
    assert "FAIL: 1 of 4 accumulators" in simulate(tmp_path).stdout
    device = (tmp_path / "dut.sv").read_text()
    (tmp_path / "dut.sv").write_text(device.replace("done <= (P == 1);", "done <= 0;"))
    result = simulate(tmp_path)
    assert "no done within 1000 cycles" in result.stdout
    # Whatever the ports show, what was never done is wrong.
    assert "FAIL: 4 of 4 accumulators and 4 of 4 outputs differ" in result.stdout
    assert result.returncode != 0


@pytest.mark.parametrize(
    ("case", "tile"), [("main", "3x64x2"), ("up", "3x8x2"), ("symmetric_floor", "3x64x2")]
)
def test_what_was_written_agrees_in_verilator_and_a_wrong_word_fails(
    run, simulate_verilator, tmp_path, case, tile
):
    assert run(*BRANCH, "--tile", tile, *CASES[case], "--out", tmp_path).exit_code == 0
    result = simulate_verilator(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    words = manifest["counts"]["accumulators"]
    assert f"PASS: {words} accumulators and {words} outputs agree" in result.stdout
    assert "FAIL" not in result.stdout + result.stderr
    assert result.returncode == 0
    # The words are read when the simulation starts: a build serves all of them.
    lines = (tmp_path / "out.hex").read_text().splitlines()
    lines[1] = f"{int(lines[1], 16) ^ 1:0{len(lines[1])}x}"
    (tmp_path / "out.hex").write_text("\n".join(lines) + "\n")
    result = start_built(tmp_path, manifest["simulate_verilator"][1])
    assert f"FAIL: 0 of {words} accumulators and 1 of {words} outputs differ" in result.stdout
    assert "pass 0 row 0 column 1" in result.stdout
    assert "PASS" not in result.stdout
    assert result.returncode != 0


def test_overflows_of_a_narrow_accumulator_are_counted(run, tmp_path):
    done = run(*BRANCH, "--acc-bits", 8, "--overflow", "saturate", "--out", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"]["overflows"] > 0
    assert manifest["counts"]["safe_acc_bits"] > 8
    assert f"{manifest['counts']['overflows']} accumulator overflows" in done.stderr
    assert manifest["source"]["layer"] == LAYER
    assert manifest["source"]["datapath_overrides"] == {"acc_bits": 8, "overflow": "saturate"}


@pytest.mark.parametrize("output", ["table", "json", "csv", "md"])
def test_files_are_listed_in_every_format(run, tmp_path, output):
    done = run(*BRANCH, "--quiet", "--format", output, "--out", tmp_path)
    assert done.exit_code == 0
    assert done.stderr == ""
    for name in VECTOR_FILES[:-1]:
        assert name in done.stdout
    if output == "json":
        rows = json.loads(done.stdout)["rows"]
        assert {row["file"]: row["words"] for row in rows}["acc.hex"] == 2 * 16 * 16


def test_the_same_command_writes_the_same_bytes(run, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        assert run(*BRANCH, "--out", folder).exit_code == 0
    for name in VECTOR_FILES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_vectors_are_not_replaced_unasked(run, tmp_path):
    assert run(*BRANCH, "--out", tmp_path).exit_code == 0
    before = (tmp_path / "acc.hex").read_bytes()
    refused = run(*BRANCH, "--part", "down", "--out", tmp_path)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "acc.hex").read_bytes() == before
    assert run(*BRANCH, "--part", "down", "--out", tmp_path, "--force").exit_code == 0
    assert (tmp_path / "acc.hex").read_bytes() != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tile", "16x16"), "--tile must be MxKxN"),
        (("--tile", "16x0x4"), "--tile must be MxKxN"),
        (("--tile", "17x16x4"), "tile M must be an integer from 1 to 16, got 17"),
        (("--layer", "transformer_blocks.0.attn1.to_x"), "did you mean"),
        (("--hw", "aie9"), "aie"),
        (("--split", "W4A4", "--part", "down"), "has no low-rank branch"),
        (("--split", "W4A4+W16A16r8", "--part", "down"), "stored as fp16"),
        (("--p-format", "fp16", "--part", "up"), "stored as fp16"),
        (("--shift", "70"), "shift must be an integer from -4 to 59, got 70"),
        (("--rounding", "conv_evn"), "did you mean 'conv_even'"),
        (("--saturation", "clamp"), "unknown saturation 'clamp'"),
        (("--out-bits", "64"), "out_bits must be an integer from 2 to 32, got 64"),
        (("--acc-bits", "7"), "acc_bits must be an integer from 8 to 64, got 7"),
        (("--layer-dump", "none.pt"), "none.pt"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, words, message):
    done = run(*BRANCH, "--out", tmp_path / "v", *words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("part", ["main", "down", "up"])
@pytest.mark.parametrize("p_format", ["branch", "int8", "int4"])
@pytest.mark.parametrize("family", ["int", "mxint"])
def test_every_part_is_written_for_every_integer_format_of_p(run, tmp_path, part, p_format, family):
    words = (*BRANCH, "--family", family, "--part", part, "--p-format", p_format)
    done = run(*words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    codes = (tmp_path / "out" / "a.hex").read_text().split()
    digits = {"main": 1, "down": 2, "up": 1 if p_format == "int4" else 2}[part]
    limit = 16**digits // 2
    values = [int(code, 16) for code in codes]
    signed = [
        v - 16 ** len(c) if v >= 16 ** len(c) // 2 else v
        for c, v in zip(codes, values, strict=True)
    ]
    assert -limit <= min(signed) < 0 < max(signed) < limit


def test_array_presets_come_with_their_requantizer_or_a_reason(run, tmp_path):
    base = ("--split", "W8A8", "--tile", "m=4,n=4,k=32", "--tokens", 8, "--out", tmp_path)
    done = run(*base, "--array", "litert_reference")
    assert done.exit_code == 0, done.output
    assert "testbench: none: outputs are requantized by double" in done.output
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["source"]["array"] == "litert_reference"
    for options, message in (
        (("--array", "gemmini"), "--array gemmini: acc32 wrap over columns of 16"),
        (("--array", "fbgemm", "--shift", "3"), "--shift 3: array fbgemm requantizes by float"),
        (("--array", "onnxrt"), "unknown array preset 'onnxrt'; did you mean 'onnxruntime'"),
    ):
        done = run(*base, *options)
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("asked", "split"),
    [
        ({"smooth": 0.5, "rotate": "hadamard:16"}, "W4A4+W8A8r8"),
        ({"condition": "auto"}, "W4A4+W8A8r8"),
        ({"condition": "rms", "finish": "data"}, "W4A4u~W8A8r8f4"),
    ],
)
def test_operands_are_those_of_the_conditioned_layer(run, tmp_path, asked, split):
    dump = lq.read_layer_dump("examples/tiny_pixart.pt")
    layer = dump[LAYER]
    row = lq.evaluate_layer(layer, split, "aie2", preset="fast", **asked)
    options = [word for key, value in asked.items() for word in (f"--{key}", value)]
    words = ("--split", split, "--preset", "fast", *options, "--tile", "m=8,n=8,k=128")
    done = run(*words, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    source = json.loads((tmp_path / "manifest.json").read_text())["source"]
    for key in ("rotation", "smooth", "condition", "finish", "rank", "feedback_rank"):
        assert source[key] == row[key], key
    solution = solve_case(layer, CaseSettings.of(split, preset="fast", **asked))
    weights = (tmp_path / "w.hex").read_text().split()
    stored = solution.main.codes[:8, :128]
    assert [int(word, 16) for word in weights] == [int(code) & 0xF for code in stored.ravel()]
    assert source["is_smoothed"] == (solution.smooth is not None)
    assert source["hadamard_block"] == solution.rotation
