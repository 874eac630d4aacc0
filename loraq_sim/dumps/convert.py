"""Copy a dump into another file format or storage dtype.

A layer at a time is in memory, except that torch writes a .pt from tensors that are all there.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.dumps.read import read_layer_dump
from loraq_sim.dumps.write import write_layer_dump
from loraq_sim.errors import DumpError
from loraq_sim.files import make_folder
from loraq_sim.layers import Layer

__all__ = ["convert_dump", "stream_dump"]


def convert_dump(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    patterns: Iterable[str] = (),
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Path:
    """Write the layers of `source` to `target`, whose suffix chooses the format.

    Names, kinds, groups, counts, metadata and shared inputs are kept. Without `dtype` every value
    is kept too: tensors stay as stored, except that float64, which a `Layer` does not hold, is
    rounded to float32, and that .npz keeps bfloat16 values as float32.

    Parameters
    ----------
    source, target : str or path-like
        Each .pt, .safetensors or .npz.
    dtype : {"float16", "bfloat16", "float32"}, optional
        Storage of all tensors.
    patterns : iterable of str
        Shell patterns over layer names and kinds; none means all layers.
    overwrite : bool
        Replace an existing target.
    on_layer : callable, optional
        Called with the name of each layer when its values have been read.

    Raises
    ------
    DumpError
        If the source cannot be read, a pattern matches nothing, the target exists, has an unknown
        suffix or is the source, or a value does not fit `dtype`.
    """
    source, target = Path(source), Path(target)
    dump = read_layer_dump(source)
    patterns = list(patterns)
    if patterns:
        dump = dump.select(patterns)
    if target.exists() and target.samefile(source):
        raise DumpError(f"{target}: is the file to convert; give the copy another name")
    return stream_dump(target, dump, dtype=dtype, overwrite=overwrite, on_layer=on_layer)


def stream_dump(
    path: str | os.PathLike[str],
    dump: LayerDump,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Path:
    """`write_layer_dump` of a `LayerDump` into a folder that need not exist.

    `on_layer` is called with the name of each layer when its values have been read.
    """
    path = Path(path)
    make_folder(path.parent, error=DumpError)
    if on_layer is not None:
        dump = _Watched(dump, on_layer)
    return write_layer_dump(path, dump, dtype=dtype, overwrite=overwrite)


class _Watched(LayerDump):
    """A dump that tells which of its layers has been read."""

    def __init__(self, dump: LayerDump, on_layer: Callable[[str], None]) -> None:
        super().__init__(dump.path, dump._stored)
        self._on_layer = on_layer

    def __getitem__(self, name: str) -> Layer:
        layer = super().__getitem__(name)
        self._on_layer(name)
        return layer
