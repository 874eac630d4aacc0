"""A step as a schedule: by hand on three calls, and what holds for every model and machine."""

from types import SimpleNamespace

import pytest

from hwmodels import AcceleratorError, list_models, load_accelerator, load_model
from hwmodels.inventory import BlockPlan, InventoryEntry, ModelInventory, StepPlan
from hwmodels.schedule import CallCost, entry_names, resident_names, schedule_step


def _entry(kind, calls):
    return InventoryEntry(kind=kind, op="gemm", m=8, n=8, k=8, calls=calls, precision="split")


def _model(entries, blocks, first=(), last=()):
    return ModelInventory(
        name="toy", title="toy", source="toy", resolution=512, guidance_batch=1,
        entries=tuple(entries), schedule=StepPlan(first=first, blocks=tuple(blocks), last=last),
    )  # fmt: skip


def _call(seconds, units=1.0, dram=0.0, *, validated=False):
    return CallCost(latency_s=seconds, units_share=units, dram_share=dram, is_validated=validated)


BLOCK = BlockPlan(count=2, early=("side>out",), stages=(("q", "k"), ("out",)))


def test_a_step_by_hand():
    """Twice: q and k at once on half of the units each, then out on all; side where room is left.

    q takes 2 s, k 1 s, out 3 s, side 1 s on half: in the first block side starts when k is done,
    as does the second block's, so that out waits for neither. 2 + 3 + 2 + 3 = 10 s.
    """
    model = _model([_entry("q", 2), _entry("k", 2), _entry("out", 2), _entry("side", 2)], [BLOCK])
    costs = {"q": _call(2, 0.5), "k": _call(1, 0.5), "out": _call(3), "side": _call(1, 0.5)}
    step = schedule_step(model, costs)
    assert step.serial_s == 14
    assert step.critical_path_s == 10
    assert step.makespan_s == 10
    # Units times seconds: 2 of (2 + 1 + 1) / 2 and 3.
    assert step.idle_share == pytest.approx(1 - 10 / 10)
    starts = {(t.name, t.block): t.start_s for t in step.tasks}
    assert starts[("k", 1)] == 0
    assert starts[("side", 1)] == 1
    assert starts[("out", 1)] == 2
    assert starts[("out", 2)] == 7


def test_calls_that_ask_for_all_of_dram_do_not_run_at_once():
    model = _model(
        [_entry("q", 1), _entry("k", 1)], [BlockPlan(count=1, early=(), stages=(("q", "k"),))]
    )
    together = schedule_step(model, {"q": _call(2, 0.5, 0.5), "k": _call(2, 0.5, 0.5)})
    apart = schedule_step(model, {"q": _call(2, 0.5, 0.6), "k": _call(2, 0.5, 0.6)})
    assert (together.makespan_s, apart.makespan_s) == (2, 4)
    assert apart.idle_share == pytest.approx(0.5)


def test_the_validated_share_is_of_time():
    model = _model([_entry("q", 3), _entry("k", 1)], [], first=(("q",), ("k",)))
    step = schedule_step(model, {"q": _call(1, validated=True), "k": _call(1)})
    assert step.validated_share == 0.75


def test_a_plan_that_forgets_or_repeats_a_call_is_refused():
    model = _model([_entry("q", 3)], [BlockPlan(count=2, early=(), stages=(("q",),))])
    with pytest.raises(AcceleratorError, match="toy: the schedule runs q 2 times, its step 3"):
        schedule_step(model, {"q": _call(1)})
    with pytest.raises(AcceleratorError, match="names 'q', which the step does not have"):
        schedule_step(model, {})


@pytest.mark.parametrize("resolution", [512, 1024])
@pytest.mark.parametrize("name", list_models())
def test_every_call_of_a_model_is_placed_once_and_in_order(name, resolution):
    model = load_model(name, resolution)
    names = entry_names(model)
    costs = {
        each: _call(1 + i % 5, 0.25 * (1 + i % 4), 0.2 * (i % 3)) for i, each in enumerate(names)
    }
    step = schedule_step(model, costs)
    assert len(step.tasks) == sum(entry.calls for entry in model.entries)
    assert step.critical_path_s <= step.makespan_s <= step.serial_s
    assert 0 <= step.idle_share < 1
    # No moment asks for more units than there are.
    edges = sorted(
        [(t.start_s, 1, t.units_share) for t in step.tasks]
        + [(t.end_s, 0, -t.units_share) for t in step.tasks]
    )
    level = 0.0
    for _, _, change in edges:
        level += change
        assert level <= 1 + 1e-6
    ends = {}
    for task in step.tasks:
        ends[(task.name, task.block)] = max(ends.get((task.name, task.block), 0), task.end_s)
    for task in step.tasks:
        if "attention" in task.name and task.block > 0:
            for product in ("self_q", "self_k", "self_v"):
                before = ends.get((product, task.block)) if "cross" not in task.name else None
                assert before is None or task.start_s >= before


def test_weights_that_save_most_a_byte_stay_in_l2():
    l2 = SimpleNamespace(capacity_bytes=200, panel_fraction=0.5)
    hw = SimpleNamespace(memories=SimpleNamespace(l2=l2))
    stored = {"a": 60, "b": 30, "c": 40, "d": 10}
    saved = {"a": 60.0, "b": 60.0, "c": 20.0, "d": 0.0}
    # 90 bytes: b saves 2 a byte, a 1; c saves less than a and no longer fits.
    assert resident_names(hw, stored, saved, 10) == ["b", "a"]
    assert resident_names(hw, stored, saved, 40) == ["b"]
    assert resident_names(hw, stored, saved, 200) == []


def test_an_array_without_panels_keeps_no_weights():
    hw = load_accelerator("aie2")
    assert resident_names(hw, {"a": 1}, {"a": 1.0}, 0) == []
