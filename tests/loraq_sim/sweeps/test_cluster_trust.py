"""What a scheduler may do to whoever connects to it: give data, be silent, but run nothing."""

import asyncio
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.errors import InputError, LoraqError
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.cluster_worker import Report, read_report, report_text
from loraq_sim.sweeps.plan_file import read_plan_values, set_values
from loraq_sim.sweeps.scheduler import check_scheduler, connected
from loraq_sim.sweeps.worker import CaseResult

distributed = pytest.importorskip("distributed")

from distributed.protocol import dumps, to_serialize  # noqa: E402
from distributed.protocol.serialize import ToPickle  # noqa: E402

from loraq_sim.sweeps.scheduler import NOT_LOADED, plain_address, plain_data  # noqa: E402


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def cluster(fake):
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
        protocol="tcp",
    ) as started:
        yield started


def hostile_messages(mark):
    bomb = pickle.dumps(Bomb(mark))
    return [
        {"op": "warn", "category": bomb, "message": bomb},
        {"op": "task-erred", "key": "k", "exception": bomb, "traceback": bomb},
        {"op": "key-in-memory", "key": "k", "type": bomb},
        {"op": "event", "topic": "t", "event": (0.0, ToPickle(1))},
        {"op": "nonsense", "x": ToPickle(Bomb(mark))},
        {"op": "nonsense", "x": to_serialize(Bomb(mark))},
    ]


@pytest.mark.parametrize("number", range(6))
def test_no_message_of_a_scheduler_is_unpickled(tmp_path, number):
    mark = tmp_path / "ran"
    message = hostile_messages(mark)[number]
    frames = [bytes(frame) for frame in dumps(message)]
    found = plain_data(frames[0])
    assert found["op"] == message["op"]
    assert NOT_LOADED in repr(found)
    assert not mark.exists()


def test_a_hostile_scheduler_runs_nothing_in_the_driver(cluster, tmp_path):
    """The same messages, over a real connection; Dask's own client falls for the first."""
    marks = {}
    address = cluster.scheduler_address
    for name, where in (("dask", address), ("ours", plain_address(address))):
        marks[name] = tmp_path / name
        client = distributed.Client(where, set_as_default=False)
        client.subscribe_topic("t", lambda event: None)
        future = client.submit(sum, [1, 2])
        bomb = pickle.dumps(Bomb(marks[name]))
        messages = [m for m in hostile_messages(marks[name]) if m["op"] != "nonsense"]
        messages[0]["category"] = pickle.dumps(Bomb(marks[name]))
        messages.append({"op": "task-erred", "key": future.key, "exception": bomb})
        messages[-1]["traceback"] = None

        async def send(client_id=client.id, messages=messages):
            for message in messages:
                cluster.scheduler.client_comms[client_id].send(message)
            await asyncio.sleep(0.3)

        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        cluster.sync(send)
        time.sleep(0.3)
        client.close(timeout=2)
    assert marks["dask"].exists(), "the messages are harmless: this test shows nothing"
    assert not marks["ours"].exists()


def test_a_result_that_is_a_pickle_ends_the_sweep_in_one_line(
    cluster, make_dump, make_plan, fake, store, tmp_path
):
    mark = tmp_path / "ran"
    sweep = compose(make_plan(make_dump(**dict.fromkeys("abc", "steady"))))
    with connected(cluster.scheduler_address, {}) as (executor, _):

        def intrude(event):
            if event.kind == "case" and event.done == 2:
                cluster.scheduler.log_event(executor._topic, pickle.dumps(Bomb(mark)))

        outcome = run_sweep(sweep, store, evaluate=fake, executor=executor, on_event=intrude)
    assert "sends what is no report of loraq-sim" in outcome.stopped
    assert outcome.exit_code == 1
    assert outcome.n_left > 0
    assert not mark.exists()
    assert len(store.done(sweep.case_ids)) >= 2


@pytest.mark.parametrize(
    "text",
    [
        b"bytes",
        "[" * 100_000,
        "{}",
        '{"kind": "result", "assignment": 1, "process": "p", "content": {}}',
        '{"kind": "run", "assignment": 1, "process": "p"}',
        '{"kind": "begun", "assignment": "1", "process": "p"}',
        '{"kind": "begun", "assignment": 1, "process": "p", "code": "x"}',
        '{"kind": "ended", "assignment": ' + "9" * 5000 + ', "process": "p"}',
    ],
)
def test_a_text_that_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="report|result"):
        read_report(text)


def test_a_result_no_row_can_hold_is_refused():
    row = {"layer": "a", "split": "W4A4", "status": "ok"}
    good = {"case_id": "c", "row": row, "is_unreadable": False}
    report = Report(kind="result", assignment=1, process="p", content=good)
    assert read_report(report_text(report)) == report
    for change in ({"m": 2**70}, {"layer": 3}, {"status": None}):
        bad = Report(kind="result", assignment=1, process="p", content=good | {"row": row | change})
        with pytest.raises(ValueError, match="a result"):
            read_report(report_text(bad))


def start_cluster(folder):
    code = (
        "import time, logging; from distributed import LocalCluster\n"
        "if __name__ == '__main__':\n"
        "    c = LocalCluster(n_workers=1, threads_per_worker=1, processes=False,\n"
        "        dashboard_address=':0', silence_logs=logging.CRITICAL, protocol='tcp')\n"
        "    print(c.scheduler_address, flush=True)\n"
        "    time.sleep(300)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    return process, process.stdout.readline().strip()


@pytest.fixture
def frozen_later(tmp_path, fake):
    """A cluster in a process of its own, to be stopped by a signal."""
    process, address = start_cluster(tmp_path)
    try:
        yield process, address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_scheduler_that_falls_silent_ends_the_sweep_and_keeps_the_rows(
    frozen_later, make_dump, make_plan, fake, store
):
    process, address = frozen_later
    sweep = compose(make_plan(make_dump(**dict.fromkeys("abcdef", "steady"))))

    def freeze(event):
        if event.kind == "case" and event.done == 3:
            # Not before: on a busy machine a second is nothing.
            executor.answer_s = 1.0
            process.send_signal(signal.SIGSTOP)

    with connected(address, {}) as (executor, jobs):
        started = time.monotonic()
        outcome = run_sweep(
            sweep, store, jobs=jobs, evaluate=fake, executor=executor, on_event=freeze
        )
    assert outcome.stopped.startswith(f"the scheduler at {address} does not answer any more; ")
    assert (outcome.exit_code, outcome.interrupted) == (1, False)
    assert outcome.n_left == 18 - outcome.n_ok
    assert len(store.done(sweep.case_ids)) == outcome.n_ok >= 3
    assert time.monotonic() - started < 60


def test_ctrl_c_ends_a_sweep_on_a_silent_scheduler(
    frozen_later, make_dump, make_plan, fake, store, request
):
    process, address = frozen_later
    # Whatever was imported before: see `scheduler._jobqueue`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    sweep = compose(make_plan(make_dump(a="steady")))
    with connected(address, {}) as (executor, jobs):
        process.send_signal(signal.SIGSTOP)
        threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
        outcome = run_sweep(sweep, store, jobs=jobs, evaluate=fake, executor=executor)
    assert outcome.interrupted


def test_a_lost_scheduler_is_one_line_and_exit_code_1(tmp_path, frozen_later, monkeypatch):
    process, address = frozen_later
    from loraq_sim.sweeps.cluster import ClusterExecutor

    monkeypatch.setitem(ClusterExecutor.__init__.__kwdefaults__, "answer_s", 1.0)
    present = ClusterExecutor._present

    def freeze(self):
        process.send_signal(signal.SIGSTOP)
        return present(self)

    monkeypatch.setattr(ClusterExecutor, "_present", freeze)
    words = ("sweep", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt", "--quiet")
    words += ("--layers", "*.0.attn1.to_q", "--tokens", "8", "--split", "W4A4")
    words += ("--no-solution-cache", "--scheduler", address, "--out", str(tmp_path / "out"))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"error: the scheduler at {address} does not answer any more; ")
    assert result.stderr.endswith("run the same command again (1 case left)\n")
    assert result.stdout == ""
    with ResultStore.open(tmp_path / "out" / "results.sqlite") as store:
        assert "does not answer" in store.provenance()[0]["stopped"]


def test_a_plan_names_no_scheduler(tmp_path):
    plan = tmp_path / "plan.toml"
    for line, flag in (
        ('scheduler = "tcp://evil:8786"', "--scheduler"),
        ("[scheduler_options]\nprologue = 'rm -rf /'", "--scheduler-option"),
    ):
        plan.write_text(f'dump = "a.pt"\nhw = "aie2"\n{line}\n')
        with pytest.raises(InputError, match=f"plan.toml:3: .*command line alone, with {flag}$"):
            read_plan_values(plan)
    with pytest.raises(InputError, match="--set 'scheduler=slurm': .*, with --scheduler$"):
        set_values({}, ["scheduler=slurm"])
    with pytest.raises(InputError, match="with --scheduler-option$"):
        set_values({}, ["scheduler_options.queue=cpu"])


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("tls://n:1", {"tls_ca": "ca.pem"}, "missing: --scheduler-option tls_cert, tls_key"),
        ("tls://n:1", {"tls_car": "ca.pem"}, "unknown --scheduler-option 'tls_car'"),
        ("tcp://n:1", {"tls_ca": "ca.pem"}, "give its address as tls://, not tcp://n:1"),
        ("tls://n:1", {"queue": "cpu"}, "queue is for --scheduler slurm"),
        (
            "tls://n:1",
            {"tls_ca": "no.pem", "tls_cert": "no.pem", "tls_key": "no.pem"},
            "tls_ca: no file 'no.pem'",
        ),
    ],
)
def test_tls_options_that_cannot_be_meant_are_refused(address, options, message):
    with pytest.raises(InputError, match=message):
        check_scheduler(address, options)


@pytest.fixture
def certificates(tmp_path):
    """A certificate that is its own authority, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl makes the certificates of this test")
    return {"tls_ca": str(cert), "tls_cert": str(cert), "tls_key": str(key)}


def test_an_encrypted_scheduler_takes_tasks(certificates, make_dump, make_plan, fake):
    files = {"tls_ca_file": certificates["tls_ca"], "require_encryption": True}
    for role in ("client", "scheduler", "worker"):
        files |= {f"tls_{role}_cert": certificates["tls_cert"]}
        files |= {f"tls_{role}_key": certificates["tls_key"]}
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
        protocol="tls",
        security=distributed.Security(**files),
    ) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        sweep = compose(make_plan(make_dump(a="linear")))
        with connected(address, certificates) as (executor, _):
            found = list(executor.run(sweep.tasks, fake))
        assert [r.row["status"] for r in found if isinstance(r, CaseResult)] == ["ok"] * 3
        # Without certificates there is no way in.
        with pytest.raises(LoraqError, match="no Dask scheduler answers"), connected(address, {}):
            pass
