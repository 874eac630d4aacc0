"""Schedulers by address and Slurm jobs, with a stand-in for ``sbatch`` that starts them here."""

import importlib.util
import subprocess
import sys

import pytest

from loraq_sim.errors import InputError, LoraqError
from loraq_sim.sweeps import compose, scheduler
from loraq_sim.sweeps.scheduler import check_scheduler, connected, slurm_job_script

if importlib.util.find_spec("dask_jobqueue") is None:
    pytest.skip("needs dask_jobqueue", allow_module_level=True)

SBATCH = """#!/bin/sh
cp "$1" "{folder}/job.sh"  # the original is removed as soon as this returns
setsid sh "{folder}/job.sh" > "{folder}/log" 2>&1 &
echo "$!" > "{folder}/leader"
echo "Submitted batch job 1"
"""
# dask-jobqueue asks to cancel on leaving; the jobs are ours to end.
SCANCEL = """#!/bin/sh
touch "{folder}/cancelled"
kill -TERM -- "-$(cat "{folder}/leader")"
"""


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "node:8786",
            {},
            r"--scheduler must be slurm or tcp://host:port or tls://host:port, got 'node:8786'",
        ),
        ("tcp://node", {}, "must be slurm or tcp://host:port"),
        ("tcp://node:0", {}, "must be slurm or tcp://host:port"),
        ("tcp://node:70000", {}, "must be slurm or tcp://host:port"),
        ("pbs", {}, "must be slurm or tcp://host:port"),
        ("tcp://node:8786", {"cores": 2}, "--scheduler-option cores is for --scheduler slurm"),
        ("slurm", {"core": 2}, "unknown --scheduler-option 'core'; did you mean 'cores'"),
        ("slurm", {"cores": "many"}, "cores must be a whole number from 1, got 'many'"),
        ("slurm", {"cores": 0}, "cores must be a whole number from 1, got '0'"),
        ("slurm", {"queue": "a\nrm"}, "queue must be one line"),
        ("slurm", {"queue": " "}, "queue must be one line"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, options, message):
    with pytest.raises(InputError, match=message):
        check_scheduler(text, options)


@pytest.mark.parametrize("address", ["tcp://node-1.lan:8786", "tls://10.0.0.1:1", "tcp://[::1]:80"])
def test_addresses_of_schedulers_are_accepted(address):
    assert check_scheduler(address, {}) is None


def test_silence_at_the_address_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(scheduler, "_CONNECT_S", 0.3)
    with (
        pytest.raises(LoraqError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 "),
        connected("tcp://127.0.0.1:1", {}),
    ):
        pass


@pytest.mark.parametrize(("text", "module"), [("tcp://n:1", "distributed"), ("slurm", "dask-job")])
def test_the_missing_extra_is_named(monkeypatch, text, module):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "dist" in name else name)
    if text == "slurm":
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if "dask_" in name else name
        )
    with (
        pytest.raises(InputError, match=rf"needs {module}.*pip install 'loraq-sim\[cluster\]'"),
        connected(text, {}),
    ):
        pass


def test_the_job_script_starts_one_process_per_cpu_on_one_thread():
    options = {"cores": 8, "queue": "cpu", "account": "chips", "walltime": "08:00:00"}
    options |= {"prologue": "module load python; cd /scratch", "directives": "--nice; --exclusive"}
    lines = slurm_job_script(options, worker_bytes=3 * 2**30).splitlines()
    for line in ("-p cpu", "-A chips", "--cpus-per-task=8", "--mem=48G", "-t 08:00:00", "--nice"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --exclusive" in lines
    assert lines.index("export OMP_NUM_THREADS=1") < lines.index("module load python")
    (command,) = [line for line in lines if "dask_worker" in line]
    assert "--nworkers 8" in command
    assert "--nthreads 1 --memory-limit 6.00GiB" in command


def test_ctrl_c_means_the_same_after_dask_jobqueue_was_imported():
    code = (
        "import signal; from loraq_sim.sweeps.scheduler import slurm_job_script\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "slurm_job_script({'queue': 'cpu'})\n"
        "import sys\n"
        "print('dask_jobqueue' in sys.modules)\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"]


def test_memory_is_the_users_where_it_is_given():
    assert "#SBATCH --mem=5G" in slurm_job_script({"memory": "5GiB"}, worker_bytes=2**40)


def test_slurm_without_sbatch_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs sbatch, which is not on the PATH"):  # noqa: SIM117
        with connected("slurm", {}):
            pass


def test_slurm_jobs_run_a_sweep_and_end_with_it(monkeypatch, tmp_path, make_dump, make_plan, fake):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    here = str(importlib.util.find_spec("fake_evaluation").origin).rpartition("/")[0]
    options = {"prologue": f"export PYTHONPATH={here}:$PYTHONPATH", "interface": "lo"}
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    with connected("slurm", options, jobs=1) as (executor, count):
        assert count == 1
        executor._wait_s = 60.0  # a queue may be long; a test may not
        results = list(executor.run(sweep.tasks, fake))
    assert [result.row["status"] for result in results] == ["ok"] * 6
    assert {result.row["threads"] for result in results} == {"1"}
    assert (folder / "cancelled").exists()
