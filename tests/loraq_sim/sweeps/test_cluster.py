"""Sweeps on real Dask workers in processes of their own, some of which are killed."""

import json
import os
import re
import signal
import threading
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.errors import LoraqError
from loraq_sim.sweeps import cluster as cluster_module
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.cluster import ClusterExecutor
from loraq_sim.sweeps.local import WorkerLost
from loraq_sim.sweeps.worker import CaseResult

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")


def run(client, sweep, fake, **options):
    found = list(ClusterExecutor(client, **options).run(sweep.tasks, fake))
    results = {(r.row["layer"], r.row["split"]): r for r in found if isinstance(r, CaseResult)}
    assert len(results) == sum(isinstance(r, CaseResult) for r in found), "a case came twice"
    return results, [r.message for r in found if isinstance(r, WorkerLost)]


def statuses(results):
    return {key: result.row["status"] for key, result in results.items()}


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
