"""A store that does not hold all that was planned says so, with names, at every door."""

import json
import re
import sqlite3

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.cli.schema import json_schema
from loraq_sim.results.merge import merge_stores
from loraq_sim.results.planned import missing_cases, planned_text
from loraq_sim.results.rows import IDENTITY
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.plan import take_shard

LAYERS = dict.fromkeys("abc", "linear")
SPLITS = ["W4A4", "W4A8", "W8A8"]


def run(sweep, path, fake, stop_after=None):
    def pressed(event):
        if event.kind == "case" and event.done == stop_after:
            raise KeyboardInterrupt

    with ResultStore.open(path, create=True) as store:
        return run_sweep(sweep, store, jobs=0, evaluate=fake, on_event=pressed)


def missing_of(path):
    with ResultStore.open(path) as store:
        return [(case.get("layer"), case.get("split")) for case in store.missing()]


def asked_for(sweep):
    return [(case.labels["layer"], case.labels["split"]) for case in sweep.cases]


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_ctrl_c_leaves_a_store_that_names_what_it_lacks(make_dump, make_plan, tmp_path, fake):
    sweep = compose(make_plan(make_dump(**LAYERS)))
    path = tmp_path / "results.sqlite"
    assert run(sweep, path, fake, stop_after=4).interrupted
    with ResultStore.open(path) as store:
        done = {(row["layer"], row["split"]) for row in store.rows()}
        left = store.missing()
    assert len(done) == 4
    assert [case for case in asked_for(sweep) if case not in done] == missing_of(path)
    # What tells rows apart is that of the rows which come later.
    run(sweep, path, fake)
    with ResultStore.open(path) as store:
        assert store.missing() == []
        rows = {(row["layer"], row["split"]): row for row in store.rows()}
    for case in left:
        assert list(case) == list(IDENTITY)
        for name in ("layer", "split", "method", "accelerator", "seed"):
            assert rows[case["layer"], case["split"]][name] == case[name]


def test_a_failed_case_is_not_a_missing_one(make_dump, make_plan, tmp_path, fake):
    sweep = compose(make_plan(make_dump(a="linear", b="refuses", c="linear")))
    path = tmp_path / "results.sqlite"
    assert run(sweep, path, fake).n_failed == 1
    assert missing_of(path) == []
    study = lq.open_study(path)
    assert (study.partial, study.n_missing) == ("", 0)
    assert ", 1 failed" in repr(study)


@pytest.mark.parametrize("count", [2, 3])
def test_a_shard_that_nobody_ran_is_missing(make_dump, make_plan, tmp_path, fake, count):
    sweep = compose(make_plan(make_dump(**LAYERS)))
    shards = [take_shard(sweep, (index, count)) for index in range(1, count + 1)]
    paths = [tmp_path / f"{index}.sqlite" for index in range(count)]
    for shard, path in zip(shards[1:], paths[1:], strict=True):
        run(shard, path, fake)
        others = [case for case in asked_for(sweep) if case not in asked_for(shard)]
        assert missing_of(path) == others
    merge_stores(tmp_path / "part.sqlite", paths[1:])
    assert missing_of(tmp_path / "part.sqlite") == asked_for(shards[0])
    run(shards[0], paths[0], fake)
    merge_stores(tmp_path / "whole.sqlite", paths)
    assert missing_of(tmp_path / "whole.sqlite") == []
    # One after the other into one store is the same.
    n_left = 9
    for shard in shards:
        run(shard, tmp_path / "one.sqlite", fake)
        n_left -= len(shard.cases)
        assert len(missing_of(tmp_path / "one.sqlite")) == n_left


def test_part_of_a_plan_does_not_make_the_rest_forgotten(make_dump, make_plan, tmp_path, fake):
    dump, path = make_dump(**LAYERS), tmp_path / "results.sqlite"
    run(compose(make_plan(dump)), path, fake, stop_after=1)
    run(compose(make_plan(dump, layers=("b",))), path, fake)
    left = missing_of(path)
    assert len(left) == 9 - 1 - 3
    assert {layer for layer, _ in left} == {"a", "c"}


def test_cases_planned_again_under_another_name_count_once(make_dump, make_plan, tmp_path, fake):
    dump, path = make_dump(**LAYERS), tmp_path / "results.sqlite"
    run(compose(make_plan(dump)), path, fake, stop_after=1)
    # Another release, or a changed file, gives the same cases other names.
    with sqlite3.connect(path) as connection:
        for table in ("rows", "planned"):
            connection.execute(f"UPDATE {table} SET case_id = 'old' || case_id")
        connection.execute("UPDATE rows SET checksum = ''")
    assert len(missing_of(path)) == 8
    with ResultStore.open(path, create=True) as store:
        store.set_pareto([])
    run(compose(make_plan(dump)), path, fake, stop_after=2)
    assert len(missing_of(path)) == 7
    run(compose(make_plan(dump)), path, fake)
    assert missing_of(path) == []


def older(path, version=11):
    """Make of a store one of a release that did not write down what its cases are."""
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE runs DROP COLUMN plan")
        connection.execute(f"PRAGMA user_version = {version}")


def test_a_store_of_an_older_release_knows_the_number_alone(make_dump, make_plan, tmp_path, fake):
    dump, path = make_dump(**LAYERS), tmp_path / "results.sqlite"
    run(compose(make_plan(dump)), path, fake, stop_after=4)
    older(path)
    study = lq.open_study(path)
    assert (study.n_missing, study.missing) == (5, [])
    assert "5 of 9 planned cases have no result yet. They may change" in study.verdict().partial
    shown = json.loads(command("pareto", path, "--format", "json").stdout)
    assert (shown["unfinished"]["missing"], shown["unfinished"]["cases"]) == (5, [])
    # A later sweep of something else: of the earlier one nobody can say what it lacks.
    run(compose(make_plan(dump, splits=("W4A4",))), path, fake)
    assert missing_of(path) == []
    assert command("pareto", path, "--format", "csv").stderr == ""


def test_no_plan_no_word(tmp_path):
    with ResultStore.open(tmp_path / "results.sqlite", create=True) as store:
        store.begin_run({})
        store.add("x", {"layer": "a", "split": "W4A4", "accelerator": "aie2", "status": "ok"})
    study = lq.open_study(tmp_path / "results.sqlite")
    assert (study.n_missing, study.partial, study.verdict().partial) == (0, "", "")


@pytest.fixture
def partial(make_dump, make_plan, tmp_path, fake):
    """Folder of a store of 9 cases of which 2 are missing, both of layer c."""
    run(compose(make_plan(make_dump(**LAYERS))), tmp_path / "results.sqlite", fake, stop_after=7)
    return tmp_path


SAID = "Partial: 2 of 9 planned cases have no result yet: W4A8 and W8A8 in c."


def test_every_door_says_that_a_store_is_partial(partial):
    for words in (
        ("pareto", partial),
        ("pareto", partial, "--format", "md"),
        ("report", partial, "--page-only", "--force"),
        ("compare", partial, partial),
        ("compare", partial, partial, "--format", "md"),
    ):
        done = command(*words)
        assert done.exit_code == 0, done.output
        assert SAID in done.stdout, words
    for words in (
        ("pareto", partial, "--by", "kind", "--quiet"),
        ("pareto", partial, "--format", "csv"),
        ("compare", partial, partial, "--format", "csv"),
        ("allocate", partial, "--budget", "latency_s=100", "--quiet"),
        ("export", partial, "--to", "csv"),
        ("export", partial, "--to", "trials", "--by", "model"),
        ("merge", partial / "merged", partial),
    ):
        done = command(*words)
        assert done.exit_code == 0, done.output
        assert SAID in done.stderr, words
    assert SAID in (partial / "report.html").read_text("utf-8")
    compared = command("report", partial, "--against", partial, "--out", partial / "c.md")
    assert SAID in compared.stdout
    text = (partial / "c.md").read_text("utf-8")
    assert f"\n- {SAID}" in text
    assert f"Before: Build W4A4 on aie2. {SAID}" in text
    out = command("allocate", partial, "--budget", "latency_s=100", "--out", partial / "mixed")
    assert out.exit_code == 0
    assert SAID in (partial / "mixed" / "recipe.toml").read_text("utf-8")


@pytest.mark.parametrize(
    "words", [("pareto",), ("pareto", "--by", "layer"), ("allocate", "--budget", "latency_s=100")]
)
def test_programs_read_what_is_missing(partial, words):
    done = command(words[0], partial, *words[1:], "--format", "json")
    shown = json.loads(done.stdout)
    told = shown["unfinished"]
    assert (told["planned"], told["missing"]) == (9, 2)
    assert [(c["layer"], c["split"]) for c in told["cases"]] == [("c", "W4A8"), ("c", "W8A8")]
    assert told["text"].startswith(SAID)
    # Rows of the stand-in have columns of their own.
    without = shown | {name: [] for name in ("rows", "allocations") if name in shown}
    Draft202012Validator(json_schema(words[0])).validate(without)
    both = json.loads(command("compare", partial, partial, "--format", "json").stdout)
    assert both["unfinished"] == {"before": told, "after": told}
    Draft202012Validator(json_schema("compare")).validate(both)


def test_an_opened_study_says_what_is_missing_wherever_it_has_numbers(partial):
    study = lq.open_study(partial)
    assert [(case["layer"], case["split"]) for case in study.missing] == [
        ("c", "W4A8"),
        ("c", "W8A8"),
    ]
    verdict = study.verdict()
    assert study.partial.startswith(SAID)
    assert verdict.sentences[0] == verdict.partial == study.partial
    assert verdict.as_dict()["partial"] == study.partial
    assert verdict.on["aie2"].partial == study.partial
    assert SAID in repr(study)
    assert SAID in study._repr_html_()
    assert study.recipe().provenance["partial"] == study.partial
    with pytest.raises(lq.InputError, match="W8A8 in c is planned and has no result yet"):
        study.explain("c", "W8A8")
    for total in study.totals:
        assert total["n_missing"] == (0 if total["split"] == "W4A4" else 1)


@pytest.mark.pictures
def test_pictures_say_that_a_store_is_partial(partial):
    study = lq.open_study(partial)
    for figure in (study.plot_front(), study.plot_layers()):
        texts = [text.get_text() for text in figure.texts]
        assert "Partial: 2 of 9 planned cases have no result yet" in texts
    whole = command("report", partial, "--force")
    assert whole.exit_code == 0, whole.output
    for name in ("pareto_aie2", "layers_aie2"):
        assert "Partial: 2 of 9" in (partial / "report_files" / f"{name}.svg").read_text("utf-8")
    assert SAID in (partial / "report_files" / "summary.md").read_text("utf-8")


def test_each_accelerator_says_what_it_lacks(make_dump, make_plan, tmp_path, fake):
    plan = make_plan(make_dump(a="linear", b="linear"), accelerators=("aie2", "a100"))
    path = tmp_path / "results.sqlite"
    run(compose(plan), path, fake, stop_after=11)
    verdict = lq.open_study(path).verdict()
    assert verdict.partial.startswith("Partial: 1 of 12 planned cases")
    assert verdict.on["aie2"].partial == ""
    assert verdict.on["a100"].partial.startswith("Partial: 1 of 6 planned cases")
    done = command("report", tmp_path, "--out", tmp_path / "r.md")
    assert done.stdout.count("Partial: 1 of 12") == 1
    assert "a100: Partial: 1 of 6" in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        ('{"settings":[],"layers":[[["a"],[0]]]}', "a place without settings"),
        ('{"settings":[{"split":{}}],"layers":[]}', "no plain value"),
        ('{"settings":[3],"layers":[]}', "no JSON object"),
        ('{"settings":[{}],"layers":[[[1],[0]]]}', "a layer that is no text"),
        ('{"settings":[{}]}', "no settings or no layers"),
        ('{"settings":[{}],"layers":[["a"]]}', "not enough values"),
        ("[" * 100_000, "nested too deeply|recursion"),
    ],
)  # fmt: skip
def test_a_plan_that_no_release_wrote_is_refused(make_dump, make_plan, tmp_path, fake, text, said):
    path = tmp_path / "results.sqlite"
    run(compose(make_plan(make_dump(a="linear"))), path, fake, stop_after=1)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE runs SET plan = ?", [text])
    done = command("pareto", path)
    assert done.exit_code == 2
    assert "is damaged (a record cannot be read" in done.stderr
    assert re.search(said, done.stderr)


def test_plans_of_many_layers_stay_small():
    labels = [
        {"layer": f"block.{n}", "split": split, "accelerator": "aie2", "seed": 0}
        for n in range(300)
        for split in map(str, range(100))
    ]
    # Overrides give a layer other cases, as many as the one before has.
    labels += [case | {"layer": "last", "seed": 1} for case in labels[:100]]
    text = planned_text(labels)
    assert len(text) < 20_000
    places = [(1, place) for place in range(len(labels))]
    some = [*places[::997], *places[-3:]]
    found = missing_cases(some, places, {1: text})
    names = ("layer", "split", "seed", "accelerator")
    assert [[case[name] for name in names] for case in found] == [
        [labels[place][name] for name in names] for _, place in some
    ]
