from dataclasses import replace

import pytest

from loraq_sim.rows import failed_row
from loraq_sim.split import parse_split
from loraq_sim.sweep import compose, estimate
from loraq_sim.sweep.forecast import case_seconds, rank_of


@pytest.fixture
def info(make_dump, make_plan):
    small = compose(make_plan(make_dump(a="linear"))).tasks[0].info
    return replace(small, n=512, k=512, tokens=256)


def seconds(info, split="W4A4+W8A8r16", method="loraq", preset="balanced", tokens=None):
    return case_seconds(info, parse_split(split), method, preset, tokens)


def test_more_work_takes_longer(info):
    base = seconds(info)
    assert base < seconds(replace(info, n=1024))
    assert base < seconds(replace(info, tokens=512))
    assert base < seconds(info, split="W4A4+W8A8r64")
    assert base < seconds(info, preset="best")
    assert base > seconds(info, tokens=16)
    assert base > seconds(info, method="lqer")
    assert base > seconds(info, split="W4A4", method="rtn") > 0


def test_a_layer_without_activations_costs_no_emulation(info):
    assert seconds(replace(info, tokens=None)) == seconds(replace(info, tokens=None), tokens=64)
    assert seconds(replace(info, tokens=None)) < seconds(info)


def test_a_layer_nobody_could_describe_still_has_a_time():
    assert case_seconds(None, parse_split("W4A4"), "rtn", "fast", None) > 0


@pytest.mark.parametrize(
    ("split", "rank"),
    [("W4A4", 0), ("W4A4+W8A8r64", 64), ("W4A4+W8A8@fp16r32", 64), ("W4A4+W6A6@fp16r32", 85)],
)
def test_the_rank_of_a_budget_is_the_one_its_codes_allow(split, rank):
    assert rank_of(parse_split(split)) == rank


def test_cases_already_stored_are_counted_and_not_timed(make_dump, make_plan, store):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    before = estimate(sweep, store)
    assert (before.n_layers, before.n_cases, before.n_done, before.n_to_run) == (2, 6, 0, 6)
    assert before.seconds > 0
    assert before.basis == "a short probe of this machine"
    for case in sweep.cases:
        store.add(case.case_id, {"layer": "a", "status": "ok", "seconds": 2 * case.work})
    after = estimate(sweep, store)
    assert (after.n_done, after.n_to_run, after.seconds) == (6, 0, 0.0)
    assert estimate(sweep, store, force=True).n_to_run == 6


def test_stored_cases_calibrate_the_rest(make_dump, make_plan, store):
    sweep = compose(make_plan(make_dump(a="linear")))
    for case, slowdown in zip(sweep.cases, (10, 100), strict=False):
        row = {"layer": "a", "status": "ok", "seconds": slowdown * case.work}
        store.add(case.case_id, row)
    found = estimate(sweep, store)
    assert found.basis == "2 cases of this sweep already stored"
    # The median of 10 and 100, on top of the seconds it takes to start a worker.
    left = 55 * sweep.cases[2].work
    assert found.seconds == pytest.approx(2.5 + left)


def test_failed_cases_are_to_be_run_again(make_dump, make_plan, store):
    sweep = compose(make_plan(make_dump(a="linear")))
    store.add(sweep.case_ids[0], failed_row("why", {"layer": "a"}))
    assert estimate(sweep, store).n_to_run == 3


def test_two_workers_take_less_but_no_less_than_the_longest_layer(make_dump, make_plan):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    heavy = [replace(case, work=100.0) for case in sweep.tasks[0].cases]
    sweep = replace(sweep, tasks=(replace(sweep.tasks[0], cases=tuple(heavy)), sweep.tasks[1]))
    one, many = estimate(sweep, jobs=1).seconds, estimate(sweep, jobs=64).seconds
    assert 0.5 * one < many <= 1.5 * one
