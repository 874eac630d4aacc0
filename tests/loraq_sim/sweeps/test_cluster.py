"""Sweeps on real Dask workers in processes of their own, some of which are killed."""

import json
import logging
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.dumps import write_layer_dump
from loraq_sim.errors import InputError, LoraqError
from loraq_sim.layers import Layer
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import cluster as cluster_module
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.cluster import ClusterExecutor
from loraq_sim.sweeps.local import WorkerLost
from loraq_sim.sweeps.worker import CaseResult

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes with nannies that start a new one for each that dies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        # A worker that dies twice within this time is not started again.
        settings = {"distributed.deploy.lost-worker-timeout": "1h"}
        with (
            dask.config.set(settings),
            distributed.LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                dashboard_address=":0",
                silence_logs=logging.CRITICAL,
            ) as started,
        ):
            yield started


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as connected:
        yield connected


def run(client, sweep, fake, **options):
    found = list(ClusterExecutor(client, **options).run(sweep.tasks, fake))
    results = {(r.row["layer"], r.row["split"]): r for r in found if isinstance(r, CaseResult)}
    assert len(results) == sum(isinstance(r, CaseResult) for r in found), "a case came twice"
    return results, [r.message for r in found if isinstance(r, WorkerLost)]


def statuses(results):
    return {key: result.row["status"] for key, result in results.items()}


def test_rows_equal_those_of_a_local_run(client, tmp_path, make_plan, monkeypatch):
    rng = np.random.default_rng(0)
    layers = [
        Layer(
            name=name,
            weight=rng.normal(size=(48, 64)).astype(np.float32),
            activations=rng.normal(size=(32, 64)).astype(np.float32),
            kind="linear",
        )
        for name in "abc"
    ]
    write_layer_dump(tmp_path / "dump.safetensors", layers)
    # A worker runs in a folder of its own.
    monkeypatch.chdir(tmp_path)
    sweep = compose(make_plan("dump.safetensors", splits=("W4A4", "W4A4+W8A8r8"), preset="fast"))
    tables = {}
    for name, executor in (("local", None), ("cluster", ClusterExecutor(client))):
        with ResultStore.open(tmp_path / f"{name}.sqlite", create=True) as store:
            outcome = run_sweep(sweep, store, jobs=1, executor=executor)
            assert (outcome.n_ok, outcome.n_failed) == (6, 0)
            tables[name] = [row | {"seconds": 0} for row in store.rows()]
    assert tables["cluster"] == tables["local"]


def test_a_killed_worker_is_survived(client, make_dump, make_plan, fake, tmp_path):
    dump = make_dump(marker=tmp_path / "killed", a="kills_once", b="linear", c="linear")
    results, lost = run(client, compose(make_plan(dump)), fake)
    assert set(statuses(results).values()) == {"ok"}
    assert len(results) == 9
    assert lost == ["a worker was lost (its process or machine died); trying again"]
    # What the first worker had reported was kept, the rest was done by another.
    assert results["a", "W4A4"].row["pid"] != results["a", "W4A8"].row["pid"]


def test_a_case_that_ends_two_workers_is_failed_and_the_rest_goes_on(
    client, make_dump, make_plan, fake
):
    results, lost = run(client, compose(make_plan(make_dump(a="kills_always", b="linear"))), fake)
    assert [key for key, status in statuses(results).items() if status == "failed"] == [
        ("a", "W4A8")
    ]
    assert len(results) == 6
    message = results["a", "W4A8"].row["message"]
    assert message.startswith("this case ended 2 worker processes: the last one was lost")
    assert len(lost) == 2


def test_a_worker_killed_from_outside_mid_run_loses_nothing(client, make_dump, make_plan, fake):
    sweep = compose(make_plan(make_dump(**dict.fromkeys("abcdefgh", "steady"))))
    results, killed = {}, None
    for result in ClusterExecutor(client).run(sweep.tasks, fake):
        if isinstance(result, CaseResult):
            results[result.case.case_id] = result.row
            if killed is None and len(results) == 4:
                killed = result.row["pid"]
                os.kill(killed, signal.SIGKILL)
    assert set(results) == set(sweep.case_ids)
    assert {row["status"] for row in results.values()} == {"ok"}
    assert {row["threads"] for row in results.values()} == {"1"}


def test_ctrl_c_keeps_what_is_there_and_takes_the_futures_back(
    client, make_dump, make_plan, fake, store
):
    sweep = compose(make_plan(make_dump(**dict.fromkeys("abcdef", "steady"))))

    def interrupt(event):
        if event.kind == "case" and event.done == 3:
            raise KeyboardInterrupt

    outcome = run_sweep(
        *(sweep, store), jobs=2, evaluate=fake, executor=ClusterExecutor(client), on_event=interrupt
    )
    assert outcome.interrupted
    assert len(store.done(sweep.case_ids)) == 3
    for _ in range(100):
        if not client.who_has() and not any(client.processing().values()):
            break
        threading.Event().wait(0.1)
    else:
        pytest.fail("workers still hold tasks")
    rest = run_sweep(sweep, store, jobs=2, evaluate=fake, executor=ClusterExecutor(client))
    assert (rest.n_ok, rest.n_skipped) == (15, 3)


def test_at_most_so_many_workers_are_used(client, make_dump, make_plan, fake):
    sweep = compose(make_plan(make_dump(**dict.fromkeys("abcd", "steady"))))
    results, _ = run(client, sweep, fake, max_workers=1)
    assert len({result.row["pid"] for result in results.values()}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "0" * 64}, "has other code of loraq-sim; install the same release"),
        ({"versions": {"numpy": "1.0"}}, r"has numpy \d+\.\d+\S*, here it is 1\.0"),
        ({"dumps": {"nowhere/dump.pt": 1}}, "cannot see the dump nowhere/dump.pt"),
        ({"accelerators": {"aie2": "0" * 64}}, "has another description of the accelerator aie2"),
        ({"accelerators": {"n/x.yaml": ""}}, "cannot use the accelerator n/x.yaml"),
    ],
)
def test_a_worker_that_would_compute_something_else_is_refused(
    client, make_dump, make_plan, fake, monkeypatch, changes, message
):
    asked = cluster_module.requirements
    monkeypatch.setattr(cluster_module, "requirements", lambda t: replace(asked(t), **changes))
    found = []

    def follow(results):
        for result in results:
            found.append(result.message)

    results = ClusterExecutor(client).run(compose(make_plan(make_dump(a="linear"))).tasks, fake)
    with pytest.raises(LoraqError, match=r"none of the \d workers of tcp://\S+ can be used"):
        follow(results)
    assert found
    assert all(re.search(rf"worker tcp://\S+ is not used: it {message}", text) for text in found)


def test_an_evaluation_that_cannot_be_imported_is_an_error(client, make_dump, make_plan):
    tasks = compose(make_plan(make_dump(a="linear"))).tasks
    with pytest.raises(InputError, match="cannot load the evaluation 'no_such_module:f'"):
        list(ClusterExecutor(client).run(tasks, "no_such_module:f"))


def test_the_command_line_runs_on_a_scheduler(cluster, tmp_path):
    words = ("sweep", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt", "--quiet")
    words += ("--layers", "*.0.attn1.to_q", "--tokens", "8", "--split", "W4A4", "--format", "json")
    place = ("--scheduler", cluster.scheduler_address, "--no-solution-cache")
    rows = {}
    for name, how in (("local", ("--jobs", "1")), ("cluster", place)):
        result = CliRunner().invoke(app, [*words, *how, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        rows[name] = [row | {"seconds": 0} for row in report["rows"]]
    assert rows["cluster"] == rows["local"]
    assert report["provenance"]["scheduler"] == cluster.scheduler_address
