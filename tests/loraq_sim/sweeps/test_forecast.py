from dataclasses import replace

import pytest

from loraq_sim.results.rows import failed_row
from loraq_sim.settings import CaseSettings
from loraq_sim.split import parse_split
from loraq_sim.sweeps import compose, estimate
from loraq_sim.sweeps import forecast as probe
from loraq_sim.sweeps.cases import SOLVED, case_work, effort_of, rank_of, seconds_of

# Before the fixture puts another in its place.
PROBE_MACHINE = probe.probe_machine


@pytest.fixture
def info(make_dump, make_plan):
    small = compose(make_plan(make_dump(a="linear"))).tasks[0].info
    return replace(small, n=512, k=512, tokens=256)


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch):
    """A probe that takes no time and finds a second per thousand units; `probes` has the calls."""
    probes = []

    def measure(efforts):
        probes.append(efforts)
        rates = dict.fromkeys(efforts, 1e-3)
        return probe.ProbeResult(rates=rates, start_s=2.0, basis="a short probe of this machine")

    monkeypatch.setattr("loraq_sim.sweeps.forecast.probe_machine", measure)
    return probes


def units(info, split="W4A4+W8A8r16", tokens=None, is_solved=False):
    settings = CaseSettings(split=parse_split(split), tokens=tokens)
    return case_work(settings, info, is_solved=is_solved)


def test_larger_layers_are_more_work(info):
    base = units(info)
    assert base < units(replace(info, n=1024))
    assert base < units(replace(info, tokens=512))
    assert base < units(info, split="W4A4+W8A8r64")
    assert base > units(info, tokens=16)
    assert base > units(info, is_solved=True) > 0
    assert units(info, split="W4A4+W8A8r9999") == units(info, split="W4A4+W8A8r512")


def test_a_layer_without_activations_costs_no_emulation(info):
    silent = replace(info, tokens=None)
    assert units(silent) == units(silent, tokens=64) < units(info)


def test_a_layer_nobody_could_describe_still_is_work():
    assert units(None) > 0


def test_efforts_are_what_takes_the_same_time_per_unit():
    branch, plain = (CaseSettings(split=parse_split(s)) for s in ("W4A4+W8A8r4", "W4A4"))
    assert effort_of(branch, is_solved=False) == "loraq balanced"
    assert effort_of(replace(branch, method="lqer"), is_solved=False) == "lqer balanced"
    assert effort_of(plain, is_solved=False) == "rtn"
    assert effort_of(branch, is_solved=True) == effort_of(plain, is_solved=True) == SOLVED


def test_cases_of_one_solution_are_solved_once(make_dump, make_plan):
    plan = make_plan(make_dump(a="linear"), splits=("W4A4+W8A8r4", "W4A8+W8A8r4", "W4A4"))
    found = [case.effort for case in compose(plan).cases]
    assert found == ["loraq balanced", SOLVED, "rtn"]


@pytest.mark.parametrize(
    ("split", "rank"),
    [("W4A4", 0), ("W4A4+W8A8r64", 64), ("W4A4+W8A8@fp16r32", 64), ("W4A4+W6A6@fp16r32", 85)],
)
def test_the_rank_of_a_budget_is_the_one_its_codes_allow(split, rank):
    assert rank_of(CaseSettings(split=parse_split(split))) == rank


def test_seconds_need_a_rate_of_every_effort():
    assert seconds_of({"a": 2.0, "b": 0.0}, {"a": 3.0}) == 6.0
    assert seconds_of({"a": 2.0, "b": 1.0}, {"a": 3.0}) is None


def test_cases_already_stored_are_counted_and_not_timed(make_dump, make_plan, store, quick_probe):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    before = estimate(sweep, store)
    assert (before.n_layers, before.n_cases, before.n_done, before.n_to_run) == (2, 6, 0, 6)
    assert before.seconds == pytest.approx(2.0 + 1e-3 * sum(case.work for case in sweep.cases))
    assert before.basis == "a short probe of this machine"
    assert quick_probe == [("rtn", "solved")]
    for case in sweep.cases:
        store.add(case.case_id, {"layer": "a", "status": "ok", "seconds": 2 * case.work})
    after = estimate(sweep, store)
    assert (after.n_done, after.n_to_run, after.seconds) == (6, 0, 0.0)
    assert estimate(sweep, store, force=True).n_to_run == 6


def test_stored_cases_teach_their_effort_and_the_probe_the_others(
    make_dump, make_plan, store, quick_probe
):
    splits = ("W4A4", "W4A4+W8A8r4", "W4A4+W8A8r2")
    sweep = compose(make_plan(make_dump(a="linear"), splits=splits))
    plain, first, second = sweep.cases
    store.add(first.case_id, {"layer": "a", "status": "ok", "seconds": 7 * first.work})
    found = estimate(sweep, store)
    expected = 2.0 + 7 * second.work + 1e-3 * plain.work
    assert found.seconds == pytest.approx(expected)
    assert found.basis == "1 case of this sweep already stored, and a short probe of this machine"
    assert quick_probe == [("rtn",)]


def test_the_probe_measures_every_effort_on_this_machine():
    rates, seconds = probe.run_probe(["rtn", SOLVED, "lqer fast", "loraq fast"])
    assert 0 < sum(rates.values()) < seconds
    assert rates.keys() == {"rtn", SOLVED, "lqer fast", "loraq fast"}
    assert rates["loraq fast"] > rates["rtn"] > 0


def test_a_probe_that_fails_leaves_a_guess_and_says_so(monkeypatch):
    monkeypatch.setattr(probe.sys, "executable", "no-such-python")
    found = PROBE_MACHINE.__wrapped__(("rtn",))
    assert found.basis == "a machine like that of the authors"
    assert found.rates["rtn"] > 0


def test_failed_cases_are_to_be_run_again(make_dump, make_plan, store):
    sweep = compose(make_plan(make_dump(a="linear")))
    store.add(sweep.case_ids[0], failed_row("why", {"layer": "a"}))
    assert estimate(sweep, store).n_to_run == 3


def test_two_workers_take_less_but_no_less_than_the_longest_layer(make_dump, make_plan):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    heavy = [replace(case, work=1e6) for case in sweep.tasks[0].cases]
    sweep = replace(sweep, tasks=(replace(sweep.tasks[0], cases=tuple(heavy)), sweep.tasks[1]))
    one, many = estimate(sweep, jobs=1).seconds, estimate(sweep, jobs=64).seconds
    assert 0.5 * one < many <= one
