"""Quantized models on disk: one safetensors file, read back bit for bit.

Layout, for each layer ``NAME``:

- ``NAME.main``, ``NAME.left``, ``NAME.right``: uint8, the bytes of `QuantizedTensor.pack` (codes,
  scales, zero points or tensor scale); no factors without a branch;
- ``NAME.smooth``: float16 of shape (K,), only with smoothing; the branches then approximate
  W diag(smooth) and activations are divided by it.

Metadata (strings): ``format`` is ``loraq-sim-quantized-v1``; ``layers`` is a JSON object
``{NAME: {method, preset, seed, weight_error, seconds, parts: {main: {format, shape}, ...}}}``;
``meta`` is a JSON object of the writer's.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loraq_sim.dumps.atomic_file import replaced_file
from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution

__all__ = ["QuantizedModel", "read_quantized_model", "write_quantized_model"]

_FORMAT = "loraq-sim-quantized-v1"
_PARTS = ("main", "left", "right")
_FACTS = ("method", "preset", "seed", "weight_error", "seconds")


def write_quantized_model(
    path: str | Path,
    solutions: Mapping[str, Solution],
    *,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write solved layers; the tensors take exactly the sum of their `Solution.nbytes`.

    Raises
    ------
    InputError
        If there is nothing to write, or the file exists and `overwrite` is False.
    """
    from safetensors.numpy import save

    path = Path(path)
    if not solutions:
        raise InputError(f"{path}: no solved layer to write")
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already; choose another name, or allow to replace it")
    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, Any] = {}
    for name, solution in solutions.items():
        parts = {part: getattr(solution, part) for part in _PARTS}
        parts = {part: stored for part, stored in parts.items() if stored is not None}
        for part, stored in parts.items():
            tensors[f"{name}.{part}"] = np.frombuffer(stored.pack(), dtype=np.uint8)
        if solution.smooth is not None:
            tensors[f"{name}.smooth"] = solution.smooth.astype(np.float16)
        layers[name] = {fact: getattr(solution, fact) for fact in _FACTS} | {
            "parts": {
                part: {"format": str(stored.format), "shape": list(stored.shape)}
                for part, stored in parts.items()
            }
        }
    metadata = {"format": _FORMAT, "layers": json.dumps(layers), "meta": json.dumps(meta or {})}
    with replaced_file(path) as file:
        file.write(save(tensors, metadata=metadata))
    return path


class QuantizedModel(Mapping[str, Solution]):
    """Solved layers of a file; a layer's bytes are read when it is asked for."""

    def __init__(self, path: Path, layers: dict[str, Any], meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self._layers = layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, name: str) -> Solution:
        record = self._layers[name]
        with _opened(self.path) as file:
            keys = set(file.keys())
            try:
                parts = {
                    part: QuantizedTensor.unpack(
                        file.get_tensor(f"{name}.{part}").tobytes(),
                        parse_format(facts["format"]),
                        tuple(facts["shape"]),
                    )
                    for part, facts in record["parts"].items()
                }
                smooth = file.get_tensor(f"{name}.smooth") if f"{name}.smooth" in keys else None
                return Solution(
                    **{fact: record[fact] for fact in _FACTS},
                    **{part: parts.get(part) for part in _PARTS},
                    smooth=None if smooth is None else smooth.astype(np.float32),
                    trace=[],
                )
            except InputError as error:
                raise InputError(f"{self.path}: layer {name!r}: {error}") from None
            except Exception as error:
                raise InputError(
                    f"{self.path}: layer {name!r} is damaged: {str(error).splitlines()[0]}"
                ) from None


def read_quantized_model(path: str | Path) -> QuantizedModel:
    """Open what `write_quantized_model` wrote.

    Raises
    ------
    InputError
        If the file is missing, is no safetensors file or not of this layout.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"{path}: is not a quantized model of this program (format "
            f"{metadata.get('format')!r}, expected {_FORMAT!r})"
        )
    try:
        layers, meta = json.loads(metadata["layers"]), json.loads(metadata.get("meta", "{}"))
        for record in layers.values():
            _ = record["parts"]["main"]["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: its list of layers cannot be read; the file is damaged"
        ) from None
    return QuantizedModel(path, layers, meta)


def _opened(path: Path):
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
