"""`steps` and `dump info --steps` on bundled and made dumps."""

import csv
import io
import json
import math

import numpy as np
import pytest

import loraq_sim as lq

DUMP = ("--layer-dump", "examples/tiny_pixart.pt")
WORDS = ("steps", "--hw", "aie2", *DUMP, "--preset", "fast", "--tokens", 50, "--split", "W4A4")
TWO = ("--layers", "*.0.attn1.to_q,*.0.ff.net.2")


@pytest.fixture
def made(tmp_path):
    rng = np.random.default_rng(2)
    layers = [
        lq.Layer(
            name=name,
            group=name,
            weight=rng.standard_normal((8, 32)).astype(np.float32),
            activations=None if name == "silent" else rng.standard_normal((9, 32)).astype("f4"),
        )
        for name in ("a", "silent", "once")
    ]
    steps = {"values": [999.5, 20], "rows": {"*": [4, 5], "once": [9, 0]}}
    return lq.write_layer_dump(tmp_path / "made.npz", layers, meta={"time_steps": steps})


@pytest.mark.parametrize("output", ["table", "json", "csv", "md"])
def test_every_format_is_printed(command, output):
    done = command(*WORDS, *TWO, "--format", output)
    assert done.exit_code == 0, done.output
    assert "transformer_blocks.0.ff.net.2" in done.stdout


def test_shares_of_all_tables_add_up(command):
    done = command(*WORDS, *TWO, "--format", "json")
    (found,) = json.loads(done.stdout)["cases"]
    assert (found["case"]["n_layers"], found["case"]["n_steps"]) == (2, 25)
    for name in ("layers", "steps", "cells"):
        for share in ("share", "run_share"):
            # 50 float64 quotients summed.
            total = math.fsum(row[share] for row in found[name])
            assert total == pytest.approx(1.0, rel=50 * 2.0**-52)
    # Every step is among the 50 rows of each layer.
    assert min(cell["rows"] for cell in found["cells"]) >= 1
    assert sum(cell["rows"] for cell in found["cells"]) == 100


def test_files_and_pictures_of_each_case_are_written_once(command, tmp_path):
    words = (*WORDS, *TWO, "--smooth", 0.5, "--calibrate-on", "all,first:2", "--out", tmp_path)
    done = command(*words, "--format", "csv")
    assert done.exit_code == 0, done.output
    printed = list(csv.DictReader(io.StringIO(done.stdout)))
    with (tmp_path / "cells.csv").open() as file:
        assert list(csv.DictReader(file)) == printed
    assert {row["calibration"] for row in printed} == {"all", "first:2"}
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {f"heat_map_{case}.{end}" for case in ("all", "first_2") for end in ("png", "svg")}
    assert names == {"cells.csv", "layers.csv", "steps.csv"} | pictures
    refused = command(*words)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert command(*words, "--force", "--quiet").exit_code == 0


def test_calibrations_stand_side_by_side(command):
    words = ("steps", "--hw", "aie2", *DUMP, "--layers", "*.0.ff.net.2", "--split", "W4A4+W8A8r4")
    done = command(
        *words, "--method", "qera", "--preset", "fast", "--calibrate-on", "first:5,last:5"
    )
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    errors = {line[0]: tuple(map(float, line[1:])) for line in lines if line and len(line) == 3
              and line[0] in ("1000", "40")}  # fmt: skip
    assert errors["1000"][0] < errors["1000"][1]
    assert errors["40"][0] > errors["40"][1]


def test_a_choice_that_changes_nothing_is_told(command):
    done = command(*WORDS, "--layers", "*.0.attn1.to_q", "--calibrate-on", "first")
    assert done.exit_code == 0
    assert "--calibrate-on changes nothing without --smooth" in done.stderr


@pytest.mark.parametrize(
    "asked", [("--split", "W4A4~W8A8r4f2"), ("--condition", "rms"), ("--finish", "data")]
)
def test_calibration_counts_where_something_is_made_of_data(command, asked):
    words = ("--layers", "*.0.attn1.to_q", "--calibrate-on", "first:3,last:3", "--format", "json")
    if "--split" not in asked:
        asked = (*asked, "--split", "W4A4+W8A8r4")
    base = ("steps", "--hw", "aie2", *DUMP, "--preset", "fast", "--tokens", "75")
    done = command(*base, *asked, *words)
    assert done.exit_code == 0, done.output
    assert "changes nothing" not in done.stderr
    first, last = (one["case"]["output_error"] for one in json.loads(done.stdout)["cases"])
    assert first != last


def test_machines_share_one_solution(command, monkeypatch):
    from loraq_sim.time_steps import errors

    solved, solve = [], errors.solve_case
    monkeypatch.setattr(errors, "solve_case", lambda *a, **k: solved.append(1) or solve(*a, **k))
    words = (*WORDS, "--layers", "*.0.attn1.to_q", "--hw", "a100", "--format", "json")
    cases = json.loads(command(*words).stdout)["cases"]
    assert [one["case"]["accelerator"] for one in cases] == ["aie2", "a100"]
    assert len(solved) == 1


def test_machines_of_one_name_keep_their_columns_and_pictures(command, tmp_path):
    own = ("--hw", "hwmodels/accelerators/aie2.yaml", "--acc-bits", 12, "--out", tmp_path)
    done = command(*WORDS, "--layers", "*.0.attn1.to_q", *own)
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.glob("*.png")} == {"heat_map_1.png", "heat_map_2.png"}
    assert "#1" in done.stdout
    assert "#2" in done.stdout


def test_layers_without_activations_are_left_out_and_failures_named(command, made):
    words = ("steps", "--hw", "aie2", "--layer-dump", made, "--split", "W4A4")
    done = command(*words)
    assert done.exit_code == 0, done.output
    assert "1 of 3 layers left out: no activations" in done.stderr
    assert "999.5" in done.stdout
    failed = command(*words, "--calibrate-on", "last", "--format", "json")
    assert failed.exit_code == 1
    assert "layer 'once' has no activation row at time steps last" in failed.stderr
    assert [row["layer"] for row in json.loads(failed.stdout)["cases"][0]["layers"]] == ["a"]
    silent = command(*words, "--layers", "silent")
    assert silent.exit_code == 2
    assert "no layer has activations" in silent.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layer-dump", "examples/minilm.pt"), "does not record which time step"),
        (("--calibrate-on", "7"), "no time step '7' is recorded"),
        (("--calibrate-on", "early"), "not understood"),
        (("--tokens", "3"), "cannot represent 25 time steps"),
        (("--method", "magic"), "unknown method 'magic'"),
        (("--aggregate", "magic"), "unknown aggregate 'magic'"),
        (("--split", "W4"), "not understood"),
        (("--hw", "aie3"), "unknown accelerator"),
        (("--acc-bits", "4"), "acc_bits"),
        (("--smooth", "3"), "alpha must be from 0 to 1"),
    ],
)
def test_bad_input_is_one_line(command, words, message):
    done = command(
        *WORDS, *TWO[:1], "*.0.attn1.to_q" if "minilm" not in str(words) else "*", *words
    )
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


@pytest.mark.parametrize("output", ["table", "json", "csv", "md"])
def test_dump_info_lists_statistics_of_each_step(command, made, output):
    done = command("dump", "info", made, "--steps", "--format", output, "--quiet")
    assert done.exit_code == 0, done.output
    assert "999.5" in done.stdout
    if output == "json":
        rows = json.loads(done.stdout)["rows"]
        assert [row["rows"] for row in rows] == [4, 5, 0, 9, 0]


def test_dump_info_refuses_steps_it_cannot_know(command, made):
    plain = command("dump", "info", "examples/minilm.pt", "--steps")
    assert plain.exit_code == 2
    assert "does not record which time step" in plain.stderr
    unread = command("dump", "info", made, "--steps", "--no-statistics")
    assert unread.exit_code == 2
    assert "leave out --no-statistics" in unread.stderr
