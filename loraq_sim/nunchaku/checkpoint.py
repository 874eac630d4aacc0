"""Whole models as nunchaku (kernels) and deepcompressor (its quantizer) keep them, both ways.

Layers keep their names, but for q, k and v that share one R (`loraq_sim.solve_group`): kernels run
them as one layer, rows of q, k and v below each other (`FusedLayer`).

nunchaku: one safetensors file of `layer_tensors`; a fused layer is ``<attention>.to_qkv``. The
metadata key ``loraq_sim`` (JSON) says what is not in the tensors:
{name: {members: {layer: N}, k, rank, facts}}. Files of other programs lack it; their layers are
read as they are stored, padding included.

deepcompressor: a folder, which its own converter to nunchaku reads.

    model.pt   {NAME.weight: (N, K) fp16, the 4-bit part dequantized; NAME.bias}
    scale.pt   {NAME.weight.scale.0: (N, 1, K / 64, 1) fp16}
    smooth.pt  {NAME: (K,) fp16}
    branch.pt  {NAME: {a.weight: R (r, K), b.weight: L (N, r)}} fp16, on smoothed activations

Codes come back exactly: a weight is code * scale rounded to 11 bits, at most 2^-11 * 8 of a step
away from it. q, k and v that share R have one branch and one smoothing under the name of q, with
the rows of L below each other.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from loraq_sim.dumps.stored import first_line
from loraq_sim.dumps.torch_file import load_object
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing, replaced_file, require_regular_file
from loraq_sim.formats import parse_format
from loraq_sim.nunchaku.layer_tensors import (
    BRANCH_FORMAT,
    GROUP,
    MAIN_FORMAT,
    check_fits,
    described,
    layer_tensors,
    plain_factor,
    read_layer,
    stored_scales,
)
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution
from loraq_sim.solvers.main_grid import stack_rows, take_rows
from loraq_sim.solvers.problem import Branches
from loraq_sim.solvers.solution import share_out

__all__ = ["read_deepcompressor", "read_nunchaku", "write_deepcompressor", "write_nunchaku"]

_KEY = "loraq_sim"
# Layers that kernels run as one, and its name; FLUX and SD3 have a second trio for the text.
_TRIOS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_PADDED = "padded"
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
        fused, trio = _trio(name, solutions)
        taken.update(trio)
        bias = [biases.get(member) for member in trio]
        yield FusedLayer(
            name=fused,
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


def _trio(name: str, solutions: Mapping[str, Solution]) -> tuple[str, list[str]]:
    """The fused layer of `name` and q, k and v in it where they share R, else `name` alone."""
    parent, _, last = name.rpartition(".")
    for fused, order in _TRIOS.items():
        trio = [f"{parent}.{part}" for part in order]
        if parent and last in order and all(member in solutions for member in trio):
            found = [solutions[member] for member in trio]
            if all(_share_right(found[0], other) for other in found[1:]):
                return f"{parent}.{fused}", trio
    return name, [name]


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
    others: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, object] | None = None,
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
    others : mapping of tensor name to ndarray, optional
        Tensors of the model that are not quantized, carried along.
    config : mapping, optional
        The model's ``config.json``; metadata ``config`` and ``model_class`` of the file.
    overwrite : bool

    Raises
    ------
    InputError
        If a layer is none that the kernels can run, a tensor carried along has the name of one
        that is written, or the file is there.
    """
    path = Path(path)
    if not solutions:
        raise InputError(f"{path}: no solved layer to write")
    refuse_existing(path, overwrite=overwrite)
    tensors: dict[str, np.ndarray] = {}
    notes: dict[str, Any] = {}
    for layer in fused_layers(solutions, biases or {}):
        rows = tuple(layer.members.values())
        stored = layer_tensors(layer.name, layer.solution, layer.bias, rows)
        tensors |= {f"{layer.name}.{key}": value for key, value in stored.items()}
        notes[layer.name] = layer.note() | {_PADDED: True}
    for name, values in (others or {}).items():
        if name in tensors:
            raise InputError(f"{path}: {name!r} is a tensor of a quantized layer, too")
        tensors[name] = values
    said = described([solution.rank for solution in solutions.values()], config or {})
    with replaced_file(path) as file:
        file.write(save(tensors, metadata={_KEY: json.dumps(notes)} | said))
    return path


def read_nunchaku(
    path: str | Path, *, left_out: list[str] | None = None
) -> tuple[dict[str, Solution], dict[str, np.ndarray]]:
    """Solutions and biases by layer name of a file in nunchaku's layout, in fp16 or bf16.

    Layers that quantize weights alone (AWQ, such as FLUX's adaLN) and those that are not quantized
    are no W4A4 layers; names of the former are appended to `left_out`.

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
    weights_only = [name for name, parts in by_layer.items() if "wzeros" in parts]
    for name in weights_only:
        del by_layer[name]
    if left_out is not None:
        left_out.extend(weights_only)
    if not by_layer and weights_only:
        raise InputError(
            f"{path}: its {len(weights_only)} layers, such as {weights_only[0]!r:.100}, quantize "
            "weights alone (AWQ); no W4A4 layer is in it"
        )
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
    # Files of earlier versions fill up after the last member alone.
    rows = tuple(members.values()) if note.get(_PADDED) else ()
    parts, bias = read_layer(name, tensors, shape, int(note["rank"]), rows)
    return FusedLayer(
        name=name, solution=as_solution(parts), bias=bias, members=members, facts=note["facts"]
    )


_FILES = ("model", "scale", "smooth", "branch")
_SCALE = ".weight.scale.0"


def write_deepcompressor(
    folder: str | Path,
    solutions: Mapping[str, Solution],
    *,
    biases: Mapping[str, np.ndarray | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the four files of a deepcompressor checkpoint into `folder`.

    Raises
    ------
    InputError
        If a layer is not int4/g64 with an fp16 branch, K is no multiple of 64, or files are there.
    """
    import torch

    folder = Path(folder)
    refuse_existing(*(folder / f"{name}.pt" for name in _FILES), overwrite=overwrite)
    if not solutions:
        raise InputError(f"{folder}: no solved layer to write")
    content: dict[str, dict[str, Any]] = {name: {} for name in _FILES}
    for layer in fused_layers(solutions, biases or {}):
        _add(content, layer)
    make_folder(folder)
    # None of the four takes its place before all are written.
    with ExitStack() as files:
        for name, tensors in content.items():
            torch.save(tensors, files.enter_context(replaced_file(folder / f"{name}.pt")))
    return folder


def _add(content: dict[str, dict[str, Any]], layer: FusedLayer) -> None:
    name, k = next(iter(layer.members)), layer.solution.main.shape[1]
    check_fits(name, layer.solution, halves=(BRANCH_FORMAT,))
    if k % GROUP:
        raise InputError(
            f"layer {name!r}: K={k} is no multiple of {GROUP}, which deepcompressor needs; "
            "the nunchaku layout pads"
        )
    for member, (solution, bias) in split_layer(layer).items():
        scales = stored_scales(solution.main)
        content["model"][f"{member}.weight"] = _half(solution.main.dequantize())
        if layer.bias is not None:
            content["model"][f"{member}.bias"] = _half(bias)
        content["scale"][member + _SCALE] = _half(scales[:, None, :, None])
    solution = layer.solution
    if solution.smooth is not None:
        content["smooth"][name] = _half(solution.smooth)
    if solution.left is not None and solution.right is not None:
        left, right = solution.left.codes, solution.right.codes
        content["branch"][name] = {"a.weight": _half(right), "b.weight": _half(left)}


def read_deepcompressor(folder: str | Path) -> tuple[dict[str, Solution], dict[str, np.ndarray]]:
    """Solutions and biases by layer name of a checkpoint folder; no code of the files runs.

    Raises
    ------
    InputError
        If a file is missing or is no such file; the message names it.
    """
    folder = Path(folder)
    model, scale, smooth, branch = (_loaded(folder / f"{name}.pt", name) for name in _FILES)
    names = [key.removesuffix(_SCALE) for key in scale if key.endswith(_SCALE)]
    if not names:
        raise InputError(f"{folder / 'scale.pt'}: holds no key that ends in {_SCALE}")
    try:
        mains = {name: _main(name, model, scale[name + _SCALE]) for name in names}
        biases = {name: _bias(model, name, len(mains[name].codes)) for name in names}
        solutions: dict[str, Solution] = {}
        for home in names:
            members = {
                name: _solution(mains[name], left, right, smooth.get(home))
                for name, left, right in _branches(home, mains, branch)
            }
            common = ("right", "smooth") if len(members) > 1 else ()
            solutions |= share_out(members, common)
        return {name: solutions[name] for name in names}, biases
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: the checkpoint is damaged: {first_line(error)}") from None


def _loaded(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        if name in ("smooth", "branch"):
            return {}
        raise InputError(f"{path}: no such file")
    found = load_object(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, expected a dict of tensors")
    return found


def _main(name: str, model: dict[str, Any], scale: Any) -> QuantizedTensor:
    weight = model[f"{name}.weight"].float().numpy()
    weight = weight.reshape(len(weight), -1)
    scales = scale.float().numpy().reshape(len(weight), -1)
    if weight.shape[1] != GROUP * scales.shape[1]:
        raise InputError(
            f"layer {name!r}: a weight of {weight.shape} with {scales.shape[1]} scales a row is "
            f"not in groups of {GROUP}"
        )
    steps = np.repeat(scales, GROUP, axis=1)
    codes = np.rint(np.divide(weight, steps, out=np.zeros_like(weight), where=steps != 0))
    if not (np.isfinite(codes).all() and codes.min() >= -8 and codes.max() <= 7):
        raise InputError(f"layer {name!r}: the weight is not made of 4-bit codes of its scales")
    fmt = parse_format(MAIN_FORMAT)
    return QuantizedTensor(codes=codes.astype(np.int8), scales=scales, format=fmt)


def _bias(model: dict[str, Any], name: str, n: int) -> np.ndarray:
    bias = model.get(f"{name}.bias")
    return np.zeros(n, np.float32) if bias is None else bias.float().numpy()


def _branches(
    home: str, mains: Mapping[str, QuantizedTensor], branch: Mapping[str, Any]
) -> Iterator[tuple[str, QuantizedTensor | None, QuantizedTensor | None]]:
    """(layer, L, R) of the layers whose branch lies under the name `home`."""
    n = len(mains[home].codes)
    if home not in branch:
        first = f"{home.rpartition('.')[0]}.to_q"
        if home.endswith((".to_k", ".to_v")) and _is_common(first, mains, branch):
            return
        yield home, None, None
        return
    right = _plain(branch[home]["a.weight"])
    left = branch[home]["b.weight"]
    if len(left) == n:
        yield home, _plain(left), right
        return
    parent, start = home.rpartition(".")[0], 0
    for name in (home, f"{parent}.to_k", f"{parent}.to_v"):
        rows = len(mains[name].codes)
        yield name, _plain(left[start : start + rows]), right
        start += rows


def _is_common(home: str, mains: Mapping[str, QuantizedTensor], branch: Mapping[str, Any]) -> bool:
    return home in branch and len(branch[home]["b.weight"]) > len(mains[home].codes)


def _solution(
    main: QuantizedTensor, left: QuantizedTensor | None, right: QuantizedTensor | None, smooth: Any
) -> Solution:
    factors = None if smooth is None else smooth.float().numpy()
    return as_solution(Branches(main=main, left=left, right=right, smooth=factors))


def _plain(values: Any) -> QuantizedTensor:
    return plain_factor(values.half().numpy())


def _half(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float16))
