"""One Linear or 1x1 convolution of a torch model, run through the emulated data path."""

from typing import TYPE_CHECKING

import numpy as np

from loraq_sim.emulator.datapath import Datapath, StoredLayer, run_layer
from loraq_sim.emulator.float_overflow import Clipping
from loraq_sim.emulator.scaled_gemm import GemmStatistics
from loraq_sim.errors import InputError
from loraq_sim.split import PrecisionSplit

if TYPE_CHECKING:
    import torch

__all__ = ["EmulatedLayer", "module_bias", "module_weight"]


class EmulatedLayer:
    """What a layer's forward pass becomes: rows to the data path, its output back as a tensor.

    Called with the layer's input, (..., K) of a Linear or (B, K, ...) of a 1x1 convolution, on any
    device; the data path itself runs on the CPU. The output has the dtype of the input. Nothing is
    differentiable.

    Attributes
    ----------
    name : str
    stored, split, datapath
        As `loraq_sim.emulator.datapath.run_layer` takes them.
    gemms : dict of str to GemmStatistics
        What the accumulators of ``main``, ``down`` and ``up`` saw in all calls so far.
    clipped_count : int
        Values that left their float format, in all calls so far.
    first_clipped : Clipping or None
        The first tensor with one.
    n_wild_calls : int
        Calls whose input held infinities or NaN, which run on as such.
    n_calls, n_rows : int
    """

    def __init__(
        self,
        name: str,
        module: "torch.nn.Module",
        stored: StoredLayer,
        split: PrecisionSplit,
        datapath: Datapath,
    ) -> None:
        self.name = name
        self.stored = stored
        self.split = split
        self.datapath = datapath
        self.gemms: dict[str, GemmStatistics] = {}
        self.n_calls = self.n_rows = self.clipped_count = self.n_wild_calls = 0
        self.first_clipped: Clipping | None = None
        self._bias = module_bias(module)
        # Axes of an image behind the channels of a convolution.
        self._image_axes = len(getattr(module, "kernel_size", ()))

    def __call__(self, x: "torch.Tensor") -> "torch.Tensor":
        """Run the layer on one input tensor."""
        import torch

        channels_last = x.detach().movedim(-1 - self._image_axes, -1)
        rows = channels_last.reshape(-1, channels_last.shape[-1]).to("cpu", torch.float32)
        y = torch.from_numpy(self.run(rows.numpy())).to(x.device, x.dtype)
        return y.reshape(*channels_last.shape[:-1], -1).movedim(-1, -1 - self._image_axes)

    def run(self, rows: np.ndarray) -> np.ndarray:
        """Output (M, N) of input rows (M, K), float32; counted in the statistics."""
        try:
            out = run_layer(rows, self.stored, self.split, self.datapath, self._bias)
        except InputError as error:
            raise InputError(f"layer {self.name!r}, call {self.n_calls + 1}: {error}") from error
        for part, seen in out.gemms.items():
            known = self.gemms.get(part)
            self.gemms[part] = seen if known is None else known.joined(seen)
        self.clipped_count += out.clipped_count
        self.n_wild_calls += not np.isfinite(rows).all()
        if out.clipped and self.first_clipped is None:
            self.first_clipped = out.clipped[0]
        self.n_calls += 1
        self.n_rows += len(rows)
        return out.y


def module_weight(module: "torch.nn.Module") -> np.ndarray:
    """Weight of a Linear or 1x1 convolution as a matrix (N, K), float32."""
    import torch

    weight = module.weight.detach().to("cpu", torch.float32).numpy()
    return weight.reshape(len(weight), -1)


def module_bias(module: "torch.nn.Module") -> np.ndarray | None:
    """Bias (N,) as float32, or None."""
    import torch

    return None if module.bias is None else module.bias.detach().to("cpu", torch.float32).numpy()
