"""From ``--scheduler`` to an executor: a Dask scheduler that runs, or workers from Slurm.

    tcp://host:8786    the workers of that scheduler, started by the user
    tls://host:8786    the same, encrypted, with certificates that `TLS_OPTIONS` name
    slurm              jobs submitted by dask-jobqueue, which end with the sweep

Slurm options are keys of `SLURM_OPTIONS`; what is not given comes from the user's Dask
configuration (``jobqueue.slurm``, ``distributed.comm.tls``), and then from here.

Whoever controls a scheduler decides what its workers run, so a scheduler and its options are named
on the command line alone, never by a file. What it sends back is data (`plain_comm`).
"""

import math
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError, LoraqError, unknown_name
from loraq_sim.sweep.cluster import ClusterExecutor
from loraq_sim.sweep.one_thread import ONE_THREAD

if TYPE_CHECKING:
    from distributed import Client, Security

__all__ = ["SLURM_OPTIONS", "TLS_OPTIONS", "check_scheduler", "connected", "slurm_job_script"]

_CONNECT_S = 10.0
# To say goodbye to a scheduler that may not listen any more.
_LEAVE_S = 4.0
_MIN_WORKER_BYTES = 2 * 2**30
_PLACEHOLDER = "tcp://<this machine>:<port>"

SLURM_OPTIONS = {
    "cores": "CPUs of one job, each with a worker process (default 1)",
    "memory": "memory of one job, such as 8GiB (default: twice the forecast, at least 2 GiB a CPU)",
    "queue": "partition",
    "account": "account that is charged",
    "walltime": "time limit of a job, such as 08:00:00",
    "directives": "further #SBATCH lines, separated by ';'",
    "prologue": "commands before the worker starts, such as 'module load python', separated by ';'",
    "python": "Python of the workers (default: this one)",
    "interface": "network interface, such as ib0",
    "local_directory": "scratch folder of the workers",
    "log_directory": "folder of the job logs",
    "shebang": "first line of the job script",
    "job_name": "name of the jobs (default loraq-sim)",
}
"""Options of ``--scheduler slurm`` and what they mean."""

TLS_OPTIONS = {
    "tls_ca": "certificate authority that signed the certificates of scheduler and workers (PEM)",
    "tls_cert": "certificate of this side (PEM)",
    "tls_key": "key of that certificate (PEM)",
}
"""Options of ``--scheduler tls://...``, and of slurm, whose jobs then read these files too."""

_LISTS = {"directives": "job_extra_directives", "prologue": "job_script_prologue"}


def check_scheduler(scheduler: str, options: Mapping[str, Any]) -> None:
    """Raise InputError unless `scheduler` and its options can be meant."""
    if scheduler == "slurm":
        known = SLURM_OPTIONS | TLS_OPTIONS
        for name, value in options.items():
            if name not in known:
                raise InputError(unknown_name("--scheduler-option", name, known))
            if not str(value).strip() or "\n" in str(value):
                raise InputError(f"--scheduler-option {name} must be one line, got {value!r}")
        _cores(options)
        _check_tls(options)
        return
    # Host names may hold '_' and IPv6 addresses stand in brackets.
    match = re.fullmatch(r"(?:tcp|tls)://(?:[\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5})", scheduler)
    if match is None or not 0 < int(match[1]) < 65536:
        raise InputError(
            f"--scheduler must be slurm or tcp://host:port or tls://host:port, got {scheduler!r}"
        )
    for name in options:
        if name in SLURM_OPTIONS:
            raise InputError(
                f"--scheduler-option {name} is for --scheduler slurm; the workers of {scheduler} "
                "are there"
            )
        if name not in TLS_OPTIONS:
            raise InputError(unknown_name("--scheduler-option", name, TLS_OPTIONS))
    if options and not scheduler.startswith("tls://"):
        raise InputError(
            f"--scheduler-option {next(iter(options))} is for an encrypted scheduler: give its "
            f"address as tls://, not {scheduler}"
        )
    _check_tls(options)


def _check_tls(options: Mapping[str, Any]) -> None:
    given = {name: options[name] for name in TLS_OPTIONS if name in options}
    if given and len(given) < len(TLS_OPTIONS):
        missing = ", ".join(name for name in TLS_OPTIONS if name not in given)
        raise InputError(
            f"TLS needs a CA, a certificate and its key; missing: --scheduler-option {missing}"
        )
    for name, value in given.items():
        if not Path(str(value)).is_file():
            raise InputError(f"--scheduler-option {name}: no file {str(value)!r}; check the path")


@contextmanager
def connected(
    scheduler: str,
    options: Mapping[str, Any],
    *,
    jobs: int | None = None,
    worker_bytes: int = 0,
) -> Iterator[tuple[ClusterExecutor, int]]:
    """Executor on the workers of `scheduler`, and how many of them there are or will be.

    Parameters
    ----------
    scheduler : str
        ``tcp://host:port`` or ``slurm``.
    options : mapping
        Of `SLURM_OPTIONS`.
    jobs : int, optional
        Workers to use at most. Default: all that are connected; with Slurm, those of one job.
    worker_bytes : int
        Memory that a worker is expected to need.

    Raises
    ------
    InputError
        If an option breaks a rule, the extra ``[cluster]`` or ``sbatch`` is missing.
    LoraqError
        If nothing answers at the address.
    """
    check_scheduler(scheduler, options)
    _need("distributed", "threadpoolctl", *(["dask_jobqueue"] if scheduler == "slurm" else []))
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs must be at least 1 with --scheduler, got {jobs}")
    if scheduler == "slurm":
        with _slurm_client(options, jobs, worker_bytes) as (client, count):
            yield ClusterExecutor(client, max_workers=count, wait_s=math.inf), count
        return
    with _client(scheduler, _security(options)) as client:
        present = len(client.sync(client.scheduler.ncores, callback_timeout=_CONNECT_S))
        count = min(present, jobs or present)
        yield ClusterExecutor(client, max_workers=jobs), max(count, 1)


def slurm_job_script(options: Mapping[str, Any], *, worker_bytes: int = 0) -> str:
    """The script that ``sbatch`` would get for each job.

    Raises
    ------
    InputError
        If an option breaks a rule or the extra ``[cluster]`` is missing.
    """
    check_scheduler("slurm", options)
    _need("dask_jobqueue")
    with _ctrl_c_as_before():
        from dask_jobqueue.slurm import SLURMJob

    settings = _slurm_settings(options, worker_bytes)
    settings.pop("log_directory", None)  # made as a side effect, and not part of a dry run
    if (security := _security(options)) is not None:
        settings |= {"security": security, "protocol": "tls://"}
    return SLURMJob(scheduler=_PLACEHOLDER, name="<worker>", **settings).job_script()


@contextmanager
def _client(address: str, security: "Security | None") -> "Iterator[Client]":
    from distributed import Client

    from loraq_sim.sweep.plain_comm import plain_address

    settings = {"timeout": _CONNECT_S, "set_as_default": False, "security": security}
    try:
        client = Client(plain_address(address), **settings)
    # TypeError: an address with tls:// and no certificates here or in Dask's configuration.
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        why = str(error).replace("plain+", "")
        raise LoraqError(
            f"no Dask scheduler answers at {address} within {_CONNECT_S:.0f} s ({why}); "
            "start one with: dask scheduler"
        ) from None
    try:
        yield client
    finally:
        with suppress(TimeoutError, OSError, RuntimeError):
            client.close(timeout=_LEAVE_S)


def _security(options: Mapping[str, Any]) -> "Security | None":
    """Certificates of `options` for every role; None leaves them to Dask's configuration."""
    from distributed import Security

    if "tls_ca" not in options:
        return None
    ca, cert, key = (str(Path(str(options[name])).absolute()) for name in TLS_OPTIONS)
    roles = {f"tls_{role}_cert": cert for role in ("client", "scheduler", "worker")}
    roles |= {f"tls_{role}_key": key for role in ("client", "scheduler", "worker")}
    return Security(tls_ca_file=ca, require_encryption=True, **roles)


@contextmanager
def _slurm_client(
    options: Mapping[str, Any], jobs: int | None, worker_bytes: int
) -> "Iterator[tuple[Client, int]]":
    with _ctrl_c_as_before():
        from dask_jobqueue import SLURMCluster

    if shutil.which("sbatch") is None:
        raise InputError(
            "--scheduler slurm needs sbatch, which is not on the PATH: run this where jobs are "
            "submitted, or see the job script with --dry-run"
        )
    count = jobs or _cores(options)
    settings = _slurm_settings(options, worker_bytes)
    security = _security(options)
    with SLURMCluster(
        **settings,
        security=security,
        silence_logs="error",
        scheduler_options={"dashboard_address": ":0"},
    ) as cluster:
        cluster.scale(n=count)
        with _client(cluster.scheduler_address, security) as client:
            yield client, count


@contextmanager
def _ctrl_c_as_before() -> Iterator[None]:
    """Importing dask_jobqueue makes Ctrl-C a silent exit with code 0; this takes that back."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def _slurm_settings(options: Mapping[str, Any], worker_bytes: int) -> dict[str, Any]:
    """Arguments of dask-jobqueue: one worker process per CPU, each on one thread."""
    import dask

    cores = _cores(options)
    settings: dict[str, Any] = {"cores": cores, "processes": cores, "job_name": "loraq-sim"}
    if dask.config.get("jobqueue.slurm.memory", None) is None:
        gibibytes = math.ceil(max(_MIN_WORKER_BYTES, 2 * worker_bytes) / 2**30)
        settings["memory"] = f"{cores * gibibytes}GiB"
    for name, value in options.items():
        if name in _LISTS:
            parts = str(value).split(";")
            settings[_LISTS[name]] = [part.strip() for part in parts if part.strip()]
        elif name in SLURM_OPTIONS and name != "cores":
            settings[name] = str(value)
    threads = [f"export {name}={value}" for name, value in ONE_THREAD.items()]
    before = settings.get("job_script_prologue") or dask.config.get(
        "jobqueue.slurm.job-script-prologue", []
    )
    settings["job_script_prologue"] = [*threads, *before]
    return settings


def _cores(options: Mapping[str, Any]) -> int:
    text = str(options.get("cores", 1))
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10_000):
        raise InputError(f"--scheduler-option cores must be a whole number from 1, got {text!r}")
    return int(text)


def _need(*modules: str) -> None:
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise InputError(
                f"--scheduler needs {module.replace('_', '-')}, which is not installed: "
                "pip install 'loraq-sim[cluster]'"
            )
