"""Mutations of pickles: one opcode removed, repeated, moved, or given another argument."""

import pickletools
import struct
from random import Random

from fuzz_values import INTEGERS, NAMES, flip

__all__ = ["mutate_legacy", "mutate_pickle"]

_GLOBALS = [
    *("os system", "builtins eval", "builtins getattr", "torch load", "torch.serialization load"),
    *("collections OrderedDict", "torch FloatStorage", "torch._utils _rebuild_tensor_v2"),
    *("torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2", "torch Size"),
    *("torch.nn.parameter Parameter", "torch device", "torch BFloat16Storage", "torch.storage x"),
    *("torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter_with_state", "torch Tensor"),
    *("torch QInt8Storage", "torch.storage UntypedStorage", "torch ComplexDoubleStorage"),
]

_SNIPPETS = [
    b"}", b"]", b")", b"(", b"t", b"l", b"d", b"0", b"1", b"2", b"N", b"\x88", b"\x85", b"\x86",
    b"\x87", b"R", b"b", b"s", b"u", b"a", b"e", b"Q", b"\x81", b"\x92", b"\x93", b"\x94", b".",
    b"h\x00", b"h\x01", b"h\x02", b"q\x01", b"q\xff", b"j\xff\xff\xff\x7f", b"r\x00\x00\x00\x40",
    b"J\xff\xff\xff\x7f", b"K\x00", b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01", b"I-1\n",
    b"\x8b\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"F1e400\n", b"\x95\x00" * 4,
    b"V\\ud800\n", b"X\x02\x00\x00\x00ab", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"\x80\x05",
    b"\x85" * 120, b"12\x86" * 1 + b"\x862\x86" * 40, b"(" * 200, b"]" * 200, b"\x97", b"\x98",
]  # fmt: skip


def mutate_pickle(data: bytes, rng: Random) -> bytes:
    """Change one or a few opcodes of the first pickle in `data`; the rest follows unchanged."""
    try:
        found = [(op, argument, at) for op, argument, at in pickletools.genops(data)]
    except Exception:
        return flip(data, rng)
    ends = [at for _, _, at in found[1:]] + [found[-1][2] + 1]
    rest = data[ends[-1] :]
    ops = [
        (op, argument, data[at:end]) for (op, argument, at), end in zip(found, ends, strict=True)
    ]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(ops))
        kind = rng.randrange(8)
        if kind < 4:
            # Arguments decide more than opcodes: sizes, strides, names, memo places.
            with_argument = [i for i, (_, argument, _) in enumerate(ops) if argument is not None]
            at = rng.choice(with_argument or [at])
            ops[at] = (*ops[at][:2], _argument(*ops[at], rng))
        elif kind == 4 and len(ops) > 1:
            del ops[at]
        elif kind == 5:
            ops.insert(rng.randrange(len(ops)), ops[at])
        elif kind == 6:
            other = rng.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        else:
            snippet = rng.choice(_SNIPPETS)
            if rng.random() < 0.3:
                snippet = b"c" + rng.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"
            ops.insert(at, (None, None, snippet))
    return b"".join(raw for _, _, raw in ops) + rest


def mutate_legacy(data: bytes, rng: Random) -> bytes:
    """Change one of the pickles that stand one after the other, or the bytes behind them."""
    starts, position = [0], 0
    try:
        for _ in range(5):
            *_, last = pickletools.genops(data[position:])
            position += last[2] + 1
            starts.append(position)
    except Exception:
        pass
    at = rng.choice(starts)
    return data[:at] + (
        mutate_pickle(data[at:], rng) if rng.random() < 0.9 else flip(data[at:], rng)
    )


def _argument(op, argument, raw: bytes, rng: Random) -> bytes:
    if op is None:
        return raw
    if op.name == "GLOBAL":
        return b"c" + rng.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"
    if isinstance(argument, bool) or op.name.endswith(("PUT", "GET", "PROTO", "FRAME")):
        return raw[:1] + bytes([rng.randrange(256)]) + raw[2:]
    if isinstance(argument, int):
        value = rng.choice([*INTEGERS, argument + 1, argument * 2, -argument])
        length = value.bit_length() // 8 + 1
        if length > 255:
            return b"J\x00\x00\x00\x00"
        return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
    if isinstance(argument, str):
        other = [
            *NAMES,
            argument.swapcase(),
            argument + "x",
            argument[:-1],
            "cuda:0",
            "meta",
            "cpu",
        ]
        text = rng.choice(other).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    return flip(raw, rng)
