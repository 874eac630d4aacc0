"""The stored operands that each GEMM of a layer multiplies on an accelerator's data path.

main   X_a Q^T     activations and weight of the main branch
down   X_b R^T     activations of the branch and its right factor
up     P^ L^T      P = X_b R^T as the data path stores it, and the left factor
"""

import numpy as np

from loraq_sim.emulator.datapath import Datapath, StoredLayer, walk_steps
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.split import PrecisionSplit

__all__ = ["PARTS", "gemm_operands"]

PARTS = ("main", "down", "up")


def gemm_operands(
    part: str,
    activations: np.ndarray,
    stored: StoredLayer,
    split: PrecisionSplit,
    datapath: Datapath,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Return what one GEMM multiplies: (M, K) activations and (N, K) weights, both stored.

    K is the layer's for ``main`` and ``down``, where N is the rank; the rank for ``up``.

    Parameters
    ----------
    part : {"main", "down", "up"}
    activations : ndarray of shape (M, K), float32
        Full-precision input rows.
    stored, split, datapath
        As for `loraq_sim.emulator.datapath.run_layer`.

    Raises
    ------
    InputError
        If `part` is unknown, or names a branch that the layer does not have.
    """
    if part not in PARTS:
        raise InputError(unknown_name("part", part, PARTS))
    for done in walk_steps(activations, stored, split, datapath):
        if done.step.name == part:
            return done.inputs[0], done.weight
    raise InputError(
        f"split {split} has no low-rank branch, so there is no part {part!r}; use part 'main' "
        "or a split such as W4A4+W8A8r8"
    )
