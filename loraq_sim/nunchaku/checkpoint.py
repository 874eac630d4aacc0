"""A whole model in nunchaku's key layout: one safetensors file of `layer_tensors`.

Layers keep their names, but for q, k and v that share one R (`loraq_sim.solve_group`): nunchaku
runs them as one layer ``<attention>.to_qkv``, rows of q, k and v below each other. The metadata key
``loraq_sim`` (JSON) says what is not in the tensors: {name: {members: {layer: N}, k, rank, facts}}.
Files of other programs lack it; their layers are read as they are stored, padding included.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing, replaced_file
from loraq_sim.nunchaku.fused_layers import FusedLayer, fused_layers, split_layer
from loraq_sim.nunchaku.layer_tensors import layer_tensors, read_layer
from loraq_sim.plain_file import require_regular_file
from loraq_sim.solvers import Solution

__all__ = ["read_nunchaku", "write_nunchaku"]

_KEY = "loraq_sim"


def write_nunchaku(
    path: str | Path,
    solutions: Mapping[str, Solution],
    *,
    biases: Mapping[str, np.ndarray | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write solved layers as nunchaku's kernels want them.

    Parameters
    ----------
    path : str or Path
        File to write, ``.safetensors``.
    solutions : mapping of layer name to Solution
        Main branch int4/g64 with fp16 scales, branch fp16 (or none), no rotation.
    biases : mapping of layer name to ndarray of shape (N,), optional
        Zeros by default: solutions hold none.
    overwrite : bool

    Raises
    ------
    InputError
        If a layer is none that the kernels can run, or the file is there.
    """
    from safetensors.numpy import save

    path = Path(path)
    if not solutions:
        raise InputError(f"{path}: no solved layer to write")
    refuse_existing(path, overwrite=overwrite)
    tensors: dict[str, np.ndarray] = {}
    notes: dict[str, Any] = {}
    for layer in fused_layers(solutions, biases or {}):
        stored = layer_tensors(layer.name, layer.solution, layer.bias)
        tensors |= {f"{layer.name}.{key}": value for key, value in stored.items()}
        notes[layer.name] = layer.note()
    with replaced_file(path) as file:
        file.write(save(tensors, metadata={_KEY: json.dumps(notes)}))
    return path


def read_nunchaku(path: str | Path) -> tuple[dict[str, Solution], dict[str, np.ndarray]]:
    """Solutions and biases by layer name of a file in nunchaku's layout.

    Raises
    ------
    InputError
        If the file is no such file; the message names the layer.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    require_regular_file(path, "quantized model")
    try:
        with safe_open(path, framework="numpy") as file:
            notes = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            by_layer: dict[str, dict[str, np.ndarray]] = {}
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                name, _, part = key.rpartition(".")
                by_layer.setdefault(name, {})[part] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    by_layer = {name: parts for name, parts in by_layer.items() if "qweight" in parts}
    if not by_layer:
        raise InputError(f"{path}: holds no layer in nunchaku's layout (no key ends in .qweight)")
    solutions: dict[str, Solution] = {}
    biases: dict[str, np.ndarray] = {}
    # safetensors sorts its keys; the notes have the order of the model.
    for name in dict.fromkeys((*(name for name in notes if name in by_layer), *by_layer)):
        try:
            layer = _read(name, by_layer[name], notes.get(name))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: layer {name!r} is damaged: {first_line(error)}") from None
        for member, (solution, bias) in split_layer(layer).items():
            solutions[member], biases[member] = solution, bias
    return solutions, biases


def _read(name: str, tensors: dict[str, np.ndarray], note: dict[str, Any] | None) -> FusedLayer:
    if note is None:
        parts, bias = read_layer(name, tensors)
        return FusedLayer.of_parts(name, parts, bias, members={name: parts["main"].shape[0]})
    members = {str(member): int(rows) for member, rows in note["members"].items()}
    if not members or min(members.values()) < 1:
        raise InputError(f"layer {name!r}: members must have rows, got {members!r:.80}")
    shape = sum(members.values()), int(note["k"])
    parts, bias = read_layer(name, tensors, shape, int(note["rank"]))
    return FusedLayer.of_parts(name, parts, bias, members=members, facts=note["facts"])
