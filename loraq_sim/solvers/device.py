"""Where the long loops of a solve run: the CPU, or a GPU through torch.

The algorithms are written once, for arrays that know ``@``, ``.T`` and ``+=``; a device holds the
arrays and knows the two directions of a descent (`loraq_sim.solvers.directions` with Numba kernels,
`loraq_sim.solvers.torch_directions`). Everything that is stored or reported is rounded and measured
on the CPU whatever the device.
"""

import contextlib
import re
from typing import Any, Protocol

import numpy as np

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.solvers.directions import CpuDirections, Directions
from loraq_sim.solvers.main_grid import MainGrid

__all__ = ["CPU", "Device", "find_device"]

_NAMES = ("cpu", "cuda", "cuda:0")
_CUDA = re.compile(r"cuda(?::(\d{1,4}))?")
# The torch code without a GPU, for tests.
_TORCH_ON_CPU = "torch:cpu"


class Device(Protocol):
    """Arrays and directions of one processor; all but `name` inside ``with device.working():``."""

    name: str

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Keep float32 products exact to float32, and turn a full memory into an InputError."""

    def put(self, array: np.ndarray) -> Any:
        """`array` on this device, perhaps in the same memory."""

    def get(self, array: Any) -> np.ndarray:
        """An array of this device on the host, perhaps in the same memory."""

    def orthonormal(self, columns: Any) -> Any:
        """An orthonormal basis (N, r) of `columns` (N, r)."""

    def can_round_to(self, grid: MainGrid) -> bool:
        """Whether `directions` knows what rounding to `grid` leaves."""

    def directions(self, rest: np.ndarray, grid: MainGrid) -> Directions:
        """Directions of descents on what `rest` (N, K) leaves to `grid`."""


class _Cpu:
    """NumPy, and the Numba kernels."""

    name = "cpu"

    def working(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, array: np.ndarray) -> np.ndarray:
        return array

    def orthonormal(self, columns: np.ndarray) -> np.ndarray:
        return np.linalg.qr(columns)[0]

    def can_round_to(self, grid: MainGrid) -> bool:
        return True

    def directions(self, rest: np.ndarray, grid: MainGrid) -> Directions:
        return CpuDirections(rest, grid)


CPU: Device = _Cpu()


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
        raise InputError(unknown_name("device", text, _NAMES))
    from loraq_sim.solvers.torch_device import TorchDevice

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
