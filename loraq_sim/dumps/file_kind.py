"""What a file is, judged by its content, and whether its pickle may be loaded.

`file_kind` recognizes a file by its first bytes and, for a zip, by its directory; everything but a
layer dump is refused, with what was found.

`find_unsafe_name` reads a pickle's instructions without running them, and finds names that no
tensor file needs. torch.load(weights_only=True) has its own list of allowed names. This scan stands
before it: the error then says what the file wanted to call, and safety does not hang on one torch
version alone.
"""

import pickletools
import re
import stat
import warnings
import zipfile
from itertools import islice
from pathlib import Path
from typing import IO

from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, counted

__all__ = [
    "MAX_PICKLE_BYTES",
    "file_kind",
    "find_unsafe_name",
]

TORCH_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a torch.save file older than torch 1.6 (a pickled magic number)."""

_ONNX_START = re.compile(rb"\x08[\x03-\x1f](?:[\x12\x1a\x22\x32\x3a]|\x28.)", re.DOTALL)
"""An ir_version and the tag of a field that may follow it in an ONNX model."""

_ADVICE = "expected a .pt (torch.save), .safetensors or .npz layer dump, or a checkpoint"

_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run 'git lfs pull'",
    b"<!DOCTYPE": "an HTML page, perhaps a failed download",
    b"<html": "an HTML page, perhaps a failed download",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a single .npy array; save layers with numpy.savez",
    b"\x1f\x8b": "gzip-compressed; decompress it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it first",
    b"BZh": "bzip2-compressed; decompress it first",
    b"\xfd7zXZ": "xz-compressed; decompress it first",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite database, perhaps a result store",
}


def file_kind(path: Path) -> str:
    """Return "torch", "safetensors", "npz", "gguf" or "onnx", judged by content.

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
    if head.startswith(b"GGUF"):
        return "gguf"
    if _ONNX_START.match(head) or (path.suffix == ".onnx" and head[0] < 0x80 and head[0] & 7 < 3):
        return "onnx"
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
        f"{path}: this is a zip archive of {counted(len(names), 'file')} without tensors; {_ADVICE}"
    )


def _plain_pickle_message(path: Path) -> str:
    with warnings.catch_warnings():
        # Python's parser complains of a damaged text's backslashes.
        warnings.simplefilter("ignore")
        named = first_global(path)
    return (
        f"{path}: this is a Python pickle, which could run code{f' ({named})' if named else ''}, "
        "so it was not loaded; save tensors with torch.save, .safetensors or numpy.savez"
    )


MAX_PICKLE_BYTES = 16 * 2**20
"""About 50,000 tensors; scanning more would take minutes."""

MAX_NESTING = 100
"""Dumps nest about ten deep. Python hashes nested tuples by unchecked recursion in C: a dict key a
million deep ends the process, and no error handler sees it."""

MAX_EXPANDED = 100_000
"""Objects in one nested tuple, shared ones counted wherever they appear: hashing visits each of
them, so forty tuples that hold their predecessor twice would keep Python busy for years."""

MAX_PROTOCOL = 5

_ALLOWED = re.compile(
    r"collections\.OrderedDict"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.parameter\.Parameter"
    r"|torch\.(storage\.)?\w*Storage"
    r"|torch\.(Size|device|Tensor|b?float\d+\w*|double|half|u?int\d+|long|bool|complex\d+)"
)

# torch.save writes GLOBAL only; any other way to name a function has no place in its files.
_UNSAFE_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


def find_unsafe_name(file: IO[bytes]) -> str | None:
    """Return the first name or opcode a tensor file may not hold, or None; runs nothing.

    Reads one pickle from the current position of `file`.

    Raises
    ------
    ValueError
        If the bytes are no complete pickle, one over `MAX_PICKLE_BYTES`, one that nests deeper
        than `MAX_NESTING`, or one whose tuples expand to more than `MAX_EXPANDED` objects.
    """
    start = file.tell()
    nesting = _Nesting()
    for opcode, argument, position in pickletools.genops(file):
        if position is not None and position - start > MAX_PICKLE_BYTES:
            raise ValueError("a directory of tensors over 16 MiB")
        if opcode.name == "PROTO" and isinstance(argument, int) and argument > MAX_PROTOCOL:
            raise ValueError(f"pickle protocol {argument}, which does not exist")
        if opcode.name == "GLOBAL":
            dotted = str(argument).replace(" ", ".")
            if not _ALLOWED.fullmatch(dotted):
                return _printable(dotted)
        elif opcode.name in _UNSAFE_OPCODES:
            return f"opcode {opcode.name}"
        nesting.follow(opcode, argument)
    return None


class _Nesting:
    """Follows a pickle's stack with nothing but the (depth, expanded size) of each object on it."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, int]] = []
        self.memo: dict[object, tuple[int, int]] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Apply one opcode; raise ValueError if an object nests too deep or expands too far."""
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            return
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
            return
        if opcode.name == "DUP":
            self.stack.append(self.stack[-1])
            return
        if opcode.name == "MARK":
            self.stack.append(_MARK)
            return
        parts = self._pop(opcode.stack_before)
        depth = max((depth for depth, _ in parts), default=0)
        size = 1
        if opcode.name in _WRAPPING_OPCODES:
            depth += 1
            size += sum(size for _, size in parts)
            if depth > MAX_NESTING:
                raise ValueError(f"objects nested deeper than {MAX_NESTING}")
            if size > MAX_EXPANDED:
                raise ValueError(f"nested tuples of more than {MAX_EXPANDED} objects")
        self.stack.extend([(depth, size)] * len(opcode.stack_after))

    def _pop(self, taken: list[pickletools.StackObject]) -> list[tuple[int, int]]:
        popped = []
        count = len(taken)
        if pickletools.markobject in taken:
            while (depth := self.stack.pop()) != _MARK:
                popped.append(depth)
            count = taken.index(pickletools.markobject)
        return popped + [self.stack.pop() for _ in range(count)]


_MARK = (-1, 0)
_WRAPPING_OPCODES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "BUILD", "NEWOBJ"}


def first_global(path: Path) -> str | None:
    """Return the first name a plain pickle imports that no tensor needs; runs nothing.

    Only a hint for an error message: None if there is none near the start, or the file is damaged.
    """
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in islice(pickletools.genops(file), 10_000):
                name = None
                if opcode.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                if name and not _ALLOWED.fullmatch(name):
                    return _printable(name)
    except Exception:
        return None
    return None


def _printable(name: str) -> str:
    return repr(name[:100])[1:-1]
