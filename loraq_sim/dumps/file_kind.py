"""Recognize a file by its first bytes and, for a zip, by its directory; refuse everything else."""

import stat
import warnings
import zipfile
from pathlib import Path

from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError

__all__ = ["TORCH_LEGACY_MAGIC", "file_kind"]

TORCH_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a torch.save file older than torch 1.6 (a pickled magic number)."""

_ADVICE = "expected a .pt (torch.save), .safetensors or .npz layer dump"

_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run 'git lfs pull'",
    b"<!DOCTYPE": "an HTML page, perhaps a failed download",
    b"<html": "an HTML page, perhaps a failed download",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a single .npy array; save layers with numpy.savez",
    b"GGUF": "a GGUF model",
    b"\x1f\x8b": "gzip-compressed; decompress it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it first",
    b"BZh": "bzip2-compressed; decompress it first",
    b"\xfd7zXZ": "xz-compressed; decompress it first",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite database, perhaps a result store",
}


def file_kind(path: Path) -> str:
    """Return "torch", "safetensors" or "npz", judged by content.

    Raises
    ------
    DumpError
        If the path is no readable regular file, or holds anything else; says what was found.
    """
    size, head = _first_bytes(path)
    if not size:
        raise DumpError(f"{path}: the file is empty; {_ADVICE}")
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head.startswith(TORCH_LEGACY_MAGIC):
        return "torch"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    # Protocol 2 and later start with 0x80 and the protocol; such a file is never unpickled here.
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        raise DumpError(_plain_pickle_message(path))
    for magic, found in _OTHER_KINDS.items():
        if head.lower().startswith(magic.lower()):
            raise DumpError(f"{path}: this is {found}; {_ADVICE}")
    if len(head) > 262 and head[257:262] == b"ustar":
        raise DumpError(f"{path}: this is a tar archive; {_ADVICE}")
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    found = "a text file" if is_text else "not a layer dump, or one damaged at its start"
    raise DumpError(f"{path}: this is {found}; {_ADVICE}")


def _first_bytes(path: Path) -> tuple[int, bytes]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DumpError(f"{path}: is a directory; give one dump file")
        if not stat.S_ISREG(status.st_mode):
            raise DumpError(f"{path}: is not a regular file; give one dump file")
        with path.open("rb") as file:
            return status.st_size, file.read(512)
    except FileNotFoundError:
        raise DumpError(f"{path}: no such file; check the path") from None
    except PermissionError:
        raise DumpError(f"{path}: permission denied; make the file readable") from None
    except (OSError, ValueError) as error:
        raise DumpError(f"{str(path)!r}: cannot be opened: {first_line(error)}") from None


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:
        # zipfile raises half a dozen types on a damaged directory.
        raise DumpError(
            f"{path}: a zip-based file (.pt or .npz) that is truncated or damaged "
            f"({first_line(error)}); copy or export it again"
        ) from error
    last_parts = {name.rpartition("/")[2] for name in names}
    if "serialized_exported_program.json" in last_parts or "archive_format" in last_parts:
        raise DumpError(
            f"{path}: this is a torch.export program (.pt2), which holds code; "
            "save the layers with torch.save or as .safetensors"
        )
    if "data.pkl" in last_parts:
        if "constants.pkl" in last_parts:
            raise DumpError(
                f"{path}: this is a TorchScript archive, which holds code; "
                "save model.state_dict() with torch.save or as .safetensors"
            )
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise DumpError(
        f"{path}: this is a zip archive of {len(names)} files without tensors; {_ADVICE}"
    )


def _plain_pickle_message(path: Path) -> str:
    from loraq_sim.dumps.pickle_scan import first_global

    with warnings.catch_warnings():
        # Python's parser complains of a damaged text's backslashes.
        warnings.simplefilter("ignore")
        named = first_global(path)
    return (
        f"{path}: this is a Python pickle, which could run code{f' ({named})' if named else ''}, "
        "so it was not loaded; save tensors with torch.save, .safetensors or numpy.savez"
    )
