"""Read a pickle's instructions without running them, and refuse names that no tensor file needs.

torch.load(weights_only=True) has its own list of allowed names. This scan stands before it: the
error then says what the file wanted to call, and safety does not hang on one torch version alone.
"""

import pickletools
import re
from itertools import islice
from pathlib import Path
from typing import BinaryIO

__all__ = ["MAX_PICKLE_BYTES", "find_unsafe_name", "first_global"]

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


def find_unsafe_name(file: BinaryIO) -> str | None:
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
        if position - start > MAX_PICKLE_BYTES:
            raise ValueError("a directory of tensors over 16 MiB")
        if opcode.name == "PROTO" and argument > MAX_PROTOCOL:
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
        self.memo: dict[int, tuple[int, int]] = {}

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

    def _pop(self, taken: list) -> list[tuple[int, int]]:
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
