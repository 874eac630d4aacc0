"""Whatever stops a sweep, the same command ends with the table of an uninterrupted run."""

import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from loraq_sim.errors import StoreError
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import compose, run_sweep

SCRIPT = """
import resource, sys
sys.path.insert(0, sys.argv[3])
from loraq_sim.errors import StoreError
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import SweepPlan, run_sweep

if int(sys.argv[4]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
plan = SweepPlan(dump=sys.argv[1], accelerators=("aie2",), splits=("W4A4", "W4A8", "W8A8"))
print("started", flush=True)
try:
    with ResultStore.open(sys.argv[2], create=True, wait_s=60) as store:
        outcome = run_sweep(plan, store, jobs=2, evaluate="fake_evaluation:evaluate")
except StoreError as error:
    sys.exit(f"error: {error}")
print(outcome.n_ok, outcome.n_skipped, flush=True)
"""
LAYERS = dict.fromkeys("abcdef", "steady")


def start(dump, path, *, limit=0):
    command = [sys.executable, "-c", SCRIPT, dump, path, Path(__file__).parent, limit]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n"
    return process


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def table(path):
    """The rows of a store without what names the process that worked on them."""
    with ResultStore.open(path) as store:
        return [{k: v for k, v in row.items() if k != "pid"} for row in store.rows()]


@pytest.fixture
def dump(make_dump):
    return make_dump(**LAYERS)


@pytest.fixture
def whole(dump, make_plan, fake, tmp_path, monkeypatch):
    """The table of an uninterrupted run."""
    # Workers have one thread each, and the fake evaluation writes down how many.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with ResultStore.open(tmp_path / "whole.sqlite", create=True) as store:
        run_sweep(compose(make_plan(dump)), store, jobs=0, evaluate=fake)
    return table(tmp_path / "whole.sqlite")


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["3", "20"])
def test_a_driver_killed_at_random_moments_loses_nothing(dump, whole, tmp_path, moments):
    path = tmp_path / "r.sqlite"
    dice = random.Random(moments)
    counts = [0]
    for _ in range(moments):
        process = start(dump, path)
        # A run to the end takes one to two seconds, of which workers start in the first.
        time.sleep(dice.uniform(0.0, 1.5))
        process.kill()
        process.communicate(timeout=60)
        if path.exists() and path.stat().st_size:
            found = table(path)
            assert all(row in bare(whole) for row in bare(found))
            assert len(found) >= counts[-1]
            counts.append(len(found))
    code, out, err = finish(start(dump, path))
    assert (code, err) == (0, "")
    assert sum(map(int, out.split())) == len(whole)
    assert table(path) == whole


def bare(rows):
    # The front is marked when a sweep ends.
    return [{**row, "pareto": None} for row in rows]


def test_two_runs_at_once_share_the_work_and_corrupt_nothing(dump, whole, tmp_path):
    path = tmp_path / "r.sqlite"
    both = [start(dump, path), start(dump, path)]
    ends = [finish(process) for process in both]
    assert [(code, err) for code, _, err in ends] == [(0, "")] * 2
    assert sorted(out.split() for _, out, _ in ends) == [["0", "18"], ["18", "0"]]
    assert table(path) == whole


def test_a_full_disk_is_one_clear_line_and_the_store_resumes(dump, whole, tmp_path):
    path = tmp_path / "r.sqlite"
    # The write-ahead log outgrows this after some rows.
    code, _, err = finish(start(dump, path, limit=100_000))
    assert code == 1
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1
    assert "rows stored so far are safe" in err
    stored = table(path)
    assert 0 < len(stored) < len(whole)
    code, out, err = finish(start(dump, path))
    assert (code, err) == (0, "")
    assert out.split() == [str(len(whole) - len(stored)), str(len(stored))]
    assert table(path) == whole


def test_a_cut_store_is_refused_or_complete_never_half_read(dump, whole, tmp_path):
    content = (tmp_path / "whole.sqlite").read_bytes()
    cut = tmp_path / "cut.sqlite"
    dice = random.Random(0)
    sizes = {0, 1, 100, 4096, len(content) - 1, *(dice.randrange(len(content)) for _ in range(40))}
    for size in sorted(sizes):
        cut.write_bytes(content[:size])
        with pytest.raises(StoreError, match=r"cut\.sqlite: (is damaged|is not a loraq-sim)"):
            table(cut)
        assert cut.stat().st_size == size


def test_a_log_cut_by_a_power_failure_loses_its_last_rows_only(dump, whole, tmp_path):
    """Every frame of the log has a checksum; what comes after a broken one is left out."""
    path = tmp_path / "r.sqlite"
    process = start(dump, path)
    log = path.with_name("r.sqlite-wal")
    deadline = time.monotonic() + 60
    while not log.exists() or log.stat().st_size < 80_000:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 5000)
    path.with_name("r.sqlite-shm").unlink(missing_ok=True)
    assert finish(start(dump, path))[0] == 0
    assert table(path) == whole


def test_a_damaged_row_is_named_and_computed_again(dump, whole, tmp_path, make_plan, fake):
    path = tmp_path / "whole.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE rows SET latency_s=5.0 WHERE layer='b' AND split='W4A8'")
    told = []
    with ResultStore.open(path, create=True) as store:
        sweep = compose(make_plan(dump))
        outcome = run_sweep(sweep, store, jobs=0, evaluate=fake, on_event=told.append)
    assert (outcome.n_ok, outcome.n_skipped) == (1, 17)
    notes = [event.message for event in told if event.kind == "note"]
    assert notes == ["the stored row of layer 'b', split 'W4A8' was damaged and is removed"]
    assert table(path) == whole
