"""Solved layers for other programs: deepcompressor's checkpoints, both ways, and ONNX graphs.

**deepcompressor**: a folder, which its own converter to nunchaku reads.

    model.pt   {NAME.weight: (N, K), the 4-bit part dequantized; NAME.bias}
    scale.pt   {NAME.weight.scale.0: (N, 1, K / 64, 1)}; in NVFP4 (1, 1, 1, 1), and scale.1 for 16
    smooth.pt  {NAME: (K,)}
    branch.pt  {NAME: {a.weight: R (r, K), b.weight: L (N, r)}}, on smoothed activations

All are fp16, or bf16 in files of others. Codes come back exactly: a weight is code * scale rounded
to 11 bits, at most 2^-11 * 8 of a step away from it. q, k and v that share R have one branch and
one smoothing under the name of q, with the rows of L below each other. A layer with shifted inputs
is NAME.linear, with NAME.shift beside it and bias - W shift as its bias, for all of W.

**ONNX**: each layer is a part of one graph, from ``NAME.x`` (M, K) to ``NAME.y`` (M, N), float32:
the steps of `loraq_sim.emulator.datapath`, node by node. Weights are int4 or int8 codes behind a
DequantizeLinear in blocks (opset 21), factors of a 16-bit branch floats. Inputs and P are rounded
by standard operators, with a dynamic scale for each token and group, to the codes of the data path.
Products are float32 sums, which no accumulator limits: what the runtime gives is the emulator's
output where nothing overflows, up to the order of float32 sums. Written are symmetric integers
(``intN``) by the absmax rule and plain floats; smoothing, rotation and residual inputs too.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.conditioning import rotate_channels
from loraq_sim.dumps.stored import first_line
from loraq_sim.dumps.torch_file import load_object
from loraq_sim.emulator.datapath import Datapath, Step, datapath_steps
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing, replaced_file
from loraq_sim.formats import Format
from loraq_sim.layers import Layer
from loraq_sim.nunchaku.checkpoint import (
    FusedLayer,
    as_solution,
    fused_layers,
    gelu_shifts,
    recoded,
    shift_by_all,
    split_layer,
)
from loraq_sim.nunchaku.layer_tensors import (
    BRANCH_FORMAT,
    GROUP,
    check_fits,
    plain_factor,
    stored_scales,
)
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution
from loraq_sim.solvers.problem import Branches
from loraq_sim.solvers.solution import share_out
from loraq_sim.split import PrecisionSplit, parse_split

__all__ = ["read_deepcompressor", "write_deepcompressor", "write_onnx_model"]

_OPSET = 21
_FLOATS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
_BINARY = {"smooth": "Div", "shift": "Add", "add": "Add", "subtract": "Sub"}


def write_onnx_model(
    path: str | Path,
    solutions: Mapping[str, Solution],
    split: str | PrecisionSplit,
    *,
    biases: Mapping[str, np.ndarray | None] | None = None,
    datapath: Datapath | None = None,
    overwrite: bool = False,
) -> Path:
    """Write solved layers as an ONNX graph that computes what the emulated data path does.

    Parameters
    ----------
    path : str or Path
        Ends in ``.onnx``.
    solutions : mapping of layer name to Solution
    split : str or PrecisionSplit
        Says what activations are rounded to; its weights are those of the solutions.
    biases : mapping of layer name to ndarray of shape (N,), optional
    datapath : Datapath, optional
        Formats of P and of y; its accumulators play no part.
    overwrite : bool

    Raises
    ------
    InputError
        If `onnx` is missing, a format has no operators of ONNX, or the file is there.
    """
    path = Path(path)
    if not solutions:
        raise InputError(f"{path}: no solved layer to write")
    refuse_existing(path, overwrite=overwrite)
    try:
        import onnx
        from onnx import helper
    except ImportError:
        raise InputError(
            f"{path}: writing ONNX needs onnx; pip install 'loraq-sim[onnx]'"
        ) from None
    chosen = split if isinstance(split, PrecisionSplit) else parse_split(split)
    if chosen.gelu:
        raise InputError(f"{path}: split {chosen}: shifted inputs behind GELU are not written")
    graph = _OnnxGraph(helper)
    for name, solution in solutions.items():
        bias = (biases or {}).get(name)
        run = _grid_of(chosen, solution), datapath or Datapath()
        steps = datapath_steps(solution, *run, bias=bias is not None)
        graph.add_layer(name, solution, steps, bias)
    made = helper.make_model(
        helper.make_graph(graph.nodes, "loraq-sim", graph.inputs, graph.outputs, graph.weights),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        producer_name="loraq-sim",
        ir_version=10,
    )
    onnx.checker.check_model(made)
    with replaced_file(path) as file:
        file.write(made.SerializeToString())
    return path


def _grid_of(split: PrecisionSplit, solution: Solution) -> PrecisionSplit:
    """The split as the solution runs it: a grid that was chosen is the solution's."""
    stands_in = Layer(name="layer", weight=np.zeros((1, 1), np.float32))
    return split.for_layer(stands_in, solution)


class _OnnxGraph:
    """Nodes, weights, inputs and outputs of the layers so far; `helper` is ``onnx.helper``."""

    def __init__(self, helper: Any) -> None:
        self._helper = helper
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def add_layer(
        self, name: str, solution: Solution, steps: Sequence[Step], bias: np.ndarray | None
    ) -> None:
        """Append one layer, step by step."""
        n, k = solution.main.shape
        self.inputs.append(self._value(f"{name}.x", k))
        values = {"X": (f"{name}.x", k)}
        vectors = {"smooth": solution.smooth, "bias": bias}
        for step in steps:
            taken, width = values[step.inputs[0]]
            label = f"{name}/{step.name}"
            if step.operation == "round":
                made = self._rounded(label, taken, width, step)
            elif step.operation == "gemm":
                part = getattr(solution, str(step.weight))
                made = self._gemm(label, taken, part, step.is_transposed)
                width = part.shape[1 if step.is_transposed else 0]
            elif step.operation in _BINARY and (step.weight in vectors or len(step.inputs) == 2):
                other = values[step.inputs[1]][0] if len(step.inputs) == 2 else None
                vector = vectors.get(str(step.weight))
                if other is None and vector is None:
                    raise InputError(f"layer {name!r}: step {step.name} has nothing to take")
                if other is None:
                    other = self._weight(f"{label}.values", np.asarray(vector, np.float32))
                made = self._node(_BINARY[step.operation], [taken, other], label)
            elif step.operation == "rotate":
                made = self._rotated(label, taken, width, int(solution.rotation or 1))
            else:
                raise InputError(
                    f"layer {name!r}: {step.operation} ({step.name}) is not written as ONNX; solve "
                    "and split without it"
                )
            values[step.result] = made, width
        self._node("Identity", [values["y"][0]], "", output=f"{name}.y")
        self.outputs.append(self._value(f"{name}.y", n))

    def _value(self, name: str, width: int) -> Any:
        float32 = self._helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
        return self._helper.make_tensor_value_info(name, float32, ["M", width])

    def _weight(self, name: str, values: np.ndarray) -> str:
        kind = self._helper.np_dtype_to_tensor_dtype(values.dtype)
        data = np.ascontiguousarray(values).tobytes()
        self.weights.append(self._helper.make_tensor(name, kind, values.shape, data, raw=True))
        return name

    def _node(
        self, op: str, inputs: Sequence[str], label: str, output: str = "", **attributes: Any
    ) -> str:
        output = output or f"{label}/{op}_{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def _cast(self, value: str, kind: str, label: str) -> str:
        import onnx

        return self._node("Cast", [value], label, to=getattr(onnx.TensorProto, kind))

    def _gemm(self, label: str, x: str, part: QuantizedTensor, is_transposed: bool) -> str:
        """x W^T, or x W for a transposed part."""
        weight = self._dequantized(f"{label}.weight", part)
        if not is_transposed:
            weight = self._node("Transpose", [weight], label, perm=[1, 0])
        return self._node("MatMul", [x, weight], label)

    def _dequantized(self, label: str, part: QuantizedTensor) -> str:
        """A stored part in float32: integer codes in blocks, floats as they are stored."""
        fmt = part.format
        if fmt.scale is None:
            stored = np.asarray(part.codes)
            if stored.dtype == np.float32:
                return self._weight(label, stored)
            return self._cast(self._weight(label, stored), "FLOAT", label)
        bits = fmt.element.bits
        is_plain = fmt.element.name == f"int{bits}" and bits <= 8 and fmt.zero is None
        if not is_plain or fmt.granularity == "none" or part.tensor_scale:
            raise InputError(
                f"{label}: {fmt} has no DequantizeLinear in blocks; use intN with a scale a group, "
                "row or tensor"
            )
        import onnx

        kind = onnx.TensorProto.INT4 if bits <= 4 else onnx.TensorProto.INT8
        codes = np.asarray(part.codes, np.int8)
        data = _nibbles(codes) if bits <= 4 else codes.tobytes()
        self.weights.append(
            self._helper.make_tensor(f"{label}.codes", kind, codes.shape, data, raw=True)
        )
        scales, blocks = _block_scales(part)
        inputs = [f"{label}.codes", self._weight(f"{label}.scales", scales)]
        return self._node("DequantizeLinear", inputs, label, **blocks)

    def _rounded(self, label: str, x: str, width: int, step: Step) -> str:
        fmt = step.format
        if fmt is None or fmt.element.name == "fp32":
            return x
        if fmt.scale is None and fmt.element.name in _FLOATS:
            narrow = self._cast(x, _FLOATS[fmt.element.name], label)
            return self._cast(narrow, "FLOAT", label)
        element, scale = fmt.element, fmt.scale
        is_plain = element.name == f"int{element.bits}" and fmt.zero is None
        known = scale is not None and scale.name in _FLOATS and not fmt.has_tensor_scale
        if not (is_plain and known) or step.rule not in (None, "absmax"):
            raise InputError(
                f"{label}: activations in {fmt} by the rule {step.rule or 'of the format'} are not "
                "written as ONNX; use intN with fp16, bf16 or fp32 scales by absmax"
            )
        return self._grouped_integers(label, x, width, fmt)

    def _grouped_integers(self, label: str, x: str, width: int, fmt: Format) -> str:
        """`x` as it is after rounding to integers with a dynamic scale a group."""
        group = fmt.group_size if fmt.granularity == "group" else width
        group = min(int(group or width), width)
        spare = -width % group
        if spare:
            pads = self._weight(f"{label}.pads", np.array([0, 0, 0, spare], np.int64))
            x = self._node("Pad", [x, pads], label)
        if fmt.granularity == "tensor":
            axes = self._weight(f"{label}.axes", np.array([0, 1], np.int64))
        else:
            shape = self._weight(f"{label}.groups", np.array([0, -1, group], np.int64))
            x = self._node("Reshape", [x, shape], label)
            axes = self._weight(f"{label}.axes", np.array([2], np.int64))
        size = self._node("Abs", [x], label)
        largest = self._node("ReduceMax", [size, axes], label, keepdims=1)
        top = self._weight(f"{label}.top", np.array(fmt.element.hi, np.float32))
        scale = self._node("Div", [largest, top], label)
        kind = _FLOATS[fmt.scale_format.name]
        if kind != "FLOAT":
            scale = self._cast(self._cast(scale, kind, label), "FLOAT", label)
        # Tiny groups keep the smallest scale that the format holds; a group of zeros any.
        least = np.array(fmt.scale_format.smallest or np.finfo(np.float32).tiny, np.float32)
        scale = self._node("Max", [scale, self._weight(f"{label}.least", least)], label)
        codes = self._node("Round", [self._node("Div", [x, scale], label)], label)
        ends = [
            self._weight(f"{label}.{name}", np.array(value, np.float32))
            for name, value in (("low", fmt.element.lo), ("high", fmt.element.hi))
        ]
        x = self._node("Mul", [self._node("Clip", [codes, *ends], label), scale], label)
        if fmt.granularity != "tensor":
            flat = self._weight(f"{label}.flat", np.array([0, -1], np.int64))
            x = self._node("Reshape", [x, flat], label)
        if spare:
            bounds = [
                self._weight(f"{label}.{name}", np.array([value], np.int64))
                for name, value in (("start", 0), ("end", width), ("axis", 1))
            ]
            x = self._node("Slice", [x, *bounds], label)
        return x

    def _rotated(self, label: str, x: str, width: int, block: int) -> str:
        """Blocks of channels times the Hadamard matrix of that order."""
        matrix = rotate_channels(np.eye(block, dtype=np.float32), block)
        shape = self._weight(f"{label}.blocks", np.array([0, width // block, block], np.int64))
        x = self._node("Reshape", [x, shape], label)
        x = self._node("MatMul", [x, self._weight(f"{label}.matrix", matrix)], label)
        flat = self._weight(f"{label}.flat", np.array([0, width], np.int64))
        return self._node("Reshape", [x, flat], label)


def _block_scales(part: QuantizedTensor) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Scales as DequantizeLinear takes them, and its attributes."""
    n, fmt = part.codes.shape[0], part.format
    scales = np.asarray(part.scales, np.float32)
    if fmt.granularity == "tensor":
        return scales.reshape(()), {"axis": 0}
    if fmt.granularity == "row":
        return scales.reshape(n), {"axis": 0}
    size = int(fmt.group_size or 1)
    if fmt.granularity == "block":
        # One scale for so many rows, too: each row has its own copy here.
        scales = np.repeat(scales, size, axis=0)[:n]
    return scales.reshape(n, -1), {"axis": 1, "block_size": size}


def _nibbles(codes: np.ndarray) -> bytes:
    """Signed codes of at most 4 bits, two a byte, the first in the lower half."""
    flat = codes.reshape(-1).view(np.uint8) & 15
    flat = np.pad(flat, (0, flat.size % 2))
    return (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes()


_FILES = ("model", "scale", "smooth", "branch")
_SCALE = ".weight.scale.0"


def write_deepcompressor(
    folder: str | Path,
    solutions: Mapping[str, Solution],
    *,
    biases: Mapping[str, np.ndarray | None] | None = None,
    shifts: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the four files of a deepcompressor checkpoint into `folder`.

    `shifts` are those of the inputs of layers, by default `gelu_shifts`.

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
    shifts = gelu_shifts(solutions) if shifts is None else shifts
    for layer in fused_layers(solutions, biases or {}, shifts):
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
        if layer.shift:
            shift = np.array([layer.shift], np.float32)
            content["model"][f"{member}.shift"] = _half(shift)
            name = member = f"{member}.linear"
            bias = shift_by_all(solution, bias, -shift)
        content["model"][f"{member}.weight"] = _half(solution.main.dequantize())
        if layer.bias is not None or layer.shift:
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
        mains = {name: _main(name, model, scale) for name in names}
        solutions: dict[str, Solution] = {}
        for home in names:
            factors = smooth[home].float().numpy() if home in smooth else None
            members = {
                name: as_solution(
                    Branches(main=mains[name], left=left, right=right, smooth=factors)
                )
                for name, left, right in _branches(home, mains, branch)
            }
            common = ("right", "smooth") if len(members) > 1 else ()
            solutions |= share_out(members, common)
        found = {name: _unshifted(name, solutions[name], model) for name in names}
        plain = {name: solutions[stored] for stored, (name, _) in found.items()}
        return plain, dict(found.values())
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: the checkpoint is damaged: {first_line(error)}") from None


def _unshifted(stored: str, solution: Solution, model: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Name and bias of a layer, without the shift of its inputs where it has one."""
    name, held = stored.removesuffix(".linear"), model.get(f"{stored}.bias")
    bias = np.zeros(solution.main.shape[0], np.float32) if held is None else held.float().numpy()
    if name == stored or f"{name}.shift" not in model:
        return stored, bias
    return name, shift_by_all(solution, bias, model[f"{name}.shift"].float().numpy())


def _loaded(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        if name in ("smooth", "branch"):
            return {}
        raise InputError(f"{path}: no such file")
    found = load_object(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, expected a dict of tensors")
    return found


def _main(name: str, model: dict[str, Any], scale: dict[str, Any]) -> QuantizedTensor:
    values, scales = model[f"{name}.weight"], scale[name + _SCALE]
    inner = scale.get(f"{name}.weight.scale.1")
    weight = values.float().numpy().reshape(len(values), -1)
    unit = None if inner is None else float(scales.float())
    stored = (scales if inner is None else inner).float().numpy().reshape(len(weight), -1)
    return recoded(name, weight, stored, unit, _half_of(scales))


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


def _plain(values: Any) -> QuantizedTensor:
    return plain_factor(values.float().numpy(), _half_of(values))


def _half_of(values: Any) -> str:
    return "bf16" if str(values.dtype) == "torch.bfloat16" else BRANCH_FORMAT


def _half(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float16))
