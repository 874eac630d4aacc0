"""Layer dumps as users see them: open a file, ask for its layers by name.

`read_layer_dump` decides what a file is from its content, never from its suffix, and hands it to
that format's reader; each documents its own layout: `torch_file` (.pt) and `array_files`
(.safetensors, .npz). The `LayerDump` it returns is a read-only mapping of layer names to layers,
whose tensors load when a layer is asked for.
"""

import difflib
import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.adapters import parse_lora, with_adapters
from loraq_sim.dumps.checkpoint_folder import config_path, open_stored, tensors_in
from loraq_sim.dumps.kinds import with_roles
from loraq_sim.dumps.stored import (
    StoredDump,
    StoredLayer,
    StoredTensor,
    check_fits_memory,
    first_line,
)
from loraq_sim.errors import DumpError, InputError, counted
from loraq_sim.layers import SAMPLED_ROWS, Layer, check_count, check_dtype, check_name, check_shapes
from loraq_sim.settings import matches

__all__ = [
    "LayerDump",
    "LayerInfo",
    "read_layer_dump",
]


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a dump says about a layer without its values being read.

    `n`, `k` and `tokens` are sizes (`tokens` is None without activations); `dtype` (of the weight),
    `bias_dtype` and `activation_dtype` are as stored; `nbytes` counts weight and bias as stored;
    `activation_key` is equal for layers that share one stored activation tensor.
    """

    name: str
    n: int
    k: int
    tokens: int | None
    kind: str
    group: str
    has_bias: bool
    rows_per_call: int | None
    calls_per_step: int
    dtype: str
    bias_dtype: str | None
    activation_dtype: str | None
    nbytes: int
    activation_key: str | None
    rows_source: str = ""
    inputs_source: str = ""

    @property
    def m(self) -> int | None:
        """Rows M of one model call, as `Layer.m`."""
        return self.tokens if self.rows_per_call is None else self.rows_per_call

    @property
    def m_source(self) -> str:
        """Where `m` comes from, as `Layer.m_source`."""
        if self.rows_per_call is not None:
            return self.rows_source or "dump"
        return "" if self.tokens is None else SAMPLED_ROWS


class LayerDump(Mapping[str, Layer]):
    """Layers of one file, in file order; ``dump[name]`` reads and checks that layer's tensors.

    Made by `read_layer_dump`. A bad layer raises when it is asked for, not when the file is opened,
    so the other layers stay usable. Pickles as its path: a worker process opens the file itself.

    Attributes
    ----------
    path : Path
    files : tuple of Path
        The files that hold the tensors: the shards of a folder, else `path` alone.
    config : Path
        Where a ``config.json`` that describes the model would stand.
    meta : dict
        What the file says about the model and its provenance.
    skipped : dict
        Tensors of the file that are no linear layer, with the reason.
    left_out : str
        One sentence on those that may be weights; empty where there are none.
    drawn_rows : int or None
        Rows of synthetic inputs of each layer that the file has none of, where they were asked for.
    lora : tuple of str
        Files of adapters that were merged into the layers.
    """

    def __init__(
        self,
        path: Path,
        stored: StoredDump,
        *,
        drawn_rows: int | None = None,
        lora: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.drawn_rows = drawn_rows
        self.lora = lora
        self.meta = stored.meta
        self.skipped = stored.skipped
        self.left_out = stored.left_out
        self.files = stored.files or (path,)
        self.config = config_path(path, stored.home)
        self._stored = stored
        self._whole_names: dict[str, list[str]] = {}
        for whole, name in stored.aliases.items():
            self._whole_names.setdefault(name, []).append(whole)
        self._version = _version(self.files)
        # Layers of one group share their activations in memory while any of them is in use.
        self._activations: weakref.WeakValueDictionary[str, NDArray] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> Layer:
        stored = self._find(name)
        name = stored.name
        info = self.info(name)
        key = info.activation_key
        rows = None if key is None else self._activations.get(key)
        try:
            weight = self._load(name, "weight", stored.usable_weight()).reshape(info.n, info.k)
            bias = None if stored.bias is None else self._load(name, "bias", stored.bias)
            if rows is None and stored.activations is not None:
                rows = self._load(name, "activations", stored.activations)
            layer = Layer(
                name=name,
                weight=weight,
                bias=bias,
                activations=rows,
                kind=info.kind,
                group=info.group,
                rows_per_call=info.rows_per_call,
                calls_per_step=info.calls_per_step,
                rows_source=info.rows_source,
                inputs_source=info.inputs_source,
            )
        except DumpError:
            raise
        except InputError as error:
            raise DumpError(f"{self.path}: {error}") from None
        if key is not None and layer.activations is not None:
            self._activations[key] = layer.activations
        return layer

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.layers)

    def __len__(self) -> int:
        return len(self._stored.layers)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return self._stored.aliases.get(name, name) in self._stored.layers

    def __repr__(self) -> str:
        return f"LayerDump({str(self.path)!r}, {counted(len(self), 'layer')})"

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import dump_card

        return dump_card(
            self.path, {name: self._info_or_none(name) for name in self}, len(self.skipped)
        )

    def _info_or_none(self, name: str) -> LayerInfo | None:
        try:
            return self.info(name)
        except DumpError:
            return None

    def __reduce__(self) -> tuple:
        return _reopen, (self.path, tuple(self), self.drawn_rows, self.lora)

    def info(self, name: str) -> LayerInfo:
        """Sizes, dtypes and roles of one layer; reads no tensor values.

        Raises
        ------
        DumpError
            If the layer is unknown, incomplete, or its shapes, dtypes or counts are unusable.
        """
        stored = self._find(name)
        try:
            check_name(name)
            return _describe(stored)
        except InputError as error:
            raise DumpError(f"{self.path}: {error}") from None

    @property
    def inputs_note(self) -> str:
        """One sentence on layers whose activations were drawn, not captured; empty without any."""
        if not any(layer.inputs_source for layer in self._stored.layers.values()):
            return ""
        from loraq_sim.dumps.synthesize_inputs import inputs_note

        return _printable(inputs_note(self._stored.layers))

    def select(self, patterns: str | Iterable[str]) -> "LayerDump":
        """Dump of the layers whose name or kind matches any of the patterns, in file order.

        Parameters
        ----------
        patterns : str or iterable of str
            Shell patterns (``*``, ``?``, ``[abc]``), case-sensitive; a string may hold several,
            separated by commas. A full layer name always matches itself.

        Raises
        ------
        DumpError
            If a pattern matches nothing; the message lists the nearest names.
        """
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        wanted = [part.strip() for text in given for part in text.split(",") if part.strip()]
        if not wanted:
            raise DumpError(f"{self.path}: no layer pattern given; use for example '*' or 'ffn_*'")
        keep: set[str] = set()
        for pattern in wanted:
            found = {name for name in self if self._matches(name, pattern)}
            if not found:
                raise DumpError(self._nothing_matches(pattern))
            keep |= found
        return self._restricted(name for name in self if name in keep)

    def others(self) -> dict[str, NDArray]:
        """Tensors of the file that belong to no layer, such as norms, as they are stored."""
        stored = self._stored.others.items()
        return {key: self._load(key, "tensor", tensor) for key, tensor in stored}

    def digest(self) -> str:
        """SHA-256 (hex) of the whole file, read in pieces; of the digests of several files."""
        digests = [_file_digest(path) for path in self.files]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def _restricted(self, names: Iterable[str]) -> "LayerDump":
        layers = {name: self._stored.layers[name] for name in names}
        # What is left out of the file is no matter of those who chose from it.
        stored = replace(self._stored, layers=layers, left_out="")
        return LayerDump(self.path, stored, drawn_rows=self.drawn_rows, lora=self.lora)

    def _find(self, name: str) -> StoredLayer:
        try:
            return self._stored.layers[self._stored.aliases.get(name, name)]
        except (KeyError, TypeError):
            if isinstance(name, str) and (reason := self._why_left_out(name)):
                raise UnknownLayer(f"{self.path}: {name!r} is no layer: {reason}") from None
            near = difflib.get_close_matches(str(name), list(self), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UnknownLayer(
                f"{self.path}: no layer {name!r} among its {counted(len(self), 'layer')}{hint}"
            ) from None

    def _matches(self, name: str, pattern: str) -> bool:
        kind = self._stored.layers[name].kind
        kind = kind if isinstance(kind, str) else ""
        names = (name, *self._whole_names.get(name, ()))
        return any(matches(pattern, one, kind) for one in names)

    def _nothing_matches(self, pattern: str) -> str:
        kinds = {layer.kind: None for layer in self._stored.layers.values() if layer.kind}
        known = [kind for kind in kinds if isinstance(kind, str)]
        bare = pattern.replace("*", "").replace("?", "")
        if reason := self._why_left_out(pattern):
            return f"{self.path}: {pattern!r} is no layer: {reason}"
        near = difflib.get_close_matches(bare, [*known, *self], n=3, cutoff=0.3) or list(self)[:3]
        return (
            f"{self.path}: pattern {pattern!r} matches no layer name and no kind; "
            f"nearest: {', '.join(near)} (kinds: {', '.join(known[:20])})"
        )

    def _why_left_out(self, name: str) -> str:
        return self.skipped.get(name) or self.skipped.get(f"{name}.weight", "")

    def _load(self, name: str, tensor: str, stored: StoredTensor) -> NDArray:
        what = f"layer {name!r}: {tensor}"
        if _version(self.files) != self._version:
            # Offsets read at opening would now point at other bytes.
            raise DumpError(f"{self.path}: changed or removed since it was opened; open it again")
        check_fits_memory(self.path, what, stored.shape)
        # Whatever a reader library raises on damaged bytes, the caller sees one DumpError.
        try:
            array = stored.load()
        except DumpError:
            raise
        except Exception as error:
            raise DumpError(f"{self.path}: {what} cannot be read: {first_line(error)}") from error
        if array.shape != stored.shape:
            raise DumpError(
                f"{self.path}: {what} has shape {array.shape}, but the file's directory says "
                f"{stored.shape}; the file is damaged or changed while open"
            )
        return np.asarray(array)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DumpError(f"{path}: cannot be read: {error.strerror}") from None


class UnknownLayer(DumpError, KeyError):
    """The asked layer is not in the dump; also a KeyError, as `Mapping.get` expects."""

    __str__ = Exception.__str__


def _version(files: Iterable[Path]) -> list[tuple[int, int, int] | None]:
    return [_file_version(path) for path in files]


def _file_version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _reopen(
    path: Path, names: tuple[str, ...], drawn_rows: int | None, lora: tuple[str, ...]
) -> LayerDump:
    dump = read_layer_dump(path, synthesize_inputs=drawn_rows or False, lora=lora)
    return dump._restricted(names)


def _describe(stored: StoredLayer) -> LayerInfo:
    name, weight = stored.name, stored.usable_weight()
    bias, activations = stored.bias, stored.activations
    check_shapes(
        name,
        _matrix_shape(weight),
        None if bias is None else _matrix_shape(bias),
        None if activations is None else _matrix_shape(activations),
    )
    for key, tensor in (("weight", weight), ("bias", bias), ("activations", activations)):
        if tensor is not None:
            check_dtype(name, key, tensor.dtype)
    kind = _text(name, "kind", "linear" if stored.kind is None else stored.kind)
    group = _text(name, "group", stored.group)
    n, k = _matrix_shape(weight)
    rows = stored.rows_per_call
    return LayerInfo(
        name=name,
        n=n,
        k=k,
        tokens=None if activations is None else activations.shape[0],
        kind=kind,
        group=group,
        has_bias=bias is not None,
        rows_per_call=None if rows is None else check_count(name, "rows_per_call", rows),
        calls_per_step=check_count(name, "calls_per_step", stored.calls_per_step),
        dtype=weight.stored_as or weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        activation_dtype=None if activations is None else activations.dtype,
        nbytes=weight.nbytes + (0 if bias is None else bias.nbytes),
        activation_key=None if activations is None else activations.key,
        rows_source=stored.rows_source,
        inputs_source=_text(name, "inputs_source", stored.inputs_source or ""),
    )


def _text(name: str, field: str, value: object) -> str:
    if not isinstance(value, str) or not (value == "" or value.isprintable()):
        raise InputError(f"layer {name!r}: {field} must be a printable string")
    return value


def _matrix_shape(tensor: StoredTensor) -> tuple[int, ...]:
    # A 1x1 convolution weight (N, K, 1, 1) or (N, K, 1) is the matrix (N, K).
    shape = tensor.shape
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape


def read_layer_dump(
    path: str | os.PathLike[str],
    *,
    synthesize_inputs: bool | int = False,
    lora: str | os.PathLike[str] | Iterable[str] = (),
) -> LayerDump:
    """Open a layer dump or a checkpoint; tensors load when a layer is asked for.

    Parameters
    ----------
    path : str or path-like
        A .pt, .safetensors, .npz, .gguf or .onnx file, judged by content; a checkpoint's folder or
        its ``.index.json``; the folder of a diffusers pipeline. No code from a file runs, whatever
        it holds.
    synthesize_inputs : bool or int
        Draw this many input rows (256 for True) for each layer without activations, as they are in
        trained diffusion transformers by kind of layer, on the file's own weights. They are
        labelled ``synthetic`` (`loraq_sim.dumps.synthesize_inputs`).
    lora : str, path-like or iterable of str
        Adapters to merge into the weights, ``FILE`` or ``FILE=SCALE`` (`loraq_sim.dumps.adapters`).

    Returns
    -------
    dump : LayerDump
        Mapping of layer name to `Layer`, in file order. Kinds that the file does not say are read
        off the names, rows per call off a ``config.json`` beside it.

    Raises
    ------
    DumpError
        If the file is missing, unreadable, of another kind, damaged, unsafe, or holds no layer.
    InputError
        If `synthesize_inputs` is no number of rows from 1 to 65,536.
    """
    path = Path(path)
    texts = (os.fspath(lora),) if isinstance(lora, str | os.PathLike) else tuple(lora)
    given = [parse_lora(text) for text in texts]
    # A damaged or hostile file can make a reader library raise anything at all.
    try:
        stored = with_adapters(path, open_stored(path), given, tensors_in)
        # It quotes names from the file, which no terminal should obey.
        stored = replace(stored, left_out=_printable(stored.left_out))
    except DumpError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DumpError(f"{path}: damaged or not a layer dump ({reason})") from error
    if not stored.layers:
        told = f": {stored.left_out}" if stored.left_out else ""
        left_out = f" ({len(stored.skipped)} other tensors{told})" if stored.skipped else ""
        raise DumpError(
            f"{path}: holds no layers{left_out}; expected tensors named <layer>.weight, "
            "or a 'layers' mapping"
        )
    stored = with_roles(path, stored)
    if synthesize_inputs is False:
        return LayerDump(path, stored, lora=texts)
    # The larger part of a file that most dumps have no need of.
    from loraq_sim.dumps.synthesize_inputs import SYNTHETIC_ROWS, with_synthetic_inputs

    rows = SYNTHETIC_ROWS if synthesize_inputs is True else synthesize_inputs
    return LayerDump(path, with_synthetic_inputs(stored, rows), drawn_rows=rows, lora=texts)


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
