"""Quantized models on disk: one safetensors file, read back bit for bit.

Layout, for each layer ``NAME``:

- ``NAME.main``, ``NAME.left``, ``NAME.right``: uint8, the bytes of `QuantizedTensor.pack` (codes,
  scales, zero points or tensor scale); no factors without a branch; ``NAME.feedback`` and
  ``NAME.feedback_left`` likewise, only with a residual input (`loraq_sim.solvers.residual`);
- ``NAME.smooth``: float16 of shape (K,), only with smoothing; the branches then approximate
  W diag(smooth) and activations are divided by it. With ``rotation`` B in the metadata, the
  channels are mixed by the Hadamard matrix of order B after that (`loraq_sim.conditioning`).

Metadata (strings): ``format`` is ``loraq-sim-quantized-v1``; ``layers`` is a JSON object
``{NAME: {method, preset, seed, weight_error, seconds, parts: {main: {format, shape}, ...}}}``;
``meta`` is a JSON object of the writer's. A layer may also have ``rotation``: B; ``grid``: the
letter of the inputs' grid, where `solve` chose it; ``charged``: {part: bytes}, its share of what
layers with a common input store once; and ``common``: {part: NAME}, the layer under whose name such
a part lies.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from loraq_sim.conditioning import hadamard_block
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing, replaced_file, require_regular_file
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution
from loraq_sim.solvers.solution import QUANTIZED_PARTS

__all__ = ["QuantizedModel", "read_quantized_model", "write_quantized_model"]

_FORMAT = "loraq-sim-quantized-v1"
_FACTS = {
    "method": "text",
    "preset": "text",
    "seed": "whole number",
    "weight_error": "number",
    "seconds": "number",
}
_TYPES = {"text": (str,), "whole number": (int,), "number": (int, float)}


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
    path = Path(path)
    if not solutions:
        raise InputError(f"{path}: no solved layer to write")
    refuse_existing(path, overwrite=overwrite)
    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, Any] = {}
    for name, solution in solutions.items():
        common = _stored_elsewhere(name, solution, solutions)
        tensors |= {
            f"{name}.{part}": stored
            for part, stored in _tensors(solution).items()
            if part not in common
        }
        layers[name] = _record(solution, common)
    metadata = {"format": _FORMAT, "layers": json.dumps(layers), "meta": json.dumps(meta or {})}
    with replaced_file(path) as file:
        file.write(save(tensors, metadata=metadata))
    return path


def _tensors(solution: Solution) -> dict[str, np.ndarray]:
    tensors = {
        part: np.frombuffer(stored.pack(), dtype=np.uint8)
        for part, stored in solution.parts.items()
    }
    if solution.smooth is not None:
        tensors["smooth"] = solution.smooth.astype(np.float16)
    return tensors


def _stored_elsewhere(
    name: str, solution: Solution, solutions: Mapping[str, Solution]
) -> dict[str, str]:
    """Parts that an earlier layer holds as the same object, with that layer's name."""
    common = {}
    for part in solution.charged:
        stored = getattr(solution, part)
        holder = next(n for n, other in solutions.items() if getattr(other, part) is stored)
        if holder != name:
            common[part] = holder
    return common


def _record(solution: Solution, common: dict[str, str]) -> dict[str, Any]:
    record = {fact: getattr(solution, fact) for fact in _FACTS}
    record["parts"] = {
        part: {"format": str(stored.format), "shape": list(stored.shape)}
        for part, stored in solution.parts.items()
    }
    if solution.rotation is not None:
        record["rotation"] = solution.rotation
    if solution.grid is not None:
        record["grid"] = solution.grid
    if solution.charged:
        record |= {"charged": dict(solution.charged), "common": common}
    return record


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

    def __repr__(self) -> str:
        return f"QuantizedModel({str(self.path)!r}, {len(self)} layers)"

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import model_card

        return model_card(self.path, self._layers)

    def __getitem__(self, name: str) -> Solution:
        record = self._layers[name]
        homes = {part: name for part in (*QUANTIZED_PARTS, "smooth")} | record.get("common", {})
        with _opened(self.path) as file:
            keys = set(file.keys())
            try:
                parts = {
                    part: _part(file.get_tensor(f"{homes[part]}.{part}").tobytes(), part, facts)
                    for part, facts in record["parts"].items()
                }
                if unknown := parts.keys() - set(QUANTIZED_PARTS):
                    raise TypeError(f"unknown parts {sorted(unknown)!r:.60}")
                key = f"{homes['smooth']}.smooth"
                smooth: np.ndarray | None = file.get_tensor(key) if key in keys else None
                main = parts["main"]
                _check_fit(parts, smooth)
                _check_facts(record)
                return Solution(
                    method=record["method"],
                    preset=record["preset"],
                    seed=record["seed"],
                    weight_error=record["weight_error"],
                    seconds=record["seconds"],
                    main=main,
                    left=parts.get("left"),
                    right=parts.get("right"),
                    feedback=parts.get("feedback"),
                    feedback_left=parts.get("feedback_left"),
                    smooth=None if smooth is None else smooth.astype(np.float32),
                    trace=[],
                    rotation=_rotation(record, main.shape[1]),
                    grid=_grid(record),
                    charged=record.get("charged", {}),
                )
            except InputError as error:
                raise InputError(f"{self.path}: layer {name!r:.100}: {error}") from None
            except Exception as error:
                raise InputError(
                    f"{self.path}: layer {name!r:.100} is damaged: {first_line(error)}"
                ) from None


def _part(data: bytes, part: str, facts: Mapping[str, Any]) -> QuantizedTensor:
    shape = tuple(facts["shape"])
    if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**40 for size in shape):
        raise InputError(f"{part} must have two positive sizes, got {shape!r:.80}")
    # Damaged scales overflow; they are reported in the next lines, so NumPy need not warn.
    with np.errstate(all="ignore"):
        found = QuantizedTensor.unpack(data, parse_format(facts["format"]), shape)
        is_finite = np.isfinite(found.dequantize()).all()
    if not is_finite:
        raise InputError(f"{part} holds values that are NaN or Inf")
    return found


def _check_fit(parts: Mapping[str, QuantizedTensor], smooth: np.ndarray | None) -> None:
    n, k = parts["main"].shape
    for columns, rows, what in (
        ("left", "right", "a branch"),
        ("feedback_left", "feedback", "a residual input"),
    ):
        left, right = parts.get(columns), parts.get(rows)
        if left is not None and right is not None:
            rank = left.shape[1]
            if (left.shape, right.shape) != ((n, rank), (rank, k)):
                raise InputError(
                    f"factors of shape {left.shape} and {right.shape} do not fit a weight of "
                    f"{(n, k)}"
                )
        elif left is not None or right is not None:
            raise InputError(f"has one factor of {what}, but not the other")
    feedback = parts.get("feedback")
    if feedback is not None and feedback.format.granularity in ("row", "group"):
        raise InputError(
            f"feedback is stored in {feedback.format}, whose scales serve one of its two products "
            "only; needs blocks, such as int8/b64"
        )
    if smooth is None:
        return
    if smooth.shape != (k,) or smooth.dtype != np.float16:
        raise InputError(f"smooth has shape {smooth.shape} ({smooth.dtype}); needs ({k},) float16")
    if not (np.isfinite(smooth) & (smooth > 0)).all():
        raise InputError("smooth holds values that are not positive numbers")


def _check_facts(record: Mapping[str, Any]) -> None:
    for fact in _FACTS:
        value, wanted = record[fact], _FACTS[fact]
        is_right = isinstance(value, _TYPES[wanted]) and not isinstance(value, bool)
        if not is_right or (not isinstance(value, str) and not -(2.0**63) < value < 2.0**63):
            raise InputError(f"{fact} must be of type {wanted}, got {value!r:.60}")


def _rotation(record: dict[str, Any], k: int) -> int | None:
    block = record.get("rotation")
    return None if block is None else hadamard_block(f"hadamard:{block}", k)


def _grid(record: dict[str, Any]) -> str | None:
    grid = record.get("grid")
    if grid not in (None, "", "s", "u"):
        raise InputError(f"grid must be a letter of activations ('', 's' or 'u'), got {grid!r:.60}")
    return grid


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
            f"{metadata.get('format')!r:.60}, expected {_FORMAT!r})"
        )
    try:
        layers, meta = json.loads(metadata["layers"]), json.loads(metadata.get("meta", "{}"))
        for record in layers.values():
            _ = record["parts"]["main"]["format"]
        if not isinstance(meta, dict) or not all(name.isprintable() for name in layers):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path}: its list of layers cannot be read; the file is damaged"
        ) from None
    return QuantizedModel(path, layers, meta)


def _opened(path: Path) -> safe_open:
    try:
        require_regular_file(path, "quantized model")
        return safe_open(path, framework="numpy")
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{str(path)!r:.300}: {first_line(error)}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {first_line(error)}") from None
