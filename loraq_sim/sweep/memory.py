"""How much memory a worker takes at its largest layer.

bytes = c_0 + max( c_s N K, c_w N K + c_x T (N + K) ) + 4 T_all K

    c_0: interpreter and libraries    c_s: solving    c_w, c_x: emulation and reference output
    T: activation rows used    T_all: rows in the dump, which are loaded before rows are chosen

The constants are bytes of peak resident memory, fitted to nine runs of one process with N and K
from 64 to 4608 and T from 16 to 2048, and are within 10 % of all nine.
"""

from collections.abc import Iterable

from loraq_sim.dumps import LayerInfo
from loraq_sim.sweep.tasks import SweepTask

__all__ = ["layer_bytes", "worker_bytes"]

_PROCESS_BYTES = 187e6
_SOLVE_BYTES = 32
_WEIGHT_BYTES = 11
_ROW_BYTES = 32
_FLOAT32_BYTES = 4


def worker_bytes(tasks: Iterable[SweepTask]) -> int:
    """Expected peak memory of a worker that may get any of `tasks`, in bytes."""
    needs = [
        layer_bytes(task.info, max(case.tokens or task.info.tokens or 0 for case in task.cases))
        for task in tasks
        if task.info is not None and task.cases
    ]
    return round(_PROCESS_BYTES + max(needs, default=0))


def layer_bytes(info: LayerInfo, tokens: int) -> int:
    """What one layer adds to a process with `tokens` activation rows used, in bytes."""
    weights = info.n * info.k
    rows = min(tokens, info.tokens or 0)
    emulate = _WEIGHT_BYTES * weights + _ROW_BYTES * rows * (info.n + info.k)
    loaded = _FLOAT32_BYTES * (info.tokens or 0) * info.k
    return max(_SOLVE_BYTES * weights, emulate) + loaded
