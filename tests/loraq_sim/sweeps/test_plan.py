import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import hwmodels
from hwmodels.loader import SHIPPED
from loraq_sim.dumps import LayerInfo
from loraq_sim.errors import DumpError, InputError
from loraq_sim.settings import parse_override
from loraq_sim.split import parse_split, rank_for_budget
from loraq_sim.sweeps import compose
from loraq_sim.sweeps.cases import default_splits


def info(name, n, k):
    return LayerInfo(
        name=name,
        n=n,
        k=k,
        tokens=None,
        kind="linear",
        group="",
        has_bias=False,
        rows_per_call=None,
        calls_per_step=1,
        dtype="float32",
        bias_dtype=None,
        activation_dtype=None,
        nbytes=4 * n * k,
        activation_key=None,
    )


def test_one_task_a_layer_with_every_split_in_order(make_dump, make_plan):
    sweep = compose(make_plan(make_dump(first="ffn_up", second="self_q")))
    assert sweep.layers == ("first", "second")
    assert [case.settings.split.text for case in sweep.tasks[0].cases] == ["W4A4", "W4A8", "W8A8"]
    assert len(set(sweep.case_ids)) == 6


def test_layer_patterns_select_by_name_or_kind(make_dump, make_plan):
    dump = make_dump(first="ffn_up", second="self_q", third="ffn_up")
    assert compose(make_plan(dump, layers=("ffn_*",))).layers == ("first", "third")
    with pytest.raises(DumpError, match="secnd"):
        compose(make_plan(dump, layers=("secnd",)))


def test_every_process_gives_cases_the_same_names(make_dump, make_plan):
    # Sets of words are walked in another order under another hash seed.
    plan = make_plan(make_dump(a="linear"), smooth=0.5, datapath={"acc_bits": 20})
    code = (
        "import sys; from loraq_sim.sweeps import SweepPlan, compose\n"
        "plan = SweepPlan(dump=sys.argv[1], accelerators=('aie2',), smooth=0.5,\n"
        "    splits=('W4A4', 'W4A8', 'W8A8'), datapath={'acc_bits': 20})\n"
        "print(*compose(plan).case_ids)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, plan.dump],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    )
    assert tuple(done.stdout.split()) == tuple(compose(plan).case_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"preset": "fast"},
        {"tokens": 1},
        {"family": "int", "group": 32},
        {"smooth": 0.5},
        {"rotate": "hadamard"},
        {"fused": False},
        {"datapath": {"acc_bits": 20}},
        {"accelerators": ("a100",)},
    ],
    ids=lambda changes: next(reversed(changes)),
)
def test_every_setting_gives_other_names(make_dump, make_plan, changes):
    plan = make_plan(make_dump(a="linear"))
    before = set(compose(plan).case_ids)
    assert not before & set(compose(replace(plan, **changes)).case_ids)


def test_presets_seeds_and_machines_make_a_grid(make_dump, make_plan):
    plan = make_plan(
        make_dump(a="linear"),
        splits=("W4A4", "W4A4+W8A8r4"),
        preset=("fast", "best"),
        seed=(0, 3),
        datapath={"acc_bits": (16, 24)},
    )
    sweep = compose(plan)
    found = [
        (s.split.text, s.preset, s.seed, s.datapath["acc_bits"])
        for s in (case.settings for case in sweep.cases)
    ]
    grid = [(preset, seed) for preset in ("fast", "best") for seed in (0, 3)]
    # Rounding to nearest has neither an effort nor a seed.
    points = [("W4A4", "fast", 0), *(("W4A4+W8A8r4", *point) for point in grid)]
    assert sorted(found) == sorted((*point, bits) for point in points for bits in (16, 24))
    # The second width asks for no other solution.
    assert len({case.solution_key for case in sweep.cases}) == 5
    assert sum(case.effort != "solved" for case in sweep.cases) == 5


def overridden(make_dump, make_plan, *texts, **changes):
    dump = make_dump(up="ffn_up", q="self_q")
    overrides = tuple(parse_override(text) for text in texts)
    plan = make_plan(dump, splits=("W4A4", "W4A4+W8A8r4"), overrides=overrides, **changes)
    return {
        layer: [
            (c.settings.split.text, c.settings.method, dict(c.asked) or None)
            for c in compose(plan).cases
            if c.labels["layer"] == layer
        ]
        for layer in ("up", "q")
    }


def test_overrides_change_matching_layers_and_say_what_was_asked(make_dump, make_plan):
    found = overridden(make_dump, make_plan, "ffn_*:rank=2", "up:method=lqer")
    assert found["q"] == [("W4A4", "rtn", None), ("W4A4+W8A8r4", "loraq", None)]
    asked = {"split": "W4A4+W8A8r4", "method": "loraq"}
    assert found["up"] == [("W4A4", "rtn", None), ("W4A4+W8A8r2", "lqer", asked)]


def test_a_split_for_one_kind_replaces_every_split_of_the_grid(make_dump, make_plan):
    found = overridden(make_dump, make_plan, "self_q:split=W8A8")
    assert [(split, method) for split, method, _ in found["q"]] == [("W8A8", "rtn")] * 2
    assert [asked["split"] for _, _, asked in found["q"]] == ["W4A4", "W4A4+W8A8r4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fnn_up:rank=2", "override 'fnn_up' matches none of 2 layers; nearest: ffn_up"),
        ("up:method=lorak", "unknown method 'lorak'; did you mean 'loraq'"),
        ("up:preset=fats", "unknown preset 'fats'; did you mean 'fast'"),
        ("up:split=W4A99", "override for layer 'up'"),
    ],
)
def test_bad_overrides_are_named(make_dump, make_plan, text, message):
    with pytest.raises(InputError, match=message):
        overridden(make_dump, make_plan, text)


def test_an_edited_accelerator_gives_other_names(make_dump, make_plan, tmp_path):
    shipped = (SHIPPED / "aie2.yaml").read_text()
    path = tmp_path / "aie2.yaml"
    path.write_text(shipped)
    dump = make_dump(a="linear")
    same = compose(make_plan(dump, accelerators=(str(path),))).case_ids
    assert same == compose(make_plan(dump)).case_ids
    assert "uncertainty_percent: 50" in shipped
    path.write_text(shipped.replace("uncertainty_percent: 50", "uncertainty_percent: 51", 1))
    assert same != compose(make_plan(dump, accelerators=(str(path),))).case_ids


def test_a_split_without_a_branch_is_solved_once_whatever_the_methods(make_dump, make_plan):
    plan = make_plan(
        make_dump(a="linear"), methods=("loraq", "lqer"), splits=("W4A4", "W4A4+W8A8r4")
    )
    assert [(c.settings.split.text, c.settings.method) for c in compose(plan).cases] == [
        ("W4A4", "rtn"),
        ("W4A4+W8A8r4", "loraq"),
        ("W4A4+W8A8r4", "lqer"),
    ]


def test_rtn_reduces_a_split_to_its_main_part_and_says_so(make_dump, make_plan):
    plan = make_plan(
        make_dump(a="linear"), methods=("rtn",), splits=("W4A4", "W4A4+W8A8r4", "W4A8+W8A8r4")
    )
    sweep = compose(plan)
    assert [case.settings.split.text for case in sweep.cases] == ["W4A4", "W4A8"]
    assert sweep.notes == ("method rtn has no branch: of 2 splits it solves the main part only",)


def test_splits_written_differently_are_one_case(make_dump, make_plan):
    sweep = compose(make_plan(make_dump(a="linear"), splits=("W4A4", "w4a4", " W4 A4 ")))
    assert len(sweep.cases) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("lorak",)}, "unknown method 'lorak'; did you mean 'loraq'"),
        ({"preset": "fastt"}, "unknown preset 'fastt'; did you mean 'fast'"),
        ({"splits": ("W4A5000",)}, "W4A5000"),
        ({"family": "ints"}, "unknown element family 'ints'"),
        ({"tokens": 0}, "tokens must be a positive integer, .* got 0"),
        ({"datapath": {"acc_bit": 20}}, "unknown datapath setting 'acc_bit'"),
        ({"accelerators": ()}, "at least one method and one accelerator"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(make_dump, make_plan, changes, message):
    with pytest.raises(InputError, match=message):
        compose(make_plan(make_dump(a="linear"), **changes))


def test_an_unknown_accelerator_is_refused(make_dump, make_plan):
    with pytest.raises(hwmodels.AcceleratorError, match="unknown accelerator 'aie9'"):
        compose(make_plan(make_dump(a="linear"), accelerators=("aie9",)))


def test_two_accelerators_of_one_name_are_refused(make_dump, make_plan, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((SHIPPED / "aie2.yaml").read_text().replace("rows: 4", "rows: 2"))
    with pytest.raises(InputError, match="both named 'aie2'"):
        compose(make_plan(make_dump(a="linear"), accelerators=("aie2", str(path))))


def test_two_names_of_one_accelerator_are_one(make_dump, make_plan):
    sweep = compose(make_plan(make_dump(a="linear"), accelerators=("aie2", "xdna1")))
    assert {case.accelerator for case in sweep.cases} == {"aie2"}


def test_a_missing_dump_is_refused(make_plan, tmp_path):
    with pytest.raises(DumpError, match="nowhere"):
        compose(make_plan(tmp_path / "nowhere.pt"))


def test_the_composed_plan_says_everything_a_reader_needs(make_dump, make_plan):
    facts = compose(make_plan(make_dump(a="linear"), splits=())).describe()
    assert facts["plan"]["splits"][0] == "W4A4"
    assert len(facts["dump_digest"]) == len(facts["code_digest"]) == 64
    assert list(facts["accelerator_digests"]) == ["aie2"]
    assert (facts["n_layers"], facts["n_cases"]) == (1, len(facts["plan"]["splits"]))


@pytest.mark.parametrize(
    ("width", "rank"), [(8, 2), (128, 4), (384, 12), (1152, 32), (2240, 64), (3072, 84)]
)
def test_the_default_rank_suits_the_narrowest_layer(width, rank):
    splits, note = default_splits([info("wide", 4 * width, 4 * width), info("slim", width, 9999)])
    assert f"W4A4+W16A16r{rank}" in splits
    assert f"ranks {rank} and {2 * rank}" in note
    assert "slim" in note
    assert len({parse_split(text).text for text in splits}) == len(splits)


@pytest.mark.parametrize("width", [8, 16, 24, 128, 384, 1152])
def test_the_default_budgets_fit_the_narrowest_layer(width):
    splits = [parse_split(text) for text in default_splits([info("a", width, width)])[0]]
    with_budget = [split for split in splits if split.budget is not None]
    assert with_budget
    for split in with_budget:
        assert 1 <= rank_for_budget(width, width, split.branch_weight, split.budget) <= width


def test_a_dump_without_a_usable_layer_is_refused_with_the_reason(make_plan, tmp_path):
    np.savez(tmp_path / "bad.npz", **{"a.weight": np.zeros(3, np.float32)})
    with pytest.raises(DumpError, match=r"bad\.npz"):
        compose(make_plan(tmp_path / "bad.npz", splits=()))


def test_a_layer_without_its_branch_keeps_the_seeds_of_the_plan(make_dump, make_plan):
    # Totals add up layers of one seed: a layer that is rounded must have a row under each.
    plan = make_plan(
        make_dump(a="linear", b="linear"),
        splits=("W4A4+W8A8r4",),
        seed=(3, 5),
        overrides=(parse_override("a:split=W4A8"),),
    )
    labels = {(case.labels["layer"], case.labels["seed"]) for case in compose(plan).cases}
    assert labels == {("a", 3), ("a", 5), ("b", 3), ("b", 5)}
