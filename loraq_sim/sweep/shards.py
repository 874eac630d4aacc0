"""A sweep in n parts that together are the whole: for array jobs that share nothing but files.

Every job composes the same plan and takes its part, so the parts depend on the plan alone: layers
go, longest first (by formula, not by clock), to the part with the least work so far; ties go by
name. A layer is never divided, because its cases share what is loaded and solved.
"""

import re
from dataclasses import replace

from loraq_sim.errors import InputError
from loraq_sim.sweep.plan import ComposedSweep

__all__ = ["parse_shard", "take_shard"]


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of ``i/n`` with 1 <= i <= n.

    Raises
    ------
    InputError
        If the text is not of this form.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard must be i/n with i from 1 to n, such as 1/4, got {text!r}")
    return int(match[1]), int(match[2])


def take_shard(sweep: ComposedSweep, shard: tuple[int, int]) -> ComposedSweep:
    """Part `i` of `n` of a sweep, for ``shard = (i, n)``; its cases keep their places."""
    index, count = shard
    if count > len(sweep.tasks):
        raise InputError(
            f"--shard {index}/{count}: there are only {len(sweep.tasks)} layers to share out"
        )
    loads = [0.0] * count
    mine: set[str] = set()
    for task in sorted(sweep.tasks, key=lambda task: (-task.work, task.layer)):
        part = loads.index(min(loads))
        loads[part] += task.work
        if part == index - 1:
            mine.add(task.layer)
    tasks = tuple(task for task in sweep.tasks if task.layer in mine)
    return replace(sweep, tasks=tasks, shard=f"{index}/{count}")
