import json
import os

import numpy as np
import pytest

from loraq_sim.dumps import read_layer_dump, write_layer_dump
from loraq_sim.layers import Layer
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.digests import cache_folder, forget_digests, layer_digests


def layers(*names, scale=1.0):
    for seed, name in enumerate("abc"):
        if name in names:
            weight = np.random.default_rng(seed).normal(size=(8, 16)).astype(np.float32)
            yield Layer(name=name, weight=weight * np.float32(scale))


def names_of(plan):
    return {
        (case.labels["layer"], case.labels["split"]): case.case_id for case in compose(plan).cases
    }


def test_the_digest_is_that_of_the_layer(tmp_path):
    write_layer_dump(tmp_path / "d.npz", layers("a", "b"))
    dump = read_layer_dump(tmp_path / "d.npz")
    for _ in range(2):
        assert layer_digests(dump) == {name: dump[name].digest() for name in dump}


def test_a_second_plan_reads_no_values(tmp_path, monkeypatch):
    write_layer_dump(tmp_path / "d.npz", layers("a", "b"))
    first = layer_digests(read_layer_dump(tmp_path / "d.npz"))
    dump = read_layer_dump(tmp_path / "d.npz")
    monkeypatch.setattr(type(dump), "__getitem__", lambda *_: pytest.fail("reads values"))
    assert layer_digests(dump) == first


def test_a_layer_that_cannot_be_loaded_has_no_digest_and_is_tried_again(tmp_path):
    bad = np.full((8, 16), np.nan, np.float32)
    np.savez(tmp_path / "d.npz", **{"a.weight": bad, "b.weight": np.ones((8, 16), np.float32)})
    digests = layer_digests(read_layer_dump(tmp_path / "d.npz"))
    assert (digests["a"], len(digests["b"])) == ("", 64)


def test_a_configuration_that_changes_beside_the_file_counts(tmp_path):
    # Its rows per call are of the layer, though no byte of the checkpoint changes.
    write_layer_dump(
        tmp_path / "d.npz",
        [Layer(name="blocks.0.ff.net.2", weight=np.eye(8, 16, dtype=np.float32))],
    )
    found = []
    for size in (32, 64):
        facts = {"_class_name": "MyTransformer", "patch_size": 2, "sample_size": size}
        (tmp_path / "config.json").write_text(json.dumps(facts))
        dump = read_layer_dump(tmp_path / "d.npz")
        found.append(layer_digests(dump))
        assert found[-1] == {name: dump[name].digest() for name in dump}
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["renamed.npz", "converted.safetensors", "converted.pt"])
def test_renaming_reordering_and_converting_a_dump_change_no_name(tmp_path, make_plan, name):
    write_layer_dump(tmp_path / "d.npz", layers("a", "b"))
    write_layer_dump(tmp_path / name, reversed(list(layers("a", "b"))))
    assert names_of(make_plan(tmp_path / "d.npz")) == names_of(make_plan(tmp_path / name))
    one, other = (compose(make_plan(tmp_path / file)) for file in ("d.npz", name))
    assert one.dump_digest == other.dump_digest


def test_other_layers_of_the_dump_do_not_count_and_other_values_do(tmp_path, make_plan):
    write_layer_dump(tmp_path / "d.npz", layers("a"))
    alone = names_of(make_plan(tmp_path / "d.npz"))
    write_layer_dump(tmp_path / "d.npz", layers("a", "b"), overwrite=True)
    both = names_of(make_plan(tmp_path / "d.npz"))
    assert alone.items() <= both.items()
    write_layer_dump(tmp_path / "d.npz", layers("a", scale=2.0), overwrite=True)
    assert not set(alone.values()) & set(names_of(make_plan(tmp_path / "d.npz")).values())


def test_a_renamed_dump_is_done_already_and_its_rows_carry_the_new_name(
    tmp_path, make_plan, fake, store
):
    write_layer_dump(tmp_path / "old.npz", layers("a"))
    run_sweep(make_plan(tmp_path / "old.npz"), store, jobs=0, evaluate=fake)
    (tmp_path / "old.npz").rename(tmp_path / "new.npz")
    outcome = run_sweep(make_plan(tmp_path / "new.npz"), store, jobs=0, evaluate=fake)
    assert (outcome.n_ok, outcome.n_skipped) == (0, 3)
    assert {row["dump"] for row in store.rows()} == {"new.npz"}


def test_a_clock_that_jumps_changes_no_name(tmp_path, make_plan):
    write_layer_dump(tmp_path / "d.npz", layers("a"))
    before = names_of(make_plan(tmp_path / "d.npz"))
    for moment in (0, 2**31):
        os.utime(tmp_path / "d.npz", (moment, moment))
        assert names_of(make_plan(tmp_path / "d.npz")) == before


def test_a_dump_that_changes_between_plan_and_work_gives_no_row(tmp_path, make_plan, fake, store):
    path = tmp_path / "d.npz"
    write_layer_dump(path, layers("a", "b"))
    sweep = compose(make_plan(path))
    changed = [*layers("a"), *layers("b", scale=2.0)]
    write_layer_dump(path, changed, overwrite=True)
    outcome = run_sweep(sweep, store, jobs=0, evaluate=fake)
    assert (outcome.n_ok, outcome.n_failed) == (3, 3)
    assert "layer 'b' changed since the sweep was planned" in outcome.first_failure
    assert run_sweep(make_plan(path), store, jobs=0, evaluate=fake).n_ok == 3


def test_planning_works_where_nothing_can_be_written_down(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAQ_SIM_CACHE", str(tmp_path / "file" / "below"))
    write_layer_dump(tmp_path / "d.npz", layers("a"))
    assert len(layer_digests(read_layer_dump(tmp_path / "d.npz"))["a"]) == 64
    forget_digests(read_layer_dump(tmp_path / "d.npz"))


def test_the_cache_is_where_xdg_says_unless_that_is_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.delenv("LORAQ_SIM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "loraq-sim"
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder() == tmp_path / "home" / ".cache" / "loraq-sim"
