"""Whole models as nunchaku's kernels want them, both ways.

Layers keep their names, but for q, k and v that share one R (`loraq_sim.solve_group`): kernels run
them as one layer, rows of q, k and v below each other (`FusedLayer`).

A file is one safetensors file of `layer_tensors`; a fused layer is ``<attention>.to_qkv``. The
metadata key ``loraq_sim`` (JSON) says what is not in the tensors:
{name: {members: {layer: N}, k, rank, facts, shift}}. Files of other programs lack it; their layers
are read as they are stored, padding included, under the names of diffusers: those of nunchaku's
files before 1.0 (``qkv_proj``, ``mlp_fc1``; SANA's ``inverted_conv``) are translated, and q, k and
v in one are parted into thirds.

Layers that read what GELU left get their inputs shifted (`gelu_shifts`).
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from loraq_sim.dumps.array_files import safetensors_tensors
from loraq_sim.dumps.kinds import kinds_of
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing, replaced_file, require_regular_file
from loraq_sim.formats import parse_format
from loraq_sim.layers import is_after_gelu
from loraq_sim.nunchaku.layer_tensors import (
    FLOAT_FORMAT,
    GELU_SHIFT,
    GROUP,
    described,
    layer_tensors,
    read_layer,
)
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution
from loraq_sim.solvers.main_grid import stack_rows, take_rows
from loraq_sim.solvers.problem import Branches
from loraq_sim.solvers.solution import share_out

__all__ = [
    "FusedLayer",
    "as_solution",
    "fused_layers",
    "gelu_shifts",
    "read_nunchaku",
    "recoded",
    "shift_by_all",
    "shifted_bias",
    "split_layer",
    "write_nunchaku",
]

_KEY = "loraq_sim"
# Layers that kernels run as one, and its name; FLUX and SD3 have a second trio for the text.
_TRIOS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_PADDED = "padded"
# Names of nunchaku's files before 1.0 (FLUX, then SANA), and those of diffusers.
_OF_FLUX = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
}
_OF_FLUX_SINGLE = {
    "qkv_proj": "attn.to_qkv",
    "out_proj": "proj_out.linears.0",
    "attn.to_out": "proj_out.linears.0",
    "mlp_fc1": "proj_mlp",
    "mlp_fc2": "proj_out.linears.1",
}
_OF_SANA = {
    "attn.qkv_proj": "attn1.to_qkv",
    "attn.out_proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.out_proj": "attn2.to_out.0",
    "ff.inverted_conv": "ff.conv_inverted",
    "ff.point_conv": "ff.conv_point",
}
_BLOCK = re.compile(r"(?P<block>(?P<single>single_)?transformer_blocks\.\d+\.)(?P<layer>.+)")
# Models whose kernels shift what GELU left; others gate with SiLU, or multiply what they gate.
_SHIFTING = re.compile(r"Flux|QwenImage|Chroma")
_AFTER_GELU = re.compile(r"mlp_fc2$|mlp_context_fc2$|(?:ff|ff_context|img_mlp|txt_mlp)\.net\.2$")
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
    units: tuple[float, ...] = ()
    shift: float = 0.0

    def note(self) -> dict[str, Any]:
        """What a file has to say beside the tensors."""
        said = {
            "members": dict(self.members),
            "k": self.solution.main.shape[1],
            "rank": self.solution.rank,
            "facts": dict(self.facts),
        }
        return said | ({"shift": self.shift} if self.shift else {})


def gelu_shifts(solutions: Mapping[str, Solution]) -> dict[str, float]:
    """Shifts of layers that read what GELU left: the second of a feed-forward part, in integers.

    Whether the first gates (GEGLU) its size tells: it has twice the outputs then.
    """
    kinds, found = kinds_of(solutions), {}
    for name, solution in solutions.items():
        first = solutions.get(f"{name.removesuffix('.2')}.0.proj")
        is_plain = first is not None and first.main.shape[0] == solution.main.shape[1]
        is_integer = str(solution.main.format) != FLOAT_FORMAT
        if name.endswith(".net.2") and is_after_gelu(kinds[name]) and is_plain and is_integer:
            found[name] = GELU_SHIFT
    return found


def shifted_bias(solution: Solution, bias: np.ndarray | None, shift: float) -> np.ndarray | None:
    """What is added to Q (x + shift) instead of the bias to Q x: bias - Q (shift / smooth)."""
    if not shift:
        return bias
    smooth = np.float32(1) if solution.smooth is None else solution.smooth
    n, k = solution.main.shape
    moved = solution.main.dequantize().astype(np.float64) @ np.broadcast_to(shift / smooth, k)
    plain = np.zeros(n) if bias is None else bias.astype(np.float64)
    return (plain - moved).astype(np.float32)


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


def shift_by_all(solution: Solution, bias: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """`bias` plus what the whole weight, branch and all, makes of a shift of the inputs."""
    whole = solution.reconstruct().astype(np.float64)
    return (bias + whole @ np.broadcast_to(shift.reshape(-1), whole.shape[1])).astype(np.float32)


def recoded(
    name: str, weight: np.ndarray, scales: np.ndarray, unit: float | None, half: str
) -> QuantizedTensor:
    """A 4-bit part from its values and scales (N, groups): int4, or NVFP4 where it has a `unit`.

    Raises
    ------
    InputError
        If the values are not those of 4-bit codes of the scales.
    """
    fmt = parse_format(FLOAT_FORMAT if unit is not None else f"int4/g{GROUP}/{half}")
    group, scales = int(fmt.group_size or 1), scales * np.float32(1 if unit is None else unit)
    if weight.shape[1] != group * scales.shape[1]:
        raise InputError(
            f"layer {name!r}: a weight of {weight.shape} with {scales.shape[1]} scales a row is "
            f"not in groups of {group}"
        )
    steps = np.repeat(scales, group, axis=1)
    exact = np.divide(weight, steps, out=np.zeros_like(weight), where=steps != 0)
    # A value is rounded to 11 bits, or to 8: codes are next to what it gives.
    codes = np.rint(exact) if unit is None else exact.astype(ml_dtypes.float4_e2m1fn)
    off = np.abs(codes.astype(np.float32) - exact).max()
    if not (
        np.isfinite(exact).all() and off < 0.1 and np.abs(exact + (unit is None) / 2).max() < 8
    ):
        raise InputError(f"layer {name!r}: the weight is not made of 4-bit codes of its scales")
    if unit is None:
        return QuantizedTensor(codes=codes.astype(np.int8), scales=scales, format=fmt)
    return QuantizedTensor(codes=codes, scales=scales, format=fmt, tensor_scale=np.float32(unit))


def fused_layers(
    solutions: Mapping[str, Solution],
    biases: Mapping[str, np.ndarray | None],
    shifts: Mapping[str, float] | None = None,
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
            units=tuple(float(solutions[member].main.tensor_scale or 1) for member in trio),
            shift=(shifts or {}).get(name, 0.0),
        )


def split_layer(layer: FusedLayer) -> dict[str, tuple[Solution, np.ndarray]]:
    """The members of a layer, each with its bias, zeros where the layer has none.

    R and smoothing are one object for all.
    """
    start, solution = 0, layer.solution
    bias = np.zeros(solution.main.shape[0], np.float32) if layer.bias is None else layer.bias
    found: dict[str, tuple[Solution, np.ndarray]] = {}
    for number, (member, n_rows) in enumerate(layer.members.items()):
        rows = slice(start, start + n_rows)
        start += n_rows
        main = take_rows(solution.main, rows)
        if main.tensor_scale is not None:
            main = dataclasses.replace(main, tensor_scale=np.float32(layer.units[number]))
        part = Branches(
            main=main,
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
    shifts: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write solved layers as nunchaku's kernels want them.

    Parameters
    ----------
    path : str or Path
        File to write, ``.safetensors``.
    solutions : mapping of layer name to Solution
        Main branch int4/g64 with 16-bit scales, or nvfp4; branch of 16 bits or none; no rotation.
    biases : mapping of layer name to ndarray of shape (N,), optional
        Zeros by default: solutions hold none.
    others : mapping of tensor name to ndarray, optional
        Tensors of the model that are not quantized, carried along.
    config : mapping, optional
        The model's ``config.json``; metadata ``config`` and ``model_class`` of the file.
    shifts : mapping of layer name to float, optional
        What kernels add to the inputs of a layer, which its bias takes back; by default that of
        `gelu_shifts`.
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
    shifts = gelu_shifts(solutions) if shifts is None else shifts
    for layer in fused_layers(solutions, biases or {}, shifts):
        rows = tuple(layer.members.values())
        bias = shifted_bias(layer.solution, layer.bias, layer.shift)
        stored = layer_tensors(layer.name, layer.solution, bias, rows, layer.units)
        tensors |= {f"{layer.name}.{key}": value for key, value in stored.items()}
        notes[layer.name] = layer.note() | {_PADDED: True}
    for name, values in (others or {}).items():
        if name in tensors:
            raise InputError(f"{path}: {name!r} is a tensor of a quantized layer, too")
        tensors[name] = values
    is_float = any(str(solution.main.format) == FLOAT_FORMAT for solution in solutions.values())
    ranks = [solution.rank for solution in solutions.values()]
    said = described(ranks, config or {}, is_float=is_float)
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
            metadata = file.metadata() or {}
        notes = json.loads(metadata.get(_KEY, "{}"))
        by_layer: dict[str, dict[str, Any]] = {}
        for key, tensor in safetensors_tensors(path).items():
            name, _, part = key.rpartition(".")
            by_layer.setdefault(name, {})[part] = tensor
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
            stored = {part: tensor.load() for part, tensor in by_layer[name].items()}
            layer = _read(name, stored, notes.get(name), metadata.get("model_class", ""))
            found = split_layer(layer)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        # Notes of strangers hold any JSON at any place: infinities, numbers for objects.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path}: layer {name!r} is damaged: {first_line(error)}") from None
        for member, (solution, bias) in found.items():
            solutions[member], biases[member] = solution, bias
    return solutions, biases


def _read(
    name: str, tensors: dict[str, np.ndarray], note: dict[str, Any] | None, model_class: str
) -> FusedLayer:
    if note is None:
        members = _members_of(name, tensors["qweight"].shape[0])
        parts, bias, units = read_layer(name, tensors, rows=tuple(members.values()))
        is_older = name.endswith(("mlp_fc2", "mlp_context_fc2"))
        is_after = _AFTER_GELU.search(name) and (is_older or _SHIFTING.search(model_class))
        shift = GELU_SHIFT if is_after and not units else 0.0
        facts = {}
    else:
        members = {str(member): int(rows) for member, rows in note["members"].items()}
        if not members or min(members.values()) < 1:
            raise InputError(f"layer {name!r}: members must have rows, got {members!r:.80}")
        shape = sum(members.values()), int(note["k"])
        # Files of earlier versions fill up after the last member alone.
        rows = tuple(members.values()) if note.get(_PADDED) else ()
        parts, bias, units = read_layer(name, tensors, shape, int(note["rank"]), rows)
        shift, facts = float(note.get("shift", 0)), note["facts"]
        if not abs(shift) < 1e4:
            raise InputError(f"layer {name!r}: a shift of {shift!r:.20}")
    solution = as_solution(parts)
    return FusedLayer(
        name=name,
        solution=solution,
        bias=shifted_bias(solution, bias, -shift),
        members=members,
        facts=facts,
        units=units,
    )


def _members_of(name: str, n_rows: int) -> dict[str, int]:
    """Layers in one of a file that does not say them, under the names of diffusers."""
    found, plain = _BLOCK.fullmatch(name), name
    if found is not None:
        known = _OF_FLUX_SINGLE if found["single"] else _OF_FLUX | _OF_SANA
        plain = found["block"] + known.get(found["layer"], found["layer"])
    parent, _, last = plain.rpartition(".")
    if last in _TRIOS and n_rows % 3 == 0:
        return {f"{parent}.{member}": n_rows // 3 for member in _TRIOS[last]}
    return {plain: n_rows}
