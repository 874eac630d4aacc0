"""Where a sweep runs: processes of this machine, a Dask scheduler, or Slurm jobs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraq_sim.sweep.executors import Executor

__all__ = ["Place"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """What ``--scheduler``, ``--scheduler-option`` and ``--jobs`` ask for; None means local."""

    scheduler: str | None
    options: Mapping[str, Any]
    jobs: int | None

    def check(self) -> None:
        """Raise InputError if the options cannot be meant."""
        from loraq_sim.errors import InputError
        from loraq_sim.sweep.scheduler import check_scheduler

        if self.scheduler is not None:
            check_scheduler(self.scheduler, self.options)
        elif self.options:
            raise InputError("--scheduler-option needs --scheduler slurm")

    @property
    def expected_jobs(self) -> int:
        """Workers to count on before any is there."""
        from loraq_sim.sweep.executors import available_cpus

        if self.jobs is not None:
            return self.jobs
        return int(self.options.get("cores", 1)) if self.scheduler else available_cpus()

    def job_script(self, worker_bytes: int) -> str:
        """What Slurm would get; empty elsewhere."""
        from loraq_sim.sweep.scheduler import slurm_job_script

        if self.scheduler != "slurm":
            return ""
        return slurm_job_script(self.options, worker_bytes=worker_bytes)

    @contextmanager
    def executor(self, worker_bytes: int) -> "Iterator[tuple[Executor | None, int | None]]":
        """What runs tasks (None: local processes), and how many workers it has (None: by CPU)."""
        from loraq_sim.sweep.scheduler import connected

        if self.scheduler is None:
            yield None, self.jobs
            return
        settings = {"jobs": self.jobs, "worker_bytes": worker_bytes}
        with connected(self.scheduler, self.options, **settings) as (executor, jobs):
            yield executor, jobs
