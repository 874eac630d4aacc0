from dataclasses import replace

import pytest

from loraq_sim.rows import failed_row
from loraq_sim.split import parse_split
from loraq_sim.sweep import compose, estimate, probe
from loraq_sim.sweep.work import WorkOfLayer, rank_of


@pytest.fixture
def info(make_dump, make_plan):
    small = compose(make_plan(make_dump(a="linear"))).tasks[0].info
    return replace(small, n=512, k=512, tokens=256)


def seconds(info, split="W4A4+W8A8r16", method="loraq", preset="balanced", tokens=None):
    return WorkOfLayer(info).case_seconds(parse_split(split), method, preset, tokens)


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
    assert seconds(None, split="W4A4", method="rtn", preset="fast") > 0


def test_splits_of_a_layer_share_what_the_solver_shares(info):
    layer = WorkOfLayer(info)

    def next_case(split, **options):
        return layer.case_seconds(parse_split(split), "loraq", "fast", None, **options)

    alone = next_case("W4A4+W8A8r64")
    equal = next_case("W4A8+W8A8r64")  # another activation format: the same solution
    same_stages = next_case("W4A4+W16A16r64")
    other_rank = next_case("W4A4+W8A8r63")
    assert equal < 0.3 * alone
    assert equal < same_stages < 0.8 * alone
    assert other_rank > same_stages
    # A stored solution of an earlier accelerator leaves the emulation.
    assert next_case("W4A4+W8A8r62", is_solved=True) < equal


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
    first, second, last = (case.work for case in sweep.cases)
    for case, slowdown in zip(sweep.cases, (10, 100), strict=False):
        row = {"layer": "a", "status": "ok", "seconds": slowdown * case.work}
        store.add(case.case_id, row)
    found = estimate(sweep, store)
    assert found.basis == "2 cases of this sweep already stored"
    left = last * (10 * first + 100 * second) / (first + second)
    assert found.seconds == pytest.approx(probe.probe_machine().start_s + left)


def test_a_probe_that_fails_leaves_the_formula(monkeypatch):
    monkeypatch.setattr(probe.sys, "executable", "no-such-python")
    found = probe.probe_machine.__wrapped__()
    assert (found.factor, found.basis) == (1.0, "a machine like that of the authors")


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
