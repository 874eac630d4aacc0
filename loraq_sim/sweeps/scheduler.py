"""Where a sweep runs: on this machine, on a Dask scheduler, or on workers from Slurm.

    tcp://host:8786    the workers of that scheduler, started by the user
    tls://host:8786    the same, encrypted, with certificates that `TLS_OPTIONS` name
    slurm              jobs submitted by dask-jobqueue, which end with the sweep

Slurm options are keys of `SLURM_OPTIONS`; what is not given comes from the user's Dask
configuration (``jobqueue.slurm``, ``distributed.comm.tls``), and then from here. Whoever controls a
scheduler decides what its workers run, so a scheduler and its options are named on the command line
alone, never by a file.

What a scheduler sends back is data and nothing that would run. Dask unpickles exceptions, warnings
and types, so whoever answers at its address could run code here; the connections made here decode
MessagePack alone: texts, numbers, lists, mappings. A pickle, or bytes of any kind, arrives as
`NOT_LOADED`. What is sent is as in Dask. Source: the frames are those of
``distributed.protocol.utils.pack_frames_prelude``.
"""

import math
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError, LoraqError, unknown_name
from loraq_sim.sweeps.cluster import ClusterExecutor
from loraq_sim.sweeps.local import Executor, available_cpus
from loraq_sim.sweeps.worker import ONE_THREAD

if TYPE_CHECKING:
    from distributed import Client, Security

__all__ = [
    "NOT_LOADED",
    "Place",
    "SLURM_OPTIONS",
    "TLS_OPTIONS",
    "check_scheduler",
    "connected",
    "plain_address",
    "plain_data",
    "slurm_job_script",
]


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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sweep runs, as ``--scheduler`` and ``--jobs`` say; None: on this machine."""

    scheduler: str | None
    options: Mapping[str, Any]
    jobs: int | None

    def check(self) -> None:
        """Raise InputError if the options cannot be meant."""
        if self.scheduler is not None:
            check_scheduler(self.scheduler, self.options)
        elif self.options:
            raise InputError("--scheduler-option needs --scheduler slurm")

    @property
    def expected_jobs(self) -> int:
        """Workers to count on before any is there."""
        if self.jobs is not None:
            return self.jobs
        return int(self.options.get("cores", 1)) if self.scheduler else available_cpus()

    def job_script(self, worker_bytes: int) -> str:
        """What Slurm would get; empty elsewhere."""
        if self.scheduler != "slurm":
            return ""
        return slurm_job_script(self.options, worker_bytes=worker_bytes)

    @contextmanager
    def executor(self, worker_bytes: int) -> Iterator[tuple[Executor | None, int | None]]:
        """What runs tasks (None: local processes), and how many workers it has (None: by CPU)."""
        if self.scheduler is None:
            yield None, self.jobs
            return
        found = connected(self.scheduler, self.options, jobs=self.jobs, worker_bytes=worker_bytes)
        with found as (executor, jobs):
            yield executor, jobs


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
        known: Any = client.scheduler  # which Dask types as None until it has connected
        present = len(client.sync(known.ncores, callback_timeout=_CONNECT_S))
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


NOT_LOADED = "not loaded: bytes or a pickle from the scheduler"
"""What stands in a message for anything that is not plain data."""

MAX_MESSAGE_BYTES = 256 * 2**20
# Scheme of the connection that decodes plain data, by the scheme people write.
_SCHEMES = {"tcp": "plain+tcp", "tls": "plain+tls"}


def plain_address(address: str) -> str:
    """The address at which a Dask client connects as described above: ``plain+tcp://host:port``."""
    _register()
    scheme, _, location = address.partition("://")
    return f"{_SCHEMES[scheme]}://{location}"


def plain_data(frame: bytes) -> Any:
    """The message of a first frame; bytes and pickles in it are replaced by `NOT_LOADED`.

    Raises
    ------
    ValueError
        If the frame is no MessagePack.
    """
    import msgpack

    try:
        content = msgpack.unpackb(
            frame, object_hook=_plain_mapping, use_list=False, strict_map_key=False, raw=False
        )
    except ValueError:
        raise
    except Exception as error:  # of msgpack, and what a key that cannot be hashed raises
        raise ValueError(f"no message: {type(error).__name__}: {error}") from None
    return _without_bytes(content)


def _plain_mapping(mapping: dict) -> Any:
    if "__Set__" in mapping:
        return set(mapping["as-list"])
    if "__Enum__" in mapping:
        return mapping["name"]
    if "__Serialized__" in mapping or "__Pickled__" in mapping:
        return NOT_LOADED
    return mapping


def _without_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_bytes(key): _without_bytes(entry) for key, entry in value.items()}
    if isinstance(value, tuple | set):
        return type(value)(_without_bytes(entry) for entry in value)
    return value if isinstance(value, str | int | float | bool | None) else NOT_LOADED


async def _first_frame(stream: Any) -> bytes:
    """The frame that holds a message; frames after it hold arrays and pickles."""
    (size,) = struct.unpack("Q", await stream.read_bytes(8))
    if not 16 <= size <= MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    packed = await stream.read_bytes(size)
    (count,) = struct.unpack_from("Q", packed)
    if not 1 <= count <= size // 8 - 1:
        raise ValueError(f"a message of {count} frames")
    lengths = struct.unpack_from(f"{count}Q", packed, 8)
    start = 8 * (1 + count)
    # Frames beyond the packed ones follow on the stream.
    left = sum(lengths) - (size - start)
    if not 0 <= left <= MAX_MESSAGE_BYTES or start + lengths[0] > size:
        raise ValueError("a message whose lengths do not fit")
    if left:
        await stream.read_bytes(left)
    return packed[start : start + lengths[0]]


@cache
def _register() -> None:
    """Teach Dask the schemes of `_SCHEMES`: its own connections, but for how a message is read."""
    from distributed.comm import CommClosedError, tcp
    from distributed.comm.registry import backends
    from tornado.iostream import StreamClosedError

    class PlainReads:
        stream: Any
        _closed: bool
        abort: Callable[[], None]

        async def read(self, deserializers: object = None) -> Any:
            del deserializers
            if self.stream is None:
                raise CommClosedError
            try:
                return plain_data(await _first_frame(self.stream))
            except (StreamClosedError, OSError) as error:
                self.stream = None
                self._closed = True
                raise CommClosedError(f"in {self}: {error}") from error
            except ValueError as error:
                self.abort()
                raise CommClosedError(f"in {self}: {error}") from error
            except BaseException:
                # What was read of the message is not known, so nothing after it can be read.
                self.abort()
                raise

    for name, scheme in _SCHEMES.items():
        kind = name.upper()
        comm = type(f"Plain{kind}", (PlainReads, getattr(tcp, kind)), {})
        connector = type(
            f"Plain{kind}Connector",
            (getattr(tcp, f"{kind}Connector"),),
            {"prefix": f"{scheme}://", "comm_class": comm},
        )
        backend = type(
            f"Plain{kind}Backend",
            (getattr(tcp, f"{kind}Backend"),),
            {"_connector_class": connector},
        )
        backends[scheme] = backend()
