import pytest

from loraq_sim.errors import InputError, StoreError
from loraq_sim.results.merge import merge_stores
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.plan import parse_shard, take_shard


@pytest.fixture
def sweep(make_dump, make_plan):
    return compose(make_plan(make_dump(**dict.fromkeys("abcde", "linear"))))


def run(sweep, path, fake):
    with ResultStore.open(path, create=True) as store:
        run_sweep(sweep, store, jobs=0, evaluate=fake)
    return path


def rows(path):
    with ResultStore.open(path) as store:
        return store.rows()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_are_disjoint_and_together_the_whole(sweep, count):
    parts = [take_shard(sweep, (index, count)) for index in range(1, count + 1)]
    assert sorted(case for part in parts for case in part.case_ids) == sorted(sweep.case_ids)
    assert all(part.whole.case_ids == sweep.case_ids for part in parts)
    assert max(len(part.tasks) for part in parts) - min(len(part.tasks) for part in parts) <= 1


def test_shards_do_not_depend_on_the_order_of_the_dump(sweep):
    from dataclasses import replace

    turned = replace(sweep, tasks=sweep.tasks[::-1])
    for index in (1, 2):
        one, other = (take_shard(s, (index, 2)).layers for s in (sweep, turned))
        assert set(one) == set(other)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "-1/2", "1/2/3"])
def test_a_bad_shard_is_refused(text):
    with pytest.raises(InputError, match="i/n with i from 1 to n"):
        parse_shard(text)


def test_more_shards_than_layers_are_refused(sweep):
    with pytest.raises(InputError, match="only 5 layers are to share out"):
        take_shard(sweep, (1, 6))


@pytest.mark.parametrize("count", [2, 5])
def test_shards_merged_equal_one_run_row_for_row(sweep, tmp_path, fake, count):
    whole = rows(run(sweep, tmp_path / "whole.sqlite", fake))
    parts = [
        run(take_shard(sweep, (index, count)), tmp_path / f"{index}.sqlite", fake)
        for index in range(1, count + 1)
    ]
    assert merge_stores(tmp_path / "merged.sqlite", parts[::-1]) == len(whole)
    assert rows(tmp_path / "merged.sqlite") == whole
    with ResultStore.open(tmp_path / "merged.sqlite") as store:
        (facts,) = store.provenance()
    assert {part["shard"] for part in facts["merged"]} == {
        f"{i}/{count}" for i in range(1, count + 1)
    }


def test_shards_that_saw_the_dump_at_different_paths_are_one_sweep(
    make_dump, make_plan, tmp_path, fake
):
    dump = make_dump(a="linear", b="linear")
    elsewhere = tmp_path / "elsewhere" / dump.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(dump.read_bytes())
    parts = [
        run(take_shard(compose(make_plan(path)), (index, 2)), tmp_path / f"{index}.sqlite", fake)
        for index, path in ((1, dump), (2, elsewhere))
    ]
    assert merge_stores(tmp_path / "merged.sqlite", parts) == 6
    with ResultStore.open(tmp_path / "merged.sqlite") as store:
        (facts,) = store.provenance()
    assert [part["shard"] for part in facts["merged"]] == ["1/2", "2/2"]


def test_a_merged_store_is_continued_by_the_whole_sweep(sweep, tmp_path, fake):
    part = run(take_shard(sweep, (1, 2)), tmp_path / "1.sqlite", fake)
    merge_stores(tmp_path / "merged.sqlite", [part])
    with ResultStore.open(tmp_path / "merged.sqlite", create=True) as store:
        outcome = run_sweep(sweep, store, jobs=0, evaluate=fake)
        assert (outcome.n_ok, outcome.n_skipped) == (6, 9)
        assert [row["case_id"] for row in store.rows()] == list(sweep.case_ids)


def test_rows_that_differ_are_named_and_nothing_is_written(sweep, tmp_path, fake):
    one = run(sweep, tmp_path / "1.sqlite", fake)
    other = run(sweep, tmp_path / "2.sqlite", fake)
    with ResultStore.open(other, create=True) as store:
        for row in store.rows():
            case = row.pop("case_id")
            if row["layer"] == "a":
                store.add(case, row | {"seconds": 99})
            elif (row["layer"], row["split"]) == ("b", "W4A8"):
                store.add(case, row | {"output_error": 0.5})
    expected = r"the rows of 1 case differ: layer 'b', split W4A8: output_error is 0.25 and 0.5"
    with pytest.raises(StoreError, match=expected):
        merge_stores(tmp_path / "merged.sqlite", [one, other])
    assert not (tmp_path / "merged.sqlite").exists()


def test_a_finished_row_goes_before_a_failed_one(sweep, tmp_path, fake):
    one = run(sweep, tmp_path / "1.sqlite", fake)
    other = run(sweep, tmp_path / "2.sqlite", fake)
    with ResultStore.open(one, create=True) as store:
        for row in store.rows():
            if row["layer"] == "b":
                store.add(row.pop("case_id"), row | {"status": "failed", "output_error": None})
    for index, sources in enumerate([(one, other), (other, one)]):
        merge_stores(tmp_path / f"merged{index}.sqlite", sources)
        assert rows(tmp_path / f"merged{index}.sqlite") == rows(other)


def test_sweeps_of_other_plans_stand_side_by_side(make_dump, make_plan, tmp_path, fake):
    dump = make_dump(a="linear")
    stores = [
        run(compose(make_plan(dump, seed=seed)), tmp_path / f"{seed}.sqlite", fake)
        for seed in (0, 1)
    ]
    assert merge_stores(tmp_path / "merged.sqlite", stores) == 6
    assert [row["seed"] for row in rows(tmp_path / "merged.sqlite")] == [0, 0, 0, 1, 1, 1]
