"""Splits that no layer can take are refused before a sweep runs, others are announced."""

from dataclasses import replace

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.settings import parse_override
from loraq_sim.solvers import solve
from loraq_sim.split import parse_split
from loraq_sim.sweeps import compose
from loraq_sim.sweeps.plan import check_split_fit


@pytest.fixture
def tasks(make_dump, make_plan):
    """Tasks of an (8, 16) layer and of a second one of another shape."""

    def make(split, n=8, k=16, **changes):
        dump = make_dump(a="ffn_up", b="linear")
        first, second = compose(make_plan(dump, splits=("W4A4",), **changes)).tasks
        parsed = parse_split(split)
        cases = [
            replace(case, settings=replace(case.settings, split=parsed)) for case in first.cases
        ]
        shaped = replace(second, info=replace(second.info, n=n, k=k), cases=tuple(cases))
        return [replace(first, cases=tuple(cases)), shaped]

    return make


def test_a_rank_that_fits_everywhere_needs_no_note(tasks):
    assert check_split_fit(tasks("W4A4+W8A8r8")) == []


def test_a_split_for_no_layer_is_refused_with_one_that_fits(make_dump, make_plan):
    dump = make_dump(a="ffn_up", b="linear")
    with pytest.raises(InputError, match=r"min\(N, K\) = 8, got 17; use W4A4\+W8A8r8 or"):
        compose(make_plan(dump, splits=("W4A4", "W4A4+W8A8r17")))


def test_the_refusal_names_the_layer_that_comes_nearest(tasks):
    with pytest.raises(InputError, match=r"any of its 2 layers; b \(32, 24\) .* W4A4\+W8A8r24 or"):
        check_split_fit(tasks("W4A4+W8A8r99", n=32, k=24))


@pytest.mark.parametrize(("width", "group"), [(1, 1), (3, 2), (8, 64), (64, 16)])
def test_the_budget_that_is_proposed_holds_a_rank(tasks, width, group):
    weight = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    task = tasks("W4A4+W8A8@fp16r1")[0]
    cases = tuple(
        replace(
            case,
            settings=replace(
                case.settings, split=parse_split(case.settings.split.text, group=group)
            ),
        )
        for case in task.cases
    )
    task = replace(task, cases=cases, info=replace(task.info, n=width, k=width))
    with pytest.raises(InputError, match="less than the .* bytes of a rank-1 branch") as refusal:
        check_split_fit([task])
    proposed = parse_split(str(refusal.value).partition("; use ")[2].split()[0], group=group)
    formats = {"main": proposed.main_weight, "branch": proposed.branch_weight}
    assert solve(weight, budget=proposed.budget, preset="fast", **formats).rank >= 1


def test_a_split_for_some_layers_is_announced_with_its_cases(tasks):
    (note,) = check_split_fit(tasks("W4A4+W8A8r12", n=32, k=32, accelerators=("aie2", "a100")))
    assert note.startswith("split W4A4+W8A8r12 fails in 1 of 2 layers (2 cases), such as a: ")
    assert note.endswith("min(N, K) = 8, got 12")


def test_layers_that_nobody_could_describe_are_no_reason_to_refuse(tasks):
    unknown = [replace(task, info=None) for task in tasks("W4A4+W8A8r99")]
    assert check_split_fit(unknown) == []


def test_an_override_counts_for_its_layers_alone(make_dump, make_plan):
    dump = make_dump(a="ffn_up", b="linear")
    plan = make_plan(dump, splits=("W4A4+W8A8r4",), overrides=(parse_override("ffn_up:rank=9"),))
    with pytest.raises(InputError, match=r"r9 cannot be solved in its only layer; a \(8, 16\)"):
        compose(plan)


def test_rounding_alone_has_no_rank_to_fit(make_dump, make_plan):
    plan = make_plan(make_dump(a="linear"), splits=("W4A4+W8A8r99",), methods=("rtn",))
    assert [case.settings.split.text for case in compose(plan).cases] == ["W4A4"]
