"""How much memory a worker takes at its largest layer.

bytes = c_0 + max( c_s N K, c_w N K + c_x T (N + K) ) + c_k S N K + 4 T_all K

    c_0: interpreter and libraries    c_s: solving    c_w, c_x: emulation and reference output
    S: different solutions of the layer, which are kept until its last case    c_k: one of them
    T: activation rows used    T_all: rows in the dump, which are loaded before rows are chosen

The constants are bytes of peak resident memory. Those of single cases are fitted to nine runs with
N and K from 64 to 4608 and T from 16 to 2048, and are within 10 % of all nine. Of whole sweeps (the
example dumps, ten PixArt layers in 12 splits, three of SANA) the sum is 0.9 to 1.3 times the peak.
"""

from collections.abc import Iterable

from loraq_sim.dumps import LayerInfo
from loraq_sim.sweep.tasks import SweepTask

__all__ = ["layer_bytes", "worker_bytes"]

_PROCESS_BYTES = 187e6
# Torch, which reads .pt files.
_TORCH_BYTES = 190e6
_SOLVE_BYTES = 32
_KEPT_BYTES = 6
_WEIGHT_BYTES = 11
_ROW_BYTES = 32
_FLOAT32_BYTES = 4


def worker_bytes(tasks: Iterable[SweepTask]) -> int:
    """Expected peak memory of a worker that may get any of `tasks`, in bytes."""
    needs = []
    for task in tasks:
        if task.info is not None and task.cases:
            tokens = max(case.settings.tokens or task.info.tokens or 0 for case in task.cases)
            needs.append(
                layer_bytes(task.info, tokens, n_solutions=_n_solutions(task))
                + (_TORCH_BYTES if task.dump.endswith((".pt", ".pth")) else 0)
            )
    return round(_PROCESS_BYTES + max(needs, default=0))


def _n_solutions(task: SweepTask) -> int:
    """Solutions that differ; activation formats do not enter them."""
    return len(
        {
            case.solution_key
            for case in task.cases
            if case.settings.split.has_branch and case.settings.method != "rtn"
        }
    )


def layer_bytes(info: LayerInfo, tokens: int, *, n_solutions: int = 0) -> int:
    """What one layer adds to a process with `tokens` activation rows used, in bytes."""
    weights = info.n * info.k
    rows = min(tokens, info.tokens or 0)
    emulate = _WEIGHT_BYTES * weights + _ROW_BYTES * rows * (info.n + info.k)
    loaded = _FLOAT32_BYTES * (info.tokens or 0) * info.k
    kept = _KEPT_BYTES * n_solutions * weights
    return max(_SOLVE_BYTES * weights, emulate) + kept + loaded
