"""A denoising step as a schedule: what waits for what, what runs beside what, and what stands idle.

Every call of the step is a task with its latency, the share of the units it fills, and the share of
the time for which it keeps DRAM busy. `ModelInventory.schedule` says what a task waits for: the
stages of a block follow each other, the calls of one stage need nothing of each other, and calls
named early (projections of the prompt, modulation) wait for the stages before the blocks alone; the
stage that reads them waits for them.

Tasks start in the order of the model as soon as what they wait for is done and their shares are
free: two kernels run at once where together they fill no more than all units, which a GEMM of few
tiles or a normalization on one row of cores leaves, and ask for no more than all of DRAM. A task
that fits is not held back for one in front of it that does not. The critical path is the longest
chain of tasks, as if units were free without end: no schedule is shorter. Idle is what the units
could have done until the last task ends, and did not.

Weights that stay in L2 from one step to the next (`resident_kinds`) are not read again: those whose
bytes save most time are chosen, as far as L2 has room beside the largest call's activations.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError
from hwmodels.inventory import ModelInventory, StepPlan

__all__ = [
    "CallCost",
    "ScheduledTask",
    "StepSchedule",
    "entry_names",
    "resident_names",
    "schedule_step",
]

_FULL = 1 + 1e-9  # Shares are quotients: three thirds may be a little more than one.


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """One call of a step: seconds, the shares of units and DRAM it takes, whether rows carry it."""

    latency_s: float
    units_share: float
    dram_share: float
    is_validated: bool


@dataclass(frozen=True, kw_only=True)
class ScheduledTask:
    """A call in its place: `block` counts from 1; 0 and -1 are before and after the blocks."""

    name: str
    block: int
    start_s: float
    end_s: float
    units_share: float
    is_validated: bool


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """Where every call of a step lies in time.

    `serial_s`: one call after the other. `makespan_s`: this schedule. `critical_path_s`: no
    schedule is shorter. `idle_share`: of units times makespan. `validated_share`: of the time of
    all calls, that of calls which measured rows carry.
    """

    tasks: tuple[ScheduledTask, ...]
    serial_s: float
    makespan_s: float
    critical_path_s: float
    idle_share: float
    validated_share: float


def entry_names(inventory: ModelInventory) -> list[str]:
    """Names by which a schedule calls the entries: the kind, and its second entry ``kind#2``."""
    seen: Counter[str] = Counter()
    names = []
    for entry in inventory.entries:
        seen[entry.kind] += 1
        names.append(entry.kind + (f"#{seen[entry.kind]}" if seen[entry.kind] > 1 else ""))
    return names


def resident_names(
    hw: Accelerator,
    weight_bytes: Mapping[str, int],
    saved_s: Mapping[str, float],
    activation_bytes: int,
) -> list[str]:
    """Entries whose weights (of all calls) stay in L2, those that save most time a byte first."""
    l2 = hw.memories.l2
    room = l2.capacity_bytes * l2.panel_fraction - activation_bytes
    worth = [name for name in saved_s if saved_s[name] > 0 and weight_bytes[name] > 0]
    chosen = []
    for name in sorted(worth, key=lambda name: -saved_s[name] / weight_bytes[name]):
        if weight_bytes[name] <= room:
            room -= weight_bytes[name]
            chosen.append(name)
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Task:
    name: str
    block: int
    waits_for: tuple[int, ...]
    cost: CallCost


def schedule_step(inventory: ModelInventory, costs: Mapping[str, CallCost]) -> StepSchedule:
    """The schedule of a step whose entries (`entry_names`) cost `costs` a call.

    Raises
    ------
    AcceleratorError
        If the plan of the model names an entry that has no cost, or runs one more or less often
        than the model calls it.
    """
    calls = dict(zip(entry_names(inventory), (e.calls for e in inventory.entries), strict=True))
    tasks = _tasks(inventory.schedule, calls, costs)
    runs = Counter(task.name for task in tasks)
    for name, count in calls.items():
        if runs[name] != count:
            raise AcceleratorError(
                f"{inventory.name}: the schedule runs {name} {runs[name]} times, its step {count}"
            )
    placed = _placed(tasks)
    serial = sum(task.cost.latency_s for task in tasks)
    makespan = max(task.end_s for task in placed)
    busy = sum(task.cost.latency_s * task.cost.units_share for task in tasks)
    validated = sum(task.cost.latency_s for task in tasks if task.cost.is_validated)
    return StepSchedule(
        tasks=tuple(placed),
        serial_s=serial,
        makespan_s=makespan,
        critical_path_s=_critical_path(tasks),
        idle_share=max(0.0, 1 - busy / makespan),
        validated_share=validated / serial,
    )


def _tasks(plan: StepPlan, calls: Mapping[str, int], costs: Mapping[str, CallCost]) -> list[_Task]:
    tasks: list[_Task] = []

    def add(name: str, count: int, block: int, waits_for: tuple[int, ...]) -> list[int]:
        if name not in costs:
            raise AcceleratorError(f"the schedule names {name!r:.60}, which the step does not have")
        numbers = range(len(tasks), len(tasks) + count)
        tasks.extend(
            _Task(name=name, block=block, waits_for=waits_for, cost=costs[name]) for _ in numbers
        )
        return list(numbers)

    def run(
        stages: Sequence[Sequence[str]],
        block: int,
        before: tuple[int, ...],
        early: Sequence[str] = (),
    ) -> tuple[int, ...]:
        for stage in stages:
            names = [text.partition("*")[0] for text in stage]
            needed: list[int] = []
            for text in early:
                what, _, consumer = text.partition(">")
                if consumer in names:
                    needed += add(*_counted(what, 1), block, begun)
            started: list[int] = []
            for text in stage:
                every = 1 if block > 0 else calls.get(text, 1)
                started += add(*_counted(text, every), block, (*before, *needed))
            before = tuple(started)
        return before

    begun: tuple[int, ...] = ()
    last = begun = run(plan.first, 0, ())
    number = 0
    for kind in plan.blocks:
        for _ in range(kind.count):
            number += 1
            last = run(kind.stages, number, last, kind.early)
    run(plan.last, -1, last)
    return tasks


def _counted(text: str, every: int) -> tuple[str, int]:
    """Name and number of calls of ``self_q*2``; `every` where no number is said."""
    name, _, times = text.partition("*")
    return name, int(times or every)


def _placed(tasks: Sequence[_Task]) -> list[ScheduledTask]:
    """Every task at the first moment at which it may and can run, in the order of the model."""
    left = [len(task.waits_for) for task in tasks]
    followers: list[list[int]] = [[] for _ in tasks]
    for number, task in enumerate(tasks):
        for before in task.waits_for:
            followers[before].append(number)
    ready = [number for number, count in enumerate(left) if not count]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    units, dram, now = 0.0, 0.0, 0.0
    placed: list[ScheduledTask] = []
    while ready or running:
        held = []
        while ready:
            number = heapq.heappop(ready)
            cost = tasks[number].cost
            fits = units + cost.units_share <= _FULL and dram + cost.dram_share <= _FULL
            if running and not fits:
                held.append(number)
                continue
            units, dram = units + cost.units_share, dram + cost.dram_share
            heapq.heappush(running, (now + cost.latency_s, number))
            placed.append(
                ScheduledTask(
                    name=tasks[number].name,
                    block=tasks[number].block,
                    start_s=now,
                    end_s=now + cost.latency_s,
                    units_share=cost.units_share,
                    is_validated=cost.is_validated,
                )
            )
        ready = held
        heapq.heapify(ready)
        now = running[0][0]
        while running and running[0][0] <= now:  # All that end now, before anything starts.
            _, number = heapq.heappop(running)
            units -= tasks[number].cost.units_share
            dram -= tasks[number].cost.dram_share
            for follower in followers[number]:
                left[follower] -= 1
                if not left[follower]:
                    heapq.heappush(ready, follower)
    return placed


def _critical_path(tasks: Sequence[_Task]) -> float:
    ends: list[float] = []
    for task in tasks:  # A task comes after those it waits for.
        start = max((ends[before] for before in task.waits_for), default=0.0)
        ends.append(start + task.cost.latency_s)
    return max(ends)
