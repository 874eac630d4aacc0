"""The front of allocations, and what they save against one split everywhere."""

import itertools

import pytest

from loraq_sim.allocation.frontier import (
    allocation_recipe,
    compare_with_uniform,
    frontier_rows,
    spread,
)
from loraq_sim.allocation.model import allocate
from loraq_sim.recipe import read_recipe, write_recipe
from loraq_sim.results.totals import model_totals


@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_monotone_and_no_exact_allocation_beats_it(make_rows, seed):
    rows = make_rows(seed, n_layers=6)
    problem = allocate(rows, {"latency_s": 1.0}).problem
    front = frontier_rows(problem, "latency_s", "output_error")
    for before, after in itertools.pairwise(front):
        assert before["latency_s"] < after["latency_s"]
        assert before["output_error"] > after["output_error"]
    assert front[0]["latency_s"] == pytest.approx(problem.least("latency_s"), rel=1e-12)
    assert front[-1]["output_error"] == pytest.approx(problem.least("output_error"), rel=1e-12)
    for point in front:
        exact = allocate(rows, {"latency_s": point["latency_s"]})
        # The exact solver proves to 1e-10 of the range of squared errors.
        assert exact.value == pytest.approx(point["output_error"], rel=1e-8)
    assert sum(int(part.split()[0]) for part in front[2]["mix"].split(", ")) == 6


@pytest.mark.parametrize("method", ["exact", "lagrangian"])
def test_no_uniform_split_beats_the_mixed_allocation(make_rows, method):
    rows = make_rows(3, n_layers=6)
    found = allocate(rows, {"latency_s": 0.006}, method=method)
    compared = compare_with_uniform(found)
    totals = {row["split"]: row for row in model_totals(rows)}
    assert {row["split"] for row in compared} == totals.keys()
    for row in compared:
        total = totals[row["split"]]
        assert row["latency_s"] == pytest.approx(total["latency_s"], rel=1e-12)
        assert row["output_error"] == pytest.approx(total["output_error"], rel=1e-12)
        assert row["error_ratio"] <= 1
        assert row["cost_ratio"] <= 1
        assert row["error_ratio"] == row["mixed_output_error"] / row["output_error"]
        assert row["in_budget"] == (total["latency_s"] <= 0.006)
    # With four random options a layer, mixing pays.
    assert min(row["error_ratio"] for row in compared) < 0.9


def test_the_front_of_many_layers_comes_close_to_a_search_for_each_split(make_rows):
    rows = make_rows(4, n_layers=150)
    found = allocate(rows, {"latency_s": 1.0}, method="lagrangian")
    searched = {row["split"]: row for row in compare_with_uniform(found)}
    for row in compare_with_uniform(found, on_front=True):
        own = searched[row["split"]]
        for ratio, limit in (("error_ratio", "latency_s"), ("cost_ratio", "output_error")):
            assert own[ratio] * (1 - 1e-9) <= row[ratio] <= min(1.0, own[ratio] * 1.02), limit
    front = frontier_rows(found.problem, "latency_s", "output_error")
    some = frontier_rows(found.problem, "latency_s", "output_error", most=20)
    assert 10 < len(some) <= 20
    assert [row for row in front if row in some] == some


def test_a_split_that_one_layer_lacks_is_no_uniform_split(make_rows):
    rows = [r for r in make_rows() if (r["layer"], r["split"]) != ("layer2", "W8A8")]
    compared = compare_with_uniform(allocate(rows, {"latency_s": 1.0}))
    assert {row["split"] for row in compared} == {"W4A4", "W4A8", "W4A4+W8A8r8"}


def test_spread_keeps_both_ends_and_the_order():
    rows = [{"c": float(c), "e": 1.0 / (1 + c)} for c in range(50)]
    some = spread(rows, "c", "e", 7)
    assert some[0] == rows[0]
    assert some[-1] == rows[-1]
    assert len(some) <= 7
    assert some == sorted(some, key=lambda row: row["c"])
    assert spread(rows[:3], "c", "e", 7) == rows[:3]


def test_the_recipe_gives_each_layer_what_was_chosen(make_rows, tmp_path):
    rows = make_rows(5, n_layers=6)
    for index, row in enumerate(rows):
        row["layer"] = f"b[{row['layer'][-1]}].q*"
        row["seed"] = index % 2
        row["family"] = "mxint" if index % 5 == 0 else "int"
        row["group_size"] = 32 if "3" in row["layer"] else 64
    found = allocate(rows, {"latency_s": 0.006})
    recipe = allocation_recipe(found, {"dump_digest": "abc"})
    again = read_recipe(write_recipe(tmp_path / "r.toml", recipe))
    assert again == recipe
    assert again.provenance["model"] == "d.pt"
    assert again.provenance["dump_digest"] == "abc"
    for row in found.rows:
        settings = again.settings(row["layer"])
        split = again.split(row["layer"])
        named = row["split"], row["family"]
        assert (split.text, split.family, split.group) == (*named, row["group_size"])
        if split.has_branch:
            assert (settings["method"], settings["seed"]) == (row["method"], row["seed"])
    assert again.settings("b0.q") is None


def test_what_most_layers_share_stands_once_in_a_recipe(make_rows):
    rows = make_rows(5, n_layers=6)
    for row in rows:
        row["family"] = "mxint" if row["layer"] == "layer4" else "int"
    recipe = allocation_recipe(allocate(rows, {"latency_s": 0.006}))
    assert recipe.defaults.model_dump(exclude_none=True)["family"] == "int"
    own = {name: entry.model_dump(exclude_none=True) for name, entry in recipe.layers.items()}
    assert {name: entry.get("family") for name, entry in own.items() if "family" in entry} == {
        "layer4": "mxint"
    }
