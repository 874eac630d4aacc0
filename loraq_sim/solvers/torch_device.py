"""A device of torch: CUDA, or the CPU in tests."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from loraq_sim.errors import InputError
from loraq_sim.solvers.main_grid import MainGrid
from loraq_sim.solvers.torch_directions import TorchDirections

__all__ = ["TorchDevice"]


class TorchDevice:
    """Arrays as torch tensors on `place`; `name` is what results call it.

    Matrices of the size of the rank are factored on the host, by the code of the CPU: a GPU has
    nothing to win on them.
    """

    def __init__(self, place: str, *, name: str | None = None) -> None:
        self._place = torch.device(place)
        self.name = name or place

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Without gradients, autocast and TF32 inside; the caller's settings hold again after."""
        autocast = torch.autocast(self._place.type, enabled=False)
        try:
            with torch.no_grad(), autocast, _exact_float32():
                yield
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"device={self.name!r} ran out of memory: free some of it, or use device='cpu'"
            ) from error

    def put(self, array: np.ndarray) -> torch.Tensor:
        # torch warns of memory it must not write to, and takes no reversed arrays.
        array = np.require(array, requirements=("C", "W"))
        return torch.from_numpy(array).to(self._place)

    def get(self, array: torch.Tensor) -> np.ndarray:
        return array.cpu().numpy()

    def orthonormal(self, columns: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(columns)[0]

    def can_round_to(self, grid: MainGrid) -> bool:
        return grid.has_kernel

    def directions(self, rest: np.ndarray, grid: MainGrid) -> TorchDirections:
        return TorchDirections(self, rest, grid)


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32 or bfloat16 in float32 products: their 10 bits would drown the rounding error.

    torch has one setting of the process and, from 2.9, one a backend; it refuses to read the former
    once the latter was set apart from it.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    kept = [backend.fp32_precision for backend in backends]
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:
        general = None
    try:
        if general is None:
            for backend in backends:
                backend.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if general is not None:
            torch.set_float32_matmul_precision(general)
        for backend, precision in zip(backends, kept, strict=True):
            backend.fp32_precision = precision
