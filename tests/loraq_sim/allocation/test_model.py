"""Allocations of result rows: budgets met, totals as the model's, everything odd said clearly."""

import itertools
import math

import pandas as pd
import pytest

import loraq_sim as lq
from loraq_sim.allocation.model import allocate, allocate_each
from loraq_sim.metrics import AGGREGATES
from loraq_sim.results.totals import model_totals


def every_choice(rows):
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    return itertools.product(*([r for r in rows if r["layer"] == name] for name in layers))


def totals_of(chosen):
    """The README's definitions, written out."""
    calls = [row["calls_per_step"] for row in chosen]
    square = sum(c * r["output_error"] ** 2 for c, r in zip(calls, chosen, strict=True))
    return {
        "output_error": math.sqrt(square / sum(calls)),
        "latency_s": sum(c * r["latency_s"] for c, r in zip(calls, chosen, strict=True)),
        "energy_j": sum(c * r["energy_j"] for c, r in zip(calls, chosen, strict=True)),
        "weight_bytes": sum(r["weight_bytes"] for r in chosen),
    }


def middle(rows, column):
    values = [totals_of(chosen)[column] for chosen in every_choice(rows)]
    return 0.6 * min(values) + 0.4 * max(values)


CASES = [
    (("latency_s",), "output_error"),
    (("weight_bytes",), "output_error"),
    (("output_error",), "latency_s"),
    (("output_error", "weight_bytes"), "energy_j"),
    (("latency_s", "weight_bytes", "energy_j"), "output_error"),
]


@pytest.mark.parametrize(("budgeted", "minimize"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_the_exact_allocation_is_the_best_of_all_choices(make_rows, budgeted, minimize, seed):
    rows = make_rows(seed)
    budget = {column: middle(rows, column) for column in budgeted}
    feasible = [
        totals[minimize]
        for totals in map(totals_of, every_choice(rows))
        if all(totals[column] <= limit for column, limit in budget.items())
    ]
    found = allocate(rows, budget, minimize=minimize)
    fast = allocate(rows, budget, minimize=minimize, method="lagrangian")
    # Sums of four terms in another order, and a square root: some ulps.
    assert found.value == pytest.approx(min(feasible), rel=1e-12)
    assert found.is_proven
    # HiGHS proves to 1e-10 of the range of the squared objective.
    assert found.gap < 1e-8
    assert fast.bound <= found.value * (1 + 1e-12) <= fast.value * (1 + 2e-12)
    for one in (found, fast):
        totals = totals_of(one.rows)
        assert all(totals[column] <= limit * (1 + 1e-9) for column, limit in budget.items())
        for column, value in totals.items():
            assert one.totals[column] == pytest.approx(value, rel=1e-12)


def test_an_allocation_of_one_split_has_the_totals_of_the_model(make_rows):
    rows = [row for row in make_rows() if row["split"] == "W4A8"]
    for aggregate in AGGREGATES:
        found = allocate(rows, {"latency_s": 1.0}, aggregate=aggregate)
        (total,) = model_totals(rows, aggregate=aggregate)
        for column in ("output_error", "weight_error", "latency_s", "energy_j", "weight_bytes"):
            assert found.totals[column] == pytest.approx(total[column], rel=1e-12)


def test_the_objective_follows_from_the_budget(make_rows):
    rows = make_rows()
    assert allocate(rows, {"latency_s": 1.0}).minimize == "output_error"
    assert allocate(rows, {"output_error": 1.0}).minimize == "latency_s"
    unbound = allocate(rows, {"latency_s": 1.0})
    assert unbound.value == unbound.bound == pytest.approx(unbound.problem.least("output_error"))


def test_a_data_frame_and_its_rows_allocate_alike(make_rows):
    rows = make_rows()
    budget = {"latency_s": middle(rows, "latency_s")}
    frame = pd.DataFrame([{**row, "token_limit": None} for row in rows])
    assert lq.allocate(frame, budget=budget).splits == lq.allocate(rows, budget).splits


def test_each_machine_has_its_own_allocation(make_rows):
    rows = (
        make_rows() + make_rows(1, accelerator="gpu") + make_rows(2, accelerator="gpu", acc_bits=16)
    )
    found = allocate_each(rows, {"latency_s": 1.0})
    assert [one.accelerator for one in found] == ["npu", "gpu", "gpu"]
    with pytest.raises(lq.InputError, match=r"3 machines .*\(npu, gpu\)"):
        allocate(rows, {"latency_s": 1.0})
    assert allocate(rows, {"latency_s": 1.0}, accelerator="npu").splits == found[0].splits
    with pytest.raises(lq.InputError, match="unknown accelerator 'npx'; did you mean 'npu'"):
        allocate(rows, {"latency_s": 1.0}, accelerator="npx")


def test_several_presets_and_seeds_of_a_split_are_choices_of_their_own(make_rows):
    rows = make_rows()
    better = [row | {"seed": 1, "output_error": row["output_error"] / 2} for row in rows]
    found = allocate(rows + better, {"latency_s": 1.0})
    assert {row["seed"] for row in found.rows} == {1}


def test_rows_of_overridden_layers_belong_to_the_machine_of_the_others(make_rows):
    rows = make_rows()
    rows[0] = rows[0] | {"options": '{"asked": {"split": "W4A8"}}'}
    assert len(allocate_each(rows, {"latency_s": 1.0})) == 1


def test_layers_without_a_row_and_with_few_are_named(make_rows):
    rows = make_rows(n_layers=3)
    for row in rows:
        if row["layer"] == "layer1" or (row["layer"] == "layer2" and row["split"] != "W8A8"):
            row.update(status="failed", output_error=None)
    found = allocate(rows, {"latency_s": 1.0})
    assert found.splits.keys() == {"layer0", "layer2"}
    assert found.splits["layer2"] == "W8A8"
    missing, fewer = found.problem.notes
    assert "1 of 3 layers left out of all sums without a usable row, such as layer1" in missing
    assert "1 layer has less than 4 usable rows to choose from, such as layer2 with 1" in fewer


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ({"latency_s": 1e-9}, {}, r"npu: latency_s=1e-09 cannot be met: the least possible of"),
        ({"output_error": 0.0}, {}, "output_error=0 cannot be met: the least possible"),
        ({"output_error": -0.1}, {}, "cannot be met"),
        ({}, {}, "needs a budget"),
        ({"latency": 1}, {}, "unknown column 'latency'; did you mean 'latency_s'"),
        ({"latency_s": "3"}, {}, "must be a number, got '3'"),
        ({"latency_s": math.nan}, {}, "must be a number, got nan"),
        ({"latency_s": 1}, {"minimize": "latency_s"}, "a budget on it says nothing"),
        ({"latency_s": 1}, {"minimize": "eror"}, "unknown column to minimize 'eror'"),
        ({"latency_s": 1}, {"method": "magic"}, "unknown allocation method 'magic'"),
        ({"latency_s": 1}, {"aggregate": "mean"}, "unknown aggregate 'mean'"),
        ({"latency_s": 1}, {"time_limit_s": 0}, "time limit must be positive"),
        ({"dram_bytes": 1}, {}, "no row knows dram_bytes: use another column"),
    ],
)
def test_what_cannot_be_done_says_why(make_rows, budget, options, message):
    with pytest.raises(lq.InputError, match=message):
        allocate(make_rows(), budget, **options)


def test_budgets_that_cannot_be_met_together_name_the_least_possible(make_rows):
    rows = make_rows()
    choices = [totals_of(chosen) for chosen in every_choice(rows)]
    lowest = min(totals["latency_s"] for totals in choices)
    error = min(totals["output_error"] for totals in choices)
    least = min(t["latency_s"] for t in choices if t["output_error"] <= error * (1 + 1e-9))
    assert least > lowest
    with pytest.raises(lq.InputError, match="cannot be met together") as caught:
        allocate(rows, {"latency_s": lowest, "output_error": error}, minimize="energy_j")
    assert f"with output_error={error:.6g} the least possible latency_s is {least:.6g}" in str(
        caught.value
    )


def test_rows_without_activations_can_be_allocated_by_weight_error(make_rows):
    rows = [row | {"output_error": None, "output_rms": None} for row in make_rows()]
    with pytest.raises(lq.InputError, match="no row knows output_error: the dump has no activ"):
        allocate(rows, {"latency_s": 1.0})
    assert allocate(rows, {"latency_s": 1.0}, minimize="weight_error").value > 0
    with pytest.raises(lq.InputError, match="none of 16 rows can be used: 16 failed"):
        allocate(
            [row | {"status": "failed"} for row in rows],
            {"latency_s": 1.0},
            minimize="weight_error",
        )
    with pytest.raises(lq.InputError, match="there are no rows"):
        allocate([], {"latency_s": 1.0})
    with pytest.raises(lq.InputError, match="needs a layer"):
        allocate([{"split": "W4A4"}], {"latency_s": 1.0})


def test_rows_whose_output_is_not_finite_are_never_chosen_and_said_to_be_left_out(make_rows):
    rows = make_rows(0)
    best = allocate(rows, {"latency_s": math.inf}, minimize="output_error")
    first = next(i for i, row in enumerate(rows) if row == best.rows[0])
    rows[first] = rows[first] | {"status": "overflow", "output_error": math.inf}
    found = allocate(rows, {"latency_s": math.inf}, minimize="output_error")
    assert best.value < found.value < math.inf
    assert all(row["status"] == "ok" for row in found.rows)
    said = "not chosen from, for an output that is not finite: 1 row, such as"
    assert any(said in note for note in found.problem.notes)
    rows = [row | {"status": "overflow", "output_error": math.inf} for row in rows]
    with pytest.raises(lq.InputError, match="0 failed, the output of .* is not finite"):
        allocate(rows, {"latency_s": math.inf}, minimize="output_error")
