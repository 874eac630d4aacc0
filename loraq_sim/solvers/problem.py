"""What a solver is given and what it returns.

A `Problem` is one weight with its formats, its rank and how long to search (`Effort`, one record a
preset); `Branches` are the stored codes a solver makes of it, with the `Trace` of its errors.

Solves of one weight have stages in common: those before the branch is rounded depend on the weight,
the main format, the rank, the preset and the seed only, so that branch formats of one rank share
them, and equal problems everything. `SharedStages` keeps them; a result is the same bytes with and
without. `find_device` is where it is solved.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import TypedDict, TypeVar, cast

import numpy as np

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format
from loraq_sim.layers import as_array, is_floating
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers.low_rank import CPU, Device, truncated_svd
from loraq_sim.split import rank_for_budget

__all__ = [
    "Branches",
    "EFFORTS",
    "Effort",
    "GroupOptions",
    "PRESETS",
    "Problem",
    "SharedStages",
    "SolveOptions",
    "SplitOptions",
    "Trace",
    "TraceEntry",
    "array_key",
    "checked_matrix",
    "find_device",
    "product",
    "relative_distance",
    "resolve_rank",
]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Steps and passes of the iterative stages.

    ``flatten_steps`` and ``refine_steps`` are gradient steps of the two stages of `loraq` on
    integer main grids, ``refine_float_steps`` those on other grids, and ``settle_steps`` those
    after each part of a coarse branch is frozen. ``alternations`` are the passes of `alternating`
    (flat after about 25: 24 -> 60 gains less than 1 %), `loftq` and `svdquant_tuned`. A longer
    search is not always the better one: `loraq` goes on from the flattening of the preset
    ``below``, whose end it finishes as well, and returns the best.
    """

    flatten_steps: int
    refine_steps: int
    refine_float_steps: int
    settle_steps: int
    alternations: int
    below: str | None = None


EFFORTS = {
    "fast": Effort(
        flatten_steps=9, refine_steps=9, refine_float_steps=18, settle_steps=5, alternations=4
    ),
    "balanced": Effort(
        flatten_steps=35,
        refine_steps=39,
        refine_float_steps=100,
        settle_steps=20,
        alternations=12,
        below="fast",
    ),
    "best": Effort(
        flatten_steps=100,
        refine_steps=320,
        refine_float_steps=440,
        settle_steps=60,
        alternations=24,
        below="balanced",
    ),
}
PRESETS = {name: effort.alternations for name, effort in EFFORTS.items()}
"""Presets and their passes of block descent, the unit in which work is forecast."""


_Result = TypeVar("_Result")


class SharedStages:
    """Results of stages by what they depend on; hand the same one to several calls of `solve`."""

    def __init__(self) -> None:
        self._results: dict[Hashable, object] = {}

    def recall(self, key: Hashable, compute: Callable[[], _Result]) -> _Result:
        """The result kept under `key`, computed where there is none. Not to be modified."""
        if key not in self._results:
            self._results[key] = compute()
        # A key names one stage, whose results are all of one type.
        return cast(_Result, self._results[key])


def array_key(values: np.ndarray) -> bytes:
    """Digest of `values`, so that stages of different weights are not mixed up."""
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()


_BLOCK_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One weight to split into a quantized main branch and a quantized low-rank branch.

    ``weight`` is (N, K) float32 (already smoothed, if at all); ``rank`` is at least 1.
    ``activations`` (T, K) float32 are what enters the smoothed weight, for methods that use data;
    ``is_smoothed`` says that the caller chose the smoothing; ``branch_rotation`` is ``"learned"``
    where the factors are turned before they are rounded. ``device`` runs the long loops of methods
    that know it. ``holds`` says that `loraq` keeps what the main branch rounds small, as inputs of
    few bits want it, at some cost in the error of the weight. ``into_main`` and ``into_branch`` are
    formats and scale rules of what enters, for methods that fit to rounded inputs. ``shared`` keeps
    stages for other problems of the same ``shared_key``, which names all else that a stage depends
    on.
    """

    weight: np.ndarray
    main: Format
    branch: Format
    rank: int
    effort: Effort
    rng: np.random.Generator
    activations: np.ndarray | None = None
    is_smoothed: bool = False
    branch_rotation: str | None = None
    device: Device = CPU
    holds: bool = False
    into_main: tuple[Format, str] | None = None
    into_branch: tuple[Format, str] | None = None
    shared: SharedStages = field(default_factory=SharedStages)
    shared_key: tuple[Hashable, ...] = ()

    def truncated_svd(
        self,
        matrix: np.ndarray,
        *,
        power_iterations: int = 2,
        start: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`loraq_sim.solvers.low_rank.truncated_svd` at this rank, on this device."""
        return truncated_svd(
            matrix,
            self.rank,
            rng=self.rng,
            power_iterations=power_iterations,
            start=start,
            device=self.device,
        )

    def relative_error(self, approximation: np.ndarray) -> float:
        """||W - approximation||_F / ||W||_F; 0 for a zero weight that is met exactly."""
        return relative_distance(self.weight, approximation)


def relative_distance(weight: np.ndarray, approximation: np.ndarray) -> float:
    """||W - approximation||_F / ||W||_F in float64; 0 for a zero weight that is met exactly.

    Works through blocks of rows: copies of a whole weight in float64 would set the peak memory.
    """
    miss = size = 0.0
    for start in range(0, len(weight), _BLOCK_ROWS):
        block = weight[start : start + _BLOCK_ROWS].astype(np.float64)
        size += float(np.vdot(block, block))
        block -= approximation[start : start + _BLOCK_ROWS]
        miss += float(np.vdot(block, block))
    if size == 0.0:
        return 0.0 if miss == 0.0 else float("inf")
    return math.sqrt(miss / size)


@dataclass(frozen=True, kw_only=True)
class TraceEntry:
    """Relative weight error after one iteration of one stage.

    ``is_stored`` says that the error is that of stored codes, which a solver may return; else the
    branch was not rounded yet. ``device`` is where the error was found: what is stored is always
    rounded and measured on the CPU.
    """

    stage: str
    iteration: int
    weight_error: float
    is_stored: bool = True
    device: str = "cpu"


Trace = list[TraceEntry]


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Stored branches: main (N, K), left (N, r) and right (r, K); no factors without a branch.

    ``branch_noise`` is what rounding did to the branch, ||L^ R^ - L R||_F / ||W||_F, where known.
    ``smooth`` (K,) are factors that the method chose itself: the branches then approximate
    W diag(smooth).
    """

    main: QuantizedTensor
    left: QuantizedTensor | None = None
    right: QuantizedTensor | None = None
    trace: Trace = field(default_factory=list)
    branch_noise: float | None = None
    smooth: np.ndarray | None = None

    def reconstruct(self) -> np.ndarray:
        """main + left right as float32, (N, K)."""
        total = self.main.dequantize()
        if self.left is not None and self.right is not None:
            total += product(self.left, self.right)
        return total


def product(left: QuantizedTensor, right: QuantizedTensor) -> np.ndarray:
    """left right as float32, (N, K), from the stored codes."""
    return left.dequantize() @ right.dequantize()


_DEVICES = ("cpu", "cuda", "cuda:0")
_CUDA = re.compile(r"cuda(?::(\d{1,4}))?")
# The torch code without a GPU, for tests.
_TORCH_ON_CPU = "torch:cpu"


def find_device(name: str) -> Device:
    """The device called `name`: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises
    ------
    InputError
        If there is no such device; the message says what to do.
    """
    # A torch.device has its name as text.
    text = str(name)
    if text == "cpu":
        return CPU
    matched = _CUDA.fullmatch(text)
    if matched is None and text != _TORCH_ON_CPU:
        raise InputError(unknown_name("device", text, _DEVICES))
    from loraq_sim.solvers.torch_directions import TorchDevice

    if matched is None:
        return TorchDevice("cpu", name=_TORCH_ON_CPU)
    _check_cuda(text, int(matched[1] or 0))
    return TorchDevice(text)


def _check_cuda(name: str, index: int) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"device={name!r} needs a GPU, but torch.cuda.is_available() is False: install a "
            "driver and a build of PyTorch for it (https://pytorch.org/get-started), or use "
            "device='cpu'"
        )
    count = torch.cuda.device_count()
    if index >= count:
        known = ", ".join(f"cuda:{i}" for i in range(count))
        raise InputError(f"device={name!r} is not here: torch sees {known}; use one of these")


class GroupOptions(TypedDict, total=False):
    """Keywords of `loraq_sim.solve` that layers with one input have in common."""

    method: str
    main: "str | Format"
    branch: "str | Format | None"
    rank: int | None
    budget: str | None
    preset: str
    rotate: str | None
    condition: str | None
    branch_rotation: str | None
    feedback: "int | str | None"
    main_activation: "str | Format | None"
    branch_activation: "str | Format | None"
    main_rule: str
    branch_rule: str
    finish: str | None
    seed: int
    device: str
    excluded: Collection[str]


class SplitOptions(GroupOptions, total=False):
    """Keywords of `loraq_sim.solve` that are not the layer's own."""

    smooth: "float | np.ndarray | None"


class SolveOptions(SplitOptions, total=False):
    """Keywords of `loraq_sim.solve` but the stages that several solves share."""

    activations: np.ndarray | None


_DEFAULT_RANK = 64
_LARGEST = 2.0**48


def checked_matrix(values: np.ndarray, name: str) -> np.ndarray:
    """`values` as a finite C-contiguous float32 matrix; an error names what is wrong with it."""
    try:
        array = as_array(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be an array, got {type(values).__name__}: {error}") from None
    if array.ndim != 2 or 0 in array.shape or not is_floating(array.dtype):
        raise InputError(
            f"{name} must be a non-empty floating 2-D array, got {array.dtype} of shape "
            f"{array.shape}"
        )
    # What lies beyond float32 becomes inf here and is reported below.
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    n_bad = array.size - int(np.isfinite(array).sum())
    if n_bad:
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(
            f"{name} holds {n_bad} NaN or Inf values; the first is {array[where]} at {where}"
        )
    largest = float(np.abs(array).max())
    if largest > _LARGEST:
        raise InputError(
            f"{name} reaches {largest:.3g}; beyond {_LARGEST:.3g} squares and products overflow "
            "float32: rescale the layer"
        )
    return array


def resolve_rank(
    shape: tuple[int, int],
    branch: Format | None,
    rank: int | None,
    budget: str | None,
    feedback_of: Callable[[int], int] = lambda rank: 0,
) -> int:
    """The rank that `rank`, `budget` or neither asks for; 0 without a branch.

    `feedback_of` as in `loraq_sim.split.rank_for_budget`.
    """
    if rank is not None and budget is not None:
        raise InputError(f"give either rank or budget, got rank={rank} and budget={budget!r}")
    if branch is None:
        if rank or budget is not None:
            raise InputError("a rank or budget needs a branch format, got branch=None")
        return 0
    if budget is not None:
        return rank_for_budget(*shape, branch, budget, feedback_of)
    if rank is None:
        return min(_DEFAULT_RANK, *shape)
    if isinstance(rank, bool) or int(rank) != rank or not 0 <= rank <= min(shape):
        raise InputError(
            f"rank must be an integer from 0 to min(N, K) = {min(shape)}, got {rank!r}"
        )
    return int(rank)
