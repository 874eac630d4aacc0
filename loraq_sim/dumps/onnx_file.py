"""ONNX models: the weights of MatMul, Gemm and Conv as layers; nothing is run.

A layer is a node with one stored operand: MatMul (K, N), Gemm (K, N) or (N, K) by ``transB``, Conv
(N, C, kernel), which is the GEMM of im2col with a row for each output position. Convolutions in
groups are no single product and are left out. Cast, Identity, Transpose and DequantizeLinear
between the stored tensor and the node are followed. The bias is that of the node, or of the Add
that alone reads a MatMul's output.

A layer is called as its tensor, where that ends in ``.weight``, else as its node without what the
exporter puts there: ``/blocks.0/attn/to_q/MatMul`` is ``blocks.0.attn.to_q``. Rows per call follow
from shapes that the model states as numbers, or that follow from those of its inputs. A weight that
several nodes use is one layer with so many calls. Files of external data are read beside the model
and nowhere else.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.state_dict import layers_from_keys
from loraq_sim.dumps.stored import StoredDump, StoredTensor, plain_meta
from loraq_sim.errors import DumpError, counted

__all__ = ["open_onnx_file"]

_SOURCE = "shapes in the ONNX model"
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    6: np.dtype("<i4"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    19: np.dtype(ml_dtypes.float8_e5m2),
}
_OPERATIONS = ("MatMul", "Gemm", "Conv")
_FOLLOWED = ("Cast", "Identity", "Transpose", "DequantizeLinear")
_NODE_NAME = re.compile(r"/?(?P<path>.*?)/?(?:node_)?(?:MatMul|Gemm|Conv)(?:_\d+)?")
_MAX_FOLLOWED = 8
# Values of a tensor that may be a shape, or the axes of one.
_MAX_SHAPE_VALUES = 64


def open_onnx_file(path: Path) -> StoredDump:
    """Read the graph and list its layers.

    Raises
    ------
    DumpError
        If the `onnx` package is missing, the file is damaged, or external data lies elsewhere.
    """
    try:
        import onnx
    except ImportError:
        raise DumpError(f"{path}: this is an ONNX model; pip install 'loraq-sim[onnx]'") from None
    model = onnx.load(str(path), load_external_data=False)
    graph = _Graph(path, model.graph)
    graph.shapes |= _inferred(model)
    tensors: dict[str, StoredTensor] = {}
    rows: dict[str, int | None] = {}
    calls: Counter[str] = Counter()
    seen: dict[tuple[str, str], str] = {}
    for node in model.graph.node:
        found = graph.layer(node) if node.op_type in _OPERATIONS else None
        if found is None:
            continue
        same = (found.key, repr(found.shape))
        name = seen.get(same) or _free_name(graph.name_of(node), tensors)
        seen[same] = name
        calls[name] += 1
        tensors[f"{name}.weight"] = found
        rows[name] = graph.rows(node)
        bias = graph.bias(node, found.shape[0])
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    if not tensors:
        raise DumpError(
            f"{path}: an ONNX model without stored weights of MatMul, Gemm or Conv; "
            "export it with its parameters"
        )
    in_groups = [
        node.input[1] for node in model.graph.node if node.op_type == "Conv" and _group(node) != 1
    ]
    used = {tensor.key for tensor in tensors.values()} | graph.scales | set(in_groups)
    left = {t.name: _initializer(path, t) for t in model.graph.initializer if t.name not in used}
    meta = {"producer": model.producer_name[:100], "ir_version": model.ir_version}
    stored = layers_from_keys(tensors | left, layers={}, meta=plain_meta(path, meta))
    # Names lose their wrapper; what the graph has no product of is no layer of it.
    products = {stored.aliases.get(name, name): name for name in rows}
    layers = {
        name: replace(
            layer,
            rows_per_call=rows[products[name]],
            rows_source=_SOURCE,
            calls_per_step=calls[products[name]],
        )
        for name, layer in stored.layers.items()
        if name in products
    }
    others = [*in_groups, *(name for name in stored.layers if name not in products)]
    if others:
        said = f"{counted(len(others), 'weight')} of no single product, such as {others[0]:.100}"
        skipped = dict.fromkeys(others, "no single product of the graph (a convolution in groups)")
        stored = replace(
            stored,
            skipped=stored.skipped | skipped,
            left_out="; ".join(filter(None, (stored.left_out, said))),
        )
    places = {_location(tensor) for tensor in graph.stored.values()} - {""}
    beside = tuple(file for name in sorted(places) if (file := path.parent / name).is_file())
    return replace(stored, layers=layers, files=(path, *beside))


def _inferred(model: Any) -> dict[str, tuple[int, ...] | None]:
    """Shapes of values that follow from those of the inputs; of weights the sizes are enough."""
    from onnx import helper, shape_inference

    graph = model.graph
    if any(graph.value_info) or not any(map(_static_shape, graph.input)):
        return {}
    small = [x for x in graph.initializer if math.prod(x.dims) <= _MAX_SHAPE_VALUES]
    held = {x.name for x in small}
    inputs = [*graph.input]
    inputs += [
        helper.make_tensor_value_info(x.name, x.data_type, list(x.dims))
        for x in graph.initializer
        if x.name not in held
    ]
    light = helper.make_model(
        helper.make_graph(list(graph.node), "shapes", inputs, list(graph.output), small),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    try:
        found = shape_inference.infer_shapes(light, data_prop=True)
    # An operator that it does not know; rows are then as they are without.
    except Exception:
        return {}
    return {value.name: _static_shape(value) for value in found.graph.value_info}


def _free_name(name: str, taken: dict[str, StoredTensor]) -> str:
    number, free = 1, name
    while f"{free}.weight" in taken:
        number += 1
        free = f"{name}.{number}"
    return free


class _Graph:
    """Looks up what feeds and what reads the values of one ONNX graph."""

    def __init__(self, path: Path, graph: Any) -> None:
        self.path = path
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.made_by = {out: node for node in graph.node for out in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.shapes = {
            value.name: _static_shape(value)
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self.scales: set[str] = set()

    def layer(self, node: Any) -> StoredTensor | None:
        """The weight (N, K) of a node, None if it has none that is stored."""
        if len(node.input) < 2:
            return None
        weight = self.tensor(node.input[1])
        if node.op_type == "Conv":
            if weight is None or len(weight.shape) < 3 or _group(node) != 1:
                return None
            flat = weight.shape[0], math.prod(weight.shape[1:])
            return _mapped(weight, flat, partial(np.reshape, shape=flat))
        if weight is None or len(weight.shape) != 2:
            return None
        if node.op_type == "MatMul":
            return _transposed(weight)
        facts = {a.name: a for a in node.attribute}
        if "alpha" in facts and facts["alpha"].f != 1.0:
            weight = _mapped(weight, weight.shape, partial(_times, factor=facts["alpha"].f))
        is_kept = "transB" in facts and facts["transB"].i
        return weight if is_kept else _transposed(weight)

    def tensor(self, name: str, depth: int = 0) -> StoredTensor | None:
        """The stored tensor that a value is, through casts and the like."""
        if name in self.stored:
            return _initializer(self.path, self.stored[name])
        node = self.made_by.get(name)
        if node is None or depth > _MAX_FOLLOWED:
            return None
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            return None if value is None else _initializer(self.path, value, name)
        if node.op_type not in _FOLLOWED or not node.input:
            return None
        inner = self.tensor(node.input[0], depth + 1)
        if inner is None or node.op_type in ("Cast", "Identity"):
            return inner
        if node.op_type == "Transpose":
            order = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)
            order = order or tuple(reversed(range(len(inner.shape))))
            if sorted(order) != list(range(len(inner.shape))):
                return None
            shape = tuple(inner.shape[i] for i in order)
            return _mapped(inner, shape, partial(np.transpose, axes=order))
        return self._dequantized(node, inner, depth)

    def _dequantized(self, node: Any, codes: StoredTensor, depth: int) -> StoredTensor | None:
        others = [self.tensor(name, depth + 1) if name else None for name in node.input[1:3]]
        scale = others[0] if others else None
        zero = others[1] if len(others) > 1 else None
        facts = {a.name: a.i for a in node.attribute}
        axis, block = facts.get("axis", 1), facts.get("block_size", 0)
        if scale is None or not -len(codes.shape) <= axis < max(1, len(codes.shape)):
            return None

        self.scales |= {part.key for part in others if part is not None}

        def fit(values: NDArray) -> NDArray:
            if values.size == 1:
                return values.reshape(())
            if block:
                long = np.repeat(values, block, axis)
                return np.take(long, np.arange(codes.shape[axis]), axis)
            return values.reshape([-1 if i == axis % codes_n else 1 for i in range(codes_n)])

        codes_n = len(codes.shape)

        def decode(values: NDArray) -> NDArray:
            whole = values.astype(np.float32)
            if zero is not None:
                whole = whole - fit(zero.load().astype(np.float32))
            return whole * fit(scale.load().astype(np.float32))

        decoded = _mapped(codes, codes.shape, decode)
        return replace(decoded, dtype="float32", stored_as=f"{codes.dtype} x scale")

    def bias(self, node: Any, n: int) -> StoredTensor | None:
        if node.op_type != "MatMul":
            found = self.tensor(node.input[2]) if len(node.input) > 2 else None
            is_scaled = any(a.name == "beta" and a.f != 1.0 for a in node.attribute)
            return None if found is None or is_scaled else _vector(found, n)
        readers = self.readers.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add":
            return None
        (other,) = [x for x in readers[0].input if x != node.output[0]] or [""]
        found = self.tensor(other)
        return None if found is None else _vector(found, n)

    def rows(self, node: Any) -> int | None:
        """Rows M of a call where the model states the shape of the input as numbers."""
        shape = self.shapes.get(node.input[0])
        if node.op_type == "Conv":
            steps = [x for a in node.attribute if a.name in ("strides", "pads") for x in a.ints]
            kernel = self.tensor(node.input[1])
            is_pointwise = kernel is not None and set(kernel.shape[2:]) == {1}
            shape = self.shapes.get(node.output[0]) or (
                shape if is_pointwise and not set(steps) - {0, 1} else None
            )
            return math.prod(shape[:1] + shape[2:]) if shape else None
        return math.prod(shape[:-1]) if shape else None

    def name_of(self, node: Any) -> str:
        value = node.input[1]
        if value.endswith(".weight") and len(value) > len(".weight"):
            return str(value.removesuffix(".weight"))
        found = _NODE_NAME.fullmatch(node.name)
        if found and found["path"]:
            return str(found["path"].strip("/").replace("/", "."))
        return node.name or value or node.output[0]


def _group(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)


def _static_shape(value: Any) -> tuple[int, ...] | None:
    sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
    return tuple(sizes) if sizes and all(size > 0 for size in sizes) else None


def _vector(tensor: StoredTensor, n: int) -> StoredTensor | None:
    if math.prod(tensor.shape) != n:
        return None
    return _mapped(tensor, (n,), partial(np.reshape, shape=(n,)))


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return _mapped(tensor, tensor.shape[::-1], np.transpose)


def _times(values: NDArray, factor: float) -> NDArray:
    return values.astype(np.float32) * np.float32(factor)


def _mapped(tensor: StoredTensor, shape: tuple[int, ...], change: Any) -> StoredTensor:
    return replace(tensor, shape=shape, load=lambda: change(tensor.load()))


def _initializer(path: Path, tensor: Any, name: str = "") -> StoredTensor:
    dtype = _DTYPES.get(tensor.data_type)
    shape = tuple(int(size) for size in tensor.dims)
    count = math.prod(shape)
    return StoredTensor(
        key=name or tensor.name,
        shape=shape,
        dtype=f"ONNX type {tensor.data_type}" if dtype is None else dtype.name,
        nbytes=count * (dtype.itemsize if dtype is not None else 1),
        load=partial(_load, path, tensor, dtype, shape),
    )


def _load(path: Path, tensor: Any, dtype: np.dtype | None, shape: tuple[int, ...]) -> NDArray:
    if dtype is None:
        raise DumpError(f"{path}: {tensor.name!r:.80} has a dtype that layers do not have")
    if tensor.data_location == 1:
        return _external(path, tensor, dtype, shape)
    if tensor.raw_data:
        return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(shape)
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(tensor)).reshape(shape)


def _external(path: Path, tensor: Any, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
    facts, place = dict(_pairs(tensor)), _location(tensor)
    if not place:
        raise DumpError(f"{path}: {tensor.name!r:.80} has external data that lies not beside it")
    count, offset = math.prod(shape), int(facts.get("offset", "0"))
    file = path.parent / place
    if not file.is_file() or offset < 0 or file.stat().st_size < offset + count * dtype.itemsize:
        raise DumpError(f"{file}: missing or too short for {tensor.name!r:.80}; copy it again")
    return np.fromfile(file, dtype=dtype, count=count, offset=offset).reshape(shape)


def _location(tensor: Any) -> str:
    """The file of a tensor's external data; empty for none, and for one that is elsewhere."""
    place = dict(_pairs(tensor)).get("location", "") if tensor.data_location == 1 else ""
    return place if Path(place).name == place and place not in (".", "..") else ""


def _pairs(tensor: Any) -> Iterator[tuple[str, str]]:
    for entry in tensor.external_data:
        yield entry.key, entry.value
