"""What a file is, judged by its content, and whether its pickle may be loaded.

`file_kind` recognizes a file by its first bytes and, for a zip, by its directory; everything but a
layer dump is refused, with what was found.

`find_unsafe_name` reads a pickle's instructions without running them, and finds names that no
tensor file needs. torch.load(weights_only=True) has its own list of allowed names. This scan stands
before it: the error then says what the file wanted to call, and safety does not hang on one torch
version alone.

`load_records` reads a scanned pickle with an unpickler of its own that looks no name up.
"""

import pickle
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, counted

__all__ = [
    "MAX_PICKLE_BYTES",
    "Record",
    "Wrapper",
    "file_kind",
    "find_unsafe_name",
    "load_records",
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

# Names of what holds facts beside the tensors of a training checkpoint, or values of quantized
# tensors. They are never looked up: what they name is read as a record of its arguments.
_INERT = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|torch\.torch_version\.TorchVersion"
    r"|pathlib\.\w+|datetime\.\w+|collections\.(defaultdict|Counter|deque)"
    r"|numpy\.(dtype|(_core|core)\.multiarray\.scalar)|_codecs\.encode"
    r"|(omegaconf|easydict|addict|yacs|ml_collections|torchao|diffusers\.configuration_utils"
    r"|pytorch_lightning|lightning|lightning_fabric|lightning_utilities)\.[\w.]+"
    r"|torch\._utils\._rebuild_wrapper_subclass|torch\.serialization\._get_layout"
    r"|torch\.(optim\.[\w.]+|nn\.modules\.container\.ParameterDict))"
)

# torch.save writes GLOBAL only; any other way to name a function has no place in its files.
_UNSAFE_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


def find_unsafe_name(file: IO[bytes], inert: set[str] | None = None) -> str | None:
    """Return the first name or opcode a tensor file may not hold, or None; runs nothing.

    Reads one pickle from the current position of `file`. Names that a reader which looks none up
    may meet are collected in `inert`, where it is given.

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
            if inert is not None and _INERT.fullmatch(dotted):
                inert.add(dotted)
            elif not _ALLOWED.fullmatch(dotted):
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


class Record:
    """What a pickle says of an object whose class is never looked up."""

    args: tuple[object, ...]
    facts: dict[str, object]

    def __new__(cls, *args: object) -> "Record":
        made = super().__new__(cls)
        made.args, made.facts = args, {}
        return made

    def __init__(self, *args: object) -> None:
        """Pickles make objects with `__new__` alone, too."""

    def __setstate__(self, state: object) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.facts |= {key: x for key, x in part.items() if isinstance(key, str)}

    def __setitem__(self, key: object, value: object) -> None:
        if isinstance(key, str):
            self.facts[key] = value

    def append(self, _: object) -> None:
        """Lists of such objects hold nothing of a layer."""

    extend = append


class Wrapper(Record):
    """A tensor class that holds others; `args` are its class, dtype, sizes and more."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """As the wrapper says them; (1, 1) where it does not."""
        found = self.args[2] if len(self.args) > 2 else None
        is_shape = isinstance(found, tuple | list) and all(type(x) is int for x in found)
        return tuple(found) if is_shape and isinstance(found, tuple | list) else (1, 1)


class _Ordered(dict):
    """An OrderedDict: a state dict has its metadata as an attribute."""


class _Unpickler(pickle.Unpickler):
    """Reads a scanned pickle with functions of this file alone; nothing is imported by name."""

    def __init__(self, file: IO[bytes], path: Path, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._path, self._archive, self._root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; never the name itself."""
        import torch

        dotted = f"{module}.{name}"
        if dotted in _BUILDERS:
            return _BUILDERS[dotted]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if name.endswith("Storage") and module in ("torch", "torch.storage"):
            return _STORAGES.get(name, "uint8")
        return Record

    def persistent_load(self, pid: Any) -> "_Bytes":
        """The bytes of a storage, in place in the file."""
        _, dtype, key, _, count = pid
        member = self._archive.getinfo(f"{self._root}/data/{key}")
        with self._path.open("rb") as file:
            file.seek(member.header_offset)
            header = file.read(30)
        name, extra = struct.unpack("<26xHH", header)
        start = member.header_offset + 30 + name + extra
        values = np.memmap(self._path, np.uint8, "c", start, (member.file_size,))
        return _Bytes(values, str(dtype), int(count))


class _Bytes:
    def __init__(self, values: NDArray[np.uint8], dtype: str, count: int) -> None:
        self.values, self.dtype, self.count = values, dtype, count


_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "CharStorage": "int8", "ByteStorage": "uint8",
    "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64", "BoolStorage": "bool",
}  # fmt: skip


def _tensor(
    held: _Bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any
) -> Any:
    import torch

    dtypes = [value for value in more if isinstance(value, torch.dtype)]
    dtype = dtypes[0] if dtypes else getattr(torch, held.dtype)
    whole = held.values[: held.values.size // dtype.itemsize * dtype.itemsize]
    # as_strided refuses what lies outside.
    return torch.from_numpy(whole).view(dtype).as_strided(size, stride, offset)


def _first(value: object, *_: object) -> object:
    return value


def _of_type(build: Any, kind: Any, args: tuple[Any, ...], state: object) -> object:
    made = build(*args)
    if isinstance(made, Record):
        made.__setstate__(state)
    return made


def _tuple(*parts: Any) -> tuple[Any, ...]:
    return tuple(parts[0]) if parts else ()


_BUILDERS: dict[str, Any] = {
    "collections.OrderedDict": _Ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_wrapper_subclass": Wrapper,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _tuple,
}


def load_records(path: Path) -> object:
    """What a zip of torch.save holds: tensors, plain values, and a `Record` for all else.

    The pickle must have passed `find_unsafe_name`.
    """
    with zipfile.ZipFile(path) as archive:
        (member,) = (
            name for name in archive.namelist() if name.lower().rpartition("/")[2] == "data.pkl"
        )
        with archive.open(member) as file:
            return _Unpickler(file, path, archive, member.rpartition("/")[0]).load()
