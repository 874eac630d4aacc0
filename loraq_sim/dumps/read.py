"""Open a layer dump: decide what the file is from its content, then hand it to that reader.

The suffix is never trusted. Each format documents its own layout: `torch_file` (.pt),
`safetensors_file` (.safetensors) and `npz_file` (.npz).
"""

import os
from pathlib import Path

from loraq_sim.dumps.file_kind import file_kind
from loraq_sim.dumps.layer_dump import LayerDump, LayerInfo
from loraq_sim.dumps.roles import with_roles
from loraq_sim.dumps.stored import StoredDump, first_line
from loraq_sim.errors import DumpError

__all__ = ["LayerDump", "LayerInfo", "read_layer_dump"]


def read_layer_dump(path: str | os.PathLike[str]) -> LayerDump:
    """Open a .pt, .safetensors or .npz layer dump; tensors load when a layer is asked for.

    Parameters
    ----------
    path : str or path-like
        The file; its content decides the format. No code from the file runs, whatever it holds.

    Returns
    -------
    dump : LayerDump
        Mapping of layer name to `Layer`, in file order. Kinds that the file does not say are read
        off the names, rows per call off a ``config.json`` beside it.

    Raises
    ------
    DumpError
        If the file is missing, unreadable, of another kind, damaged, unsafe, or holds no layer.
    """
    path = Path(path)
    # A damaged or hostile file can make a reader library raise anything at all.
    try:
        stored = _open(path, file_kind(path))
    except DumpError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DumpError(f"{path}: damaged or not a layer dump ({reason})") from error
    if not stored.layers:
        left_out = f" ({len(stored.skipped)} other tensors)" if stored.skipped else ""
        raise DumpError(
            f"{path}: holds no layers{left_out}; expected tensors named <layer>.weight, "
            "or a 'layers' mapping"
        )
    return LayerDump(path, with_roles(path, stored))


def _open(path: Path, kind: str) -> StoredDump:
    if kind == "torch":
        from loraq_sim.dumps.torch_file import open_torch_file

        return open_torch_file(path)
    if kind == "safetensors":
        from loraq_sim.dumps.safetensors_file import open_safetensors_file

        return open_safetensors_file(path)
    from loraq_sim.dumps.npz_file import open_npz_file

    return open_npz_file(path)
