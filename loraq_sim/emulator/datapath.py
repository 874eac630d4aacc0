"""The data path of one layer on an accelerator: X -> main + branch -> output format.

    X_a = round(X)   main:    acc[g] = X_a[:, g] Q[:, g]^T     one MAC-array pass per scale group
    X_b = round(X)   branch:  P = X_b R^T, P^ = round(P), Z = P^ L^T
    y = round(combine(main) + combine(Z) + bias)

Each GEMM is `loraq_sim.emulator.scaled_gemm.scaled_gemm`, which says what of it is bit exact.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loraq_sim.emulator.combine import COMBINES, rounded
from loraq_sim.emulator.input_rounding import quantize_rounded
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.scaled_gemm import GemmStatistics, scaled_gemm
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, parse_format
from loraq_sim.hadamard import rotate_channels
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.rounding import parse_rounding
from loraq_sim.split import PrecisionSplit

__all__ = ["P_FORMATS", "Datapath", "LayerOutput", "StoredLayer", "p_format_of", "run_layer"]


P_FORMATS = ("branch", "fp16", "bf16", *(f"int{bits}" for bits in range(2, 9)))


class StoredLayer(Protocol):
    """What a data path reads of a solved layer (see `loraq_sim.solvers.Solution`).

    It may also have a ``rotation``, the block size of a Hadamard matrix.
    """

    main: QuantizedTensor
    left: QuantizedTensor | None
    right: QuantizedTensor | None
    smooth: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Datapath:
    """Accumulator, combine rule and intermediate formats of an accelerator.

    ``p_format`` is ``"branch"`` (P is rounded to the branch's activation format), ``fp16``,
    ``bf16`` or an integer such as ``int8``, in the groups of the split; ``out_format`` is the
    format y is written in, such as ``"bf16"``; ``rounding`` is the mode in which activations and P
    become integer codes.
    """

    mac: MacArray | TwoLevelArray = MacArray()
    combine: str = "fp32"
    p_format: str = "branch"
    out_format: str = "fp16"
    rounding: str = "conv_even"

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise InputError(unknown_name("combine rule", self.combine, COMBINES))
        if self.p_format not in P_FORMATS:
            raise InputError(unknown_name("format of P", self.p_format, P_FORMATS))
        parse_format(self.out_format)
        parse_rounding(self.rounding)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerOutput:
    """Output (M, N) as float32 values of the output format, with what each GEMM saw.

    ``gemms`` has ``main`` and, with a branch, ``down`` (X R^T) and ``up`` (P L^T).
    """

    y: np.ndarray
    gemms: Mapping[str, GemmStatistics]

    @property
    def statistics(self) -> GemmStatistics:
        """Statistics of all GEMMs together."""
        return functools.reduce(GemmStatistics.joined, self.gemms.values())


def layer_input(activations: np.ndarray, stored: StoredLayer) -> np.ndarray:
    """Full-precision rows (M, K) as the stored branches take them: smoothed, then rotated."""
    x = activations if stored.smooth is None else activations / stored.smooth
    block = getattr(stored, "rotation", None)
    return x if block is None else rotate_channels(x, block)


def run_layer(
    activations: np.ndarray,
    stored: StoredLayer,
    split: PrecisionSplit,
    datapath: Datapath,
    bias: np.ndarray | None = None,
) -> LayerOutput:
    """Run one solved layer on an accelerator's data path.

    Parameters
    ----------
    activations : ndarray of shape (M, K), float32
        Full-precision input rows; rounded here, per token and group, with absmax scales.
    stored : StoredLayer
        A solution; its ``smooth`` factors divide the activations first, its ``rotation`` then mixes
        their channels (in float32).
    split : PrecisionSplit
        Names the activation formats of the two branches.
    datapath : Datapath
    bias : ndarray of shape (N,), float32, optional
        Added in float32 after the branches are combined.
    """
    x = layer_input(activations, stored)
    x_main = quantize_rounded(x, split.main_activation, datapath.rounding)
    y, main = scaled_gemm(x_main, stored.main, datapath.mac, datapath.combine)
    gemms = {"main": main}
    if stored.left is not None:
        shared = split.branch_activation == split.main_activation
        x_branch = x_main
        if not shared:
            x_branch = quantize_rounded(x, split.branch_activation, datapath.rounding)
        p, down = scaled_gemm(x_branch, stored.right, datapath.mac, datapath.combine)
        p_stored = quantize_rounded(p, p_format_of(split, datapath), datapath.rounding)
        z, up = scaled_gemm(p_stored, stored.left, datapath.mac, datapath.combine)
        y = rounded(y + z, datapath.combine)
        gemms |= {"down": down, "up": up}
    if bias is not None:
        y = y + bias
    return LayerOutput(y=quantize(y, datapath.out_format).dequantize(), gemms=gemms)


def p_format_of(split: PrecisionSplit, datapath: Datapath) -> Format:
    """The format P is rounded to between the two factors."""
    if datapath.p_format == "branch":
        return split.branch_activation
    if datapath.p_format.startswith("int"):
        return parse_format(f"{datapath.p_format}/g{split.group}")
    return parse_format(datapath.p_format)
