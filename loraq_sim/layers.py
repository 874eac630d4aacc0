"""The record every other part works on: one linear layer, its input rows and how often it runs.

A layer computes ``y = x @ weight.T + bias``. The record is checked when it is built, so code that
receives a `Layer` never checks shapes, dtypes or finiteness again.
"""

import hashlib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.errors import InputError, counted

__all__ = [
    "SAMPLED_ROWS",
    "STORAGE_DTYPES",
    "SYNTHETIC",
    "SYNTHETIC_MODEL",
    "Layer",
    "as_array",
    "check_count",
    "check_dtype",
    "check_name",
    "check_shapes",
    "is_after_gelu",
    "is_floating",
    "rows_notes",
]

STORAGE_DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
"""Names of the dtypes a layer's tensors may arrive in; all become float32."""

SAMPLED_ROWS = "activation rows of the dump"
"""`Layer.m_source` where a dump has activations but does not say how many rows a call has."""

SYNTHETIC = "synthetic"
"""`Layer.inputs_source` of activations that were drawn, not captured."""

SYNTHETIC_MODEL = f"{SYNTHETIC} model"
"""The same where the weights were drawn too."""

MAX_COUNT = 2**40
MAX_NAME = 500


# GELU is least at -0.75179, where it is -0.16997 (its tanh form: -0.17004).
_GELU_LEAST = (-0.1719, -0.1690)
_AFTER_GELU = ("ffn_down", "text_ffn_down")

# Convolutions of 3 x 3, as matrices.
_OF_PATCHES = ("resblock_conv", "sampler_conv")


def is_after_gelu(kind: str, ends: tuple[float, float] | None = None) -> bool:
    """Whether a layer of `kind` reads what GELU left, with inputs between `ends` where known.

    Second layers of a feed-forward part do, unless inputs below GELU's least value say that it was
    another function (the gated SiLU of SANA). A layer of another kind does where its inputs stop
    just at that value.
    """
    if ends is None:
        return kind in _AFTER_GELU
    low, high = ends
    if kind in _AFTER_GELU:
        return low >= _GELU_LEAST[0]
    return _GELU_LEAST[0] <= low <= _GELU_LEAST[1] and high > -low


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Layer:
    """One linear layer (or 1x1 convolution) with optional bias and input rows.

    Parameters
    ----------
    name : str
        Non-empty and printable, unique within a dump.
    weight : ndarray of shape (N, K)
        A dtype of `STORAGE_DTYPES`, NumPy's or torch's, quantized tensors too; kept as C-contiguous
        float32. An array that already is C-contiguous float32 is kept without a copy: do not write
        to it afterwards.
    bias : ndarray of shape (N,), or None
    activations : ndarray of shape (T, K), or None
        Sampled input rows, used to measure the output error.
    kind : str
        Role in the model, for example ``self_q`` or ``ffn_up``.
    group : str
        Layers of one group read the same input (q, k and v of one attention).
    rows_per_call : int, optional
        Rows M of one model call (samples x tokens, guidance included), for the cost model.
        Default: T; without activations they are not known, and nor is the cost.
    calls_per_step : int
        How often the layer runs per denoising step.
    rows_source : str
        What `rows_per_call` was taken from where the dump itself does not say it.
    inputs_source : str
        What `activations` are where no run of the model gave them, such as ``synthetic``.

    Raises
    ------
    InputError
        For a wrong shape or dtype, an empty tensor, NaN, Inf, a value beyond float32, or a count
        below 1. The message names the layer, the tensor and the value.
    """

    name: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    activations: NDArray[np.float32] | None = None
    kind: str = "linear"
    group: str = ""
    rows_per_call: int | None = None
    calls_per_step: int = 1
    rows_source: str = ""
    inputs_source: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.weight is None:
            raise InputError(f"layer {self.name!r}: weight is None; give an array of shape (N, K)")
        weight = _as_array(self.name, "weight", self.weight)
        bias = None if self.bias is None else _as_array(self.name, "bias", self.bias)
        rows = self.activations
        rows = None if rows is None else _as_array(self.name, "activations", rows)
        check_shapes(
            self.name,
            weight.shape,
            None if bias is None else bias.shape,
            None if rows is None else rows.shape,
        )
        for tensor, array in (("weight", weight), ("bias", bias), ("activations", rows)):
            if array is not None:
                object.__setattr__(self, tensor, _as_float32(self.name, tensor, array))
        for field in ("kind", "group", "rows_source", "inputs_source"):
            if not isinstance(getattr(self, field), str):
                raise InputError(
                    f"layer {self.name!r}: {field} must be a string, "
                    f"got {type(getattr(self, field)).__name__}"
                )
        for field in ("rows_per_call", "calls_per_step"):
            value = getattr(self, field)
            if value is not None or field == "calls_per_step":
                object.__setattr__(self, field, check_count(self.name, field, value))

    def __repr__(self) -> str:
        tokens = None if self.activations is None else len(self.activations)
        return f"Layer({self.name!r}, kind={self.kind!r}, n={self.n}, k={self.k}, tokens={tokens})"

    @property
    def n(self) -> int:
        """Output features N."""
        return self.weight.shape[0]

    @property
    def k(self) -> int:
        """Input features K."""
        return self.weight.shape[1]

    @property
    def m(self) -> int | None:
        """Rows M of one model call: `rows_per_call`, else the sampled rows; None if not known."""
        if self.rows_per_call is not None:
            return self.rows_per_call
        return None if self.activations is None else len(self.activations)

    @property
    def m_source(self) -> str:
        """Where `m` comes from, in words; empty if it is not known."""
        if self.rows_per_call is not None:
            return self.rows_source or "dump"
        return "" if self.activations is None else SAMPLED_ROWS

    @property
    def inputs(self) -> str | None:
        """What the activations are: ``dump``, or what `inputs_source` says; None without any."""
        return None if self.activations is None else self.inputs_source or "dump"

    @property
    def follows_gelu(self) -> bool:
        """Whether the inputs are what GELU left: `is_after_gelu` of kind and activations."""
        rows = self.activations
        ends = None if rows is None else (float(rows.min()), float(rows.max()))
        return is_after_gelu(self.kind, ends)

    @property
    def reads_patches(self) -> bool:
        """Whether its inputs are patches of a feature map, in which neighbors are alike."""
        return self.kind in _OF_PATCHES

    def digest(self) -> str:
        """SHA-256 (hex) of everything a result depends on: tensors, kind, rows, calls, labels.

        The name and the group are left out, so a renamed layer keeps its digest.
        """
        state = hashlib.sha256()
        # Shapes separate the tensors: without them (2, 3) and (3, 2) of equal bytes would collide.
        for array in (self.weight, self.bias, self.activations):
            state.update(repr(None if array is None else array.shape).encode())
            if array is not None:
                state.update(array.astype("<f4", copy=False).data)
        state.update(repr((self.kind, self.rows_per_call, self.calls_per_step)).encode())
        if self.inputs_source:
            state.update(self.inputs_source.encode())
        return state.hexdigest()


def as_array(values: ArrayLike) -> NDArray:
    """`values` as a NumPy array of their own dtype; torch tensors and parameters from any device.

    A bfloat16 or float8 tensor, which NumPy has no dtype for, becomes float32, which holds every
    value of it, and so does what a quantized tensor (torchao, ``torch.quantize_per_tensor``)
    stands for.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As NumPy or torch does where there are no plain numbers to be had, and for a masked array
        that hides values: what lies under a mask is no weight.
    """
    if np.ma.is_masked(values):
        count = int(np.ma.count_masked(values))
        raise TypeError(
            f"{counted(count, 'value', 'is')} masked; fill them, such as with x.filled(0)"
        )
    if hasattr(values, "detach"):
        tensor = values.detach()
        if _is_coded(tensor):
            tensor = tensor.dequantize()
        tensor = tensor.cpu()
        widen = str(tensor.dtype).startswith(("torch.bfloat16", "torch.float8"))
        values = tensor.float() if widen else tensor
    return np.asarray(values)


def _is_coded(tensor: Any) -> bool:
    """Whether a torch tensor stands for other values than those it holds, and can say which."""
    if getattr(tensor, "is_quantized", False):
        return True
    # Every tensor has `dequantize`; that of a subclass of its own is not the one of torch.
    own = type(tensor).__module__.partition(".")[0]
    return own not in ("torch", "numpy") and callable(getattr(tensor, "dequantize", None))


def is_floating(dtype: np.dtype) -> bool:
    """Whether `dtype` holds floats; those of ml_dtypes, such as bfloat16, are of kind V."""
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)


def rows_notes(rows: Mapping[str, tuple[int | None, str]]) -> list[str]:
    """Sentences for the user on rows per call, given with their source by layer name."""
    by_source: dict[str, list[str]] = {}
    for name, (count, source) in rows.items():
        by_source.setdefault("" if count is None else source, []).append(name)
    notes = []
    for source, names in by_source.items():
        where = f"{len(names)} of {counted(len(rows), 'layer')}, such as {names[0]}"
        if not source:
            notes.append(
                f"rows per call (M) are not known for {where}: no latency, energy or traffic for "
                "them; give --rows M (samples x tokens of one call, guidance included), "
                "--rows 'PATTERN=M' or --model NAME"
            )
        elif source == SAMPLED_ROWS:
            notes.append(
                f"rows per call (M) are taken to be the {source} for {where} "
                f"(M = {rows[names[0]][0]}); give --rows M if a call has others"
            )
        elif source not in ("given", "dump"):
            notes.append(f"rows per call (M) from {source}: {where} (M = {rows[names[0]][0]})")
    return notes


def check_name(name: str) -> None:
    """Raise InputError unless `name` is a printable string of 1 to 500 characters.

    Control characters and endless names would break one-line messages and table rows.
    """
    if isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable():
        return
    shown = repr(name[:80]) if isinstance(name, str) else type(name).__name__
    raise InputError(
        f"a layer name must be a non-empty printable string of up to {MAX_NAME} characters, "
        f"got {shown}"
    )


def check_shapes(
    name: str,
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None = None,
    activations: tuple[int, ...] | None = None,
) -> None:
    """Raise InputError unless the shapes are (N, K), (N,) and (T, K), none of them empty."""
    where = f"layer {name!r}"
    if len(weight) != 2:
        raise InputError(
            f"{where}: weight has shape {_show(weight)}, expected 2-D (N, K); "
            "reshape a 1x1 convolution to (N, K)"
        )
    n, k = weight
    if 0 in weight:
        raise InputError(f"{where}: weight is empty (shape {_show(weight)})")
    if bias is not None and bias != (n,):
        raise InputError(
            f"{where}: bias has shape {_show(bias)}, "
            f"expected ({n},) for weight of shape {_show(weight)}"
        )
    if activations is None:
        return
    if len(activations) != 2 or activations[1] != k:
        raise InputError(
            f"{where}: activations have shape {_show(activations)}, "
            f"expected (tokens, {k}) for weight of shape {_show(weight)}"
        )
    if 0 in activations:
        raise InputError(
            f"{where}: activations are empty (shape {_show(activations)}); leave them out instead"
        )


def check_dtype(name: str, tensor: str, dtype: str) -> None:
    """Raise InputError unless `dtype` is one of `STORAGE_DTYPES`."""
    if dtype not in STORAGE_DTYPES:
        raise InputError(
            f"layer {name!r}: {tensor} has dtype {dtype}; "
            f"expected {', '.join(STORAGE_DTYPES[:-1])} or {STORAGE_DTYPES[-1]}"
        )


def check_count(name: str, field: str, value: object) -> int:
    """Return `value` as an int; raise InputError unless it is a whole number from 1 to 2**40."""
    try:
        count = 0
        if isinstance(value, SupportsIndex) and not isinstance(value, bool):
            count = operator.index(value)
    except TypeError:
        count = 0
    if 1 <= count <= MAX_COUNT:
        return count
    # A dump may hold an integer so long that Python refuses to print it.
    is_short = isinstance(value, str | float) or (isinstance(value, int) and -9 <= value < 1e18)
    shown = repr(value)[:40] if is_short else type(value).__name__
    raise InputError(f"layer {name!r}: {field} must be a positive integer up to 2**40, got {shown}")


def _as_array(name: str, tensor: str, value: ArrayLike) -> NDArray:
    try:
        array = as_array(value)
    except (TypeError, ValueError, RuntimeError) as error:
        masked = f": {error}" if isinstance(value, np.ma.MaskedArray) else ""
        raise InputError(
            f"layer {name!r}: {tensor} must be a NumPy array or a torch tensor, "
            f"got {type(value).__name__}{masked}"
        ) from None
    check_dtype(name, tensor, array.dtype.name)
    return array


def _as_float32(name: str, tensor: str, array: NDArray) -> NDArray[np.float32]:
    # A float64 beyond float32 becomes inf here, a signaling NaN a quiet one; both are reported
    # below, so NumPy need not warn.
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.ascontiguousarray(array, dtype=np.float32)
        finite = np.isfinite(out)
    if finite.all():
        return out
    bad = np.argwhere(~finite)
    first = tuple(int(i) for i in bad[0])
    value = array[first]
    what = "beyond the float32 range" if math.isfinite(float(value)) else "NaN or Inf"
    raise InputError(
        f"layer {name!r}: {tensor} holds {len(bad)} of {array.size} values that are {what} "
        f"(first: {float(value)} at {_show(first)}); export the layer again without them"
    )


def _show(shape: tuple[int, ...]) -> str:
    return repr(tuple(shape))[:80]
