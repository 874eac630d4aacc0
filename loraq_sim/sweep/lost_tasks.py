"""What becomes of a task whose worker died: once more, or failed with the reason.

A case that was running when a worker died is suspected; one that two workers died of is marked
failed, and the rest of its task goes on. The same rule holds for local processes and clusters.
"""

from dataclasses import replace

from loraq_sim.sweep.tasks import CaseResult, SweepCase, SweepTask, WorkerLost, failed_result

__all__ = ["LossRecord"]

_MAX_KILLS = 2


class LossRecord:
    """Which cases workers died of, in one run."""

    def __init__(self) -> None:
        self._kills: dict[str, int] = {}

    def bury(
        self, task: SweepTask, *, has_loaded: bool, reason: str
    ) -> tuple[SweepTask | None, list[CaseResult | WorkerLost]]:
        """What is to be run again, if anything, and what to report.

        Parameters
        ----------
        task : SweepTask
            With the cases that were not finished, at least one.
        has_loaded : bool
            Whether the worker had loaded the layer. If not, loading it is to blame.
        reason : str
            What happened to the worker, such as "was killed by SIGKILL".
        """
        # Cases run in order, so the first one left is the one that was running.
        suspect = f"{task.layer}\0{task.cases[0].case_id if has_loaded else ''}"
        self._kills[suspect] = self._kills.get(suspect, 0) + 1
        if self._kills[suspect] < _MAX_KILLS:
            text = f"a worker {reason}; trying again"
            return task, [WorkerLost(layer=task.layer, message=text)]
        blamed = task.cases[:1] if has_loaded else task.cases
        left = task.cases[len(blamed) :]
        text = f"a second worker {reason}; giving up on it"
        reports: list[CaseResult | WorkerLost] = [WorkerLost(layer=task.layer, message=text)]
        reports += [_killer(case, reason, has_loaded) for case in blamed]
        return (replace(task, cases=left) if left else None), reports


def _killer(case: SweepCase, reason: str, has_loaded: bool) -> CaseResult:
    what = "this case" if has_loaded else "loading this layer"
    return failed_result(case, f"{what} ended {_MAX_KILLS} worker processes: the last one {reason}")
