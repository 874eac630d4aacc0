"""Whoever reads the output may leave: the work is done all the same, and the exit code says so."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps import write_layer_dump
from loraq_sim.layers import Layer
from loraq_sim.results.store import ResultStore


@pytest.fixture
def dump(tmp_path):
    rng = np.random.default_rng(0)
    layers = [
        Layer(
            name=name,
            weight=rng.normal(size=(n, 32)).astype(np.float32),
            activations=rng.normal(size=(8, 32)).astype(np.float32),
        )
        for name, n in (("wide", 32), ("slim", 2))
    ]
    write_layer_dump(tmp_path / "layers.npz", layers)
    return tmp_path / "layers.npz"


def run(*words, lost=("stdout", "stderr")):
    """Exit code of a command whose reader of `lost` has left before it starts."""
    read, write = os.pipe()
    os.close(read)
    streams = {name: write if name in lost else subprocess.PIPE for name in ("stdout", "stderr")}
    command = [sys.executable, "-m", "loraq_sim", *map(str, words)]
    done = subprocess.run(command, **streams, text=True, timeout=300, check=False)
    os.close(write)
    return done


def sweep(dump, out, *words):
    base = ("sweep", "--hw", "aie2", "--layer-dump", dump, "--preset", "fast", "--out", out)
    return (*base, *words)


def statuses(out):
    with ResultStore.open(out / "results.sqlite") as store:
        return [row["status"] for row in store.rows()]


@pytest.mark.parametrize(
    ("lost", "jobs"), [(("stderr",), 1), (("stdout",), 0), (("stdout", "stderr"), 0)]
)
def test_a_sweep_is_done_to_its_end(dump, tmp_path, lost, jobs):
    words = sweep(dump, tmp_path / "out", "--split", "W4A4,W8A8", "--jobs", jobs)
    assert run(*words, lost=lost).returncode == 0
    assert statuses(tmp_path / "out") == ["ok"] * 4
    assert (tmp_path / "out" / "pareto.png").exists()


def test_failed_cases_still_make_the_exit_code(dump, tmp_path):
    words = sweep(dump, tmp_path / "out", "--split", "W4A4,W4A4+W8A8r8", "--jobs", 0)
    assert run(*words).returncode == 1
    assert sorted(statuses(tmp_path / "out")) == ["failed", "ok", "ok", "ok"]
    cost = ("emulate", "--hw", "aie2", "--layer-dump", dump, "--split", "W4A4+W8A8r8")
    assert run(*cost).returncode == 1


def test_a_refusal_stays_one(dump, tmp_path):
    assert run(*sweep(dump, tmp_path / "out", "--split", "W99A4")).returncode == 2


def test_files_are_written_whole(dump, tmp_path):
    saved = tmp_path / "model.safetensors"
    words = ("solve", "--layer-dump", dump, "--split", "W4A4", "--save", saved)
    assert run(*words).returncode == 0
    assert saved.exists()


@pytest.mark.parametrize("words", [("hw", "list"), ("cost", "--help"), ("--version",)])
def test_results_that_nobody_reads_are_no_failure(words):
    assert run(*words, lost=("stdout",)).returncode == 0


def test_a_full_disk_is_a_failure():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "loraq_sim", "hw", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
