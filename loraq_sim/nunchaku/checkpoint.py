"""A whole model in nunchaku's key layout: one safetensors file of `layer_tensors`.

Layers keep their names, but for q, k and v that share one R (`loraq_sim.solve_group`): kernels run
them as one layer ``<attention>.to_qkv``, rows of q, k and v below each other (`FusedLayer`). The
metadata key ``loraq_sim`` (JSON) says what is not in the tensors:
{name: {members: {layer: N}, k, rank, facts}}. Files of other programs lack it; their layers are
read as they are stored, padding included.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing, replaced_file, require_regular_file
from loraq_sim.nunchaku.layer_tensors import layer_tensors, read_layer
from loraq_sim.solvers import Solution
from loraq_sim.solvers.main_grid import stack_rows, take_rows
from loraq_sim.solvers.problem import Branches
from loraq_sim.solvers.solve import share_out

__all__ = [
    "FusedLayer",
    "as_solution",
    "fused_layers",
    "read_nunchaku",
    "split_layer",
    "write_nunchaku",
]

_KEY = "loraq_sim"
_ORDER = ("to_q", "to_k", "to_v")
_FUSED = "to_qkv"
_FACTS = ("method", "preset", "seed", "weight_error", "seconds")
# Facts of a solution that other programs do not store.
_UNKNOWN: dict[str, Any] = dict(zip(_FACTS, ("", "", 0, 0.0, 0.0), strict=True))


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """One layer of the kernels: ``members`` maps the layers in it to their rows, in order."""

    name: str
    solution: Solution
    bias: np.ndarray | None
    members: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def note(self) -> dict[str, Any]:
        """What a file has to say beside the tensors."""
        return {
            "members": dict(self.members),
            "k": self.solution.main.shape[1],
            "rank": self.solution.rank,
            "facts": dict(self.facts),
        }


def as_solution(parts: Branches, facts: Mapping[str, Any] | None = None) -> Solution:
    """The solution of stored `parts`; `facts` of it that a file does not say are empty or 0."""
    known = _UNKNOWN | dict(facts or {})
    return Solution(
        method=known["method"],
        preset=known["preset"],
        seed=known["seed"],
        weight_error=known["weight_error"],
        seconds=known["seconds"],
        main=parts.main,
        left=parts.left,
        right=parts.right,
        smooth=parts.smooth,
        trace=[],
    )


def fused_layers(
    solutions: Mapping[str, Solution], biases: Mapping[str, np.ndarray | None]
) -> Iterator[FusedLayer]:
    """The layers of a model in order; q, k and v come together where they share R."""
    taken: set[str] = set()
    for name in solutions:
        if name in taken:
            continue
        trio = _trio(name, solutions)
        taken.update(trio)
        bias = [biases.get(member) for member in trio]
        yield FusedLayer(
            name=name if len(trio) == 1 else f"{name.rpartition('.')[0]}.{_FUSED}",
            solution=_stacked([solutions[member] for member in trio]),
            bias=None if all(b is None for b in bias) else _stacked_bias(bias, trio, solutions),
            members={member: solutions[member].main.shape[0] for member in trio},
            facts={m: {fact: getattr(solutions[m], fact) for fact in _FACTS} for m in trio},
        )


def split_layer(layer: FusedLayer) -> dict[str, tuple[Solution, np.ndarray]]:
    """The members of a layer, each with its bias, zeros where the layer has none.

    R and smoothing are one object for all.
    """
    start, solution = 0, layer.solution
    bias = np.zeros(solution.main.shape[0], np.float32) if layer.bias is None else layer.bias
    found: dict[str, tuple[Solution, np.ndarray]] = {}
    for member, n_rows in layer.members.items():
        rows = slice(start, start + n_rows)
        start += n_rows
        part = Branches(
            main=take_rows(solution.main, rows),
            left=None if solution.left is None else take_rows(solution.left, rows),
            right=solution.right,
            smooth=solution.smooth,
        )
        found[member] = (as_solution(part, layer.facts.get(member)), bias[rows])
    if len(found) == 1:
        return found
    shared = share_out({name: part for name, (part, _) in found.items()}, ("right", "smooth"))
    return {name: (part, found[name][1]) for name, part in shared.items()}


def _trio(name: str, solutions: Mapping[str, Solution]) -> list[str]:
    """q, k and v of the attention of `name` where all three share R, else `name` alone."""
    parent, _, last = name.rpartition(".")
    trio = [f"{parent}.{part}" for part in _ORDER]
    if not parent or last not in _ORDER or not all(member in solutions for member in trio):
        return [name]
    found = [solutions[member] for member in trio]
    is_shared = all(_share_right(found[0], other) for other in found[1:])
    return trio if is_shared else [name]


def _share_right(one: Solution, other: Solution) -> bool:
    """Whether R and smoothing are the same, bit for bit: files bring back equal objects."""
    if one.right is None or other.right is None or (one.smooth is None) != (other.smooth is None):
        return False
    is_same = one.right.pack() == other.right.pack() and one.right.shape == other.right.shape
    return is_same and (one.smooth is None or bool((one.smooth == other.smooth).all()))


def _stacked(solutions: list[Solution]) -> Solution:
    first = solutions[0]
    if len(solutions) == 1:
        return first
    # Layers that share R have a left factor each.
    lefts = [solution.left for solution in solutions if solution.left is not None]
    return dataclasses.replace(
        first,
        main=stack_rows([solution.main for solution in solutions]),
        left=stack_rows(lefts),
        trace=[],
        branch_noise=None,
        charged={},
    )


def _stacked_bias(
    biases: list[np.ndarray | None], names: list[str], solutions: Mapping[str, Solution]
) -> np.ndarray:
    sizes = [solutions[name].main.shape[0] for name in names]
    filled = [
        np.zeros(size, np.float32) if bias is None else bias
        for bias, size in zip(biases, sizes, strict=True)
    ]
    return np.concatenate(filled)


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
    path = Path(path)
    require_regular_file(path, "quantized model")
    try:
        with safe_open(path, framework="numpy") as file:
            notes = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            by_layer: dict[str, dict[str, np.ndarray]] = {}
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                name, _, part = key.rpartition(".")
                dtype = file.get_slice(key).get_dtype()
                if dtype.startswith("F8"):
                    # NumPy has no such type, and the codes are of NVFP4, which is not read here.
                    raise InputError(f"{key!r} is {dtype}: NVFP4 layers are not read")
                by_layer.setdefault(name, {})[part] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    by_layer = {name: parts for name, parts in by_layer.items() if "qweight" in parts}
    if not by_layer:
        raise InputError(f"{path}: holds no layer in nunchaku's layout (no key ends in .qweight)")
    if not isinstance(notes, dict):
        raise InputError(f"{path}: its metadata {_KEY!r} must be a JSON object, got {notes!r:.40}")
    solutions: dict[str, Solution] = {}
    biases: dict[str, np.ndarray] = {}
    # safetensors sorts its keys; the notes have the order of the model.
    for name in dict.fromkeys((*(name for name in notes if name in by_layer), *by_layer)):
        try:
            found = split_layer(_read(name, by_layer[name], notes.get(name)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        # Notes of strangers hold any JSON at any place: infinities, numbers for objects.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path}: layer {name!r} is damaged: {first_line(error)}") from None
        for member, (solution, bias) in found.items():
            solutions[member], biases[member] = solution, bias
    return solutions, biases


def _read(name: str, tensors: dict[str, np.ndarray], note: dict[str, Any] | None) -> FusedLayer:
    if note is None:
        parts, bias = read_layer(name, tensors)
        members = {name: parts.main.shape[0]}
        return FusedLayer(name=name, solution=as_solution(parts), bias=bias, members=members)
    members = {str(member): int(rows) for member, rows in note["members"].items()}
    if not members or min(members.values()) < 1:
        raise InputError(f"layer {name!r}: members must have rows, got {members!r:.80}")
    shape = sum(members.values()), int(note["k"])
    parts, bias = read_layer(name, tensors, shape, int(note["rank"]))
    return FusedLayer(
        name=name, solution=as_solution(parts), bias=bias, members=members, facts=note["facts"]
    )
