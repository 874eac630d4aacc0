import os
from dataclasses import replace

import numpy as np
import pytest

from loraq_sim.solvers import solve
from loraq_sim.sweeps import SolutionCache, compose, run_sweep
from loraq_sim.sweeps import digests as solution_cache


@pytest.fixture
def cache(tmp_path):
    return SolutionCache(folder=str(tmp_path / "solutions"), least_seconds=0.0)


@pytest.fixture(scope="module")
def solution():
    weight = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    return solve(weight, rank=4, preset="fast")


def files(cache):
    return sorted(path for path in cache._files())


def test_a_solution_comes_back_bit_for_bit(cache, solution):
    cache.keep("ab12", solution)
    found = cache.load("ab12")
    for part in ("main", "left", "right"):
        stored, original = getattr(found, part), getattr(solution, part)
        np.testing.assert_array_equal(stored.codes, original.codes)
        np.testing.assert_array_equal(stored.scales, original.scales)
    assert (found.weight_error, found.rank) == (solution.weight_error, solution.rank)
    assert cache.load("ab13") is None
    assert cache.load("ab1") is None


def test_what_was_quick_to_solve_is_not_kept(cache, solution):
    replace(cache, least_seconds=1e6).keep("ab12", solution)
    assert cache.load("ab12") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_counts_as_missing_and_goes(cache, solution, damage):
    cache.keep("ab12", solution)
    ((_, _, path),) = files(cache)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"cut": content[:100], "flip": content, "empty": b""}[damage])
    assert cache.load("ab12") is None
    assert not path.exists()


def test_the_least_recently_used_go_when_the_folder_is_full(cache, solution, monkeypatch):
    monkeypatch.setattr(solution_cache, "_unchecked", {})
    cache.keep("aa00", solution)
    ((_, size, _),) = files(cache)
    small = replace(cache, max_bytes=3 * size)
    for index, key in enumerate(("aa01", "bb02")):
        small.keep(key, solution)
        for _, _, path in files(cache):
            if path.name.startswith(key):
                os.utime(path, (index + 10, index + 10))
    os.utime(next(p for _, _, p in files(cache) if p.name.startswith("aa00")), (5, 5))
    assert small.load("aa00") is not None
    small.keep("cc03", solution)
    # aa01 is the one nobody asked for since; two others make room down to nine tenths.
    kept = {path.name[:4] for _, _, path in files(cache)}
    assert "aa01" not in kept
    assert {"aa00", "cc03"} <= kept


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, solution):
    (tmp_path / "file").touch()
    cache = SolutionCache(folder=str(tmp_path / "file" / "below"), least_seconds=0.0)
    cache.keep("ab12", solution)
    assert cache.load("ab12") is None


SPLITS = ("W4A4", "W4A4+W8A8r4")


def results(store, sweep):
    loose = dict.fromkeys(("seconds", "case_id"))
    return [row | loose for row in store.rows(sweep.case_ids)]


@pytest.mark.parametrize("change", [{"accelerators": ("a100",)}, {"datapath": {"acc_bits": 12}}])
def test_another_machine_solves_nothing_again(make_dump, make_plan, store, cache, change):
    plan = make_plan(make_dump(a="linear", b="linear"), splits=SPLITS, preset="fast")
    run_sweep(plan, store, jobs=0, cache=cache)
    before = [path for _, _, path in files(cache)]
    assert len(before) == 4
    changed = replace(plan, **change)
    sweep = compose(changed)
    assert run_sweep(sweep, store, jobs=0, cache=cache).n_ok == 4
    assert sorted(path for _, _, path in files(cache)) == sorted(before)
    again = results(store, sweep)
    assert run_sweep(sweep, store, jobs=0, force=True).n_ok == 4
    assert results(store, sweep) == again


def test_a_changed_solver_setting_solves_again(make_dump, make_plan, store, cache):
    plan = make_plan(make_dump(a="linear"), splits=SPLITS[1:], preset="fast")
    run_sweep(plan, store, jobs=0, cache=cache)
    run_sweep(replace(plan, seed=1), store, jobs=0, cache=cache)
    run_sweep(replace(plan, preset="balanced"), store, jobs=0, cache=cache)
    assert len(files(cache)) == 3


def test_cases_of_one_solution_run_one_after_the_other(make_dump, make_plan, store):
    plan = make_plan(
        make_dump(a="linear"), splits=SPLITS, preset="fast", datapath={"acc_bits": (16, 24)}
    )
    events = []
    run_sweep(plan, store, jobs=0, on_event=events.append)
    assert [event.split for event in events if event.kind == "case"] == [
        *("W4A4", "W4A4", "W4A4+W8A8r4", "W4A4+W8A8r4")
    ]
