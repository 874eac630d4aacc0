"""Values that readers tend to get wrong, and mutations of plain bytes and JSON trees."""

import json
from random import Random
from typing import Any

__all__ = ["INTEGERS", "NAMES", "NUMBERS", "flip", "mutate_json", "pick_slice"]

INTEGERS = [
    *(0, 1, -1, 2, 3, 4, 6, 7, 8, 255, 256, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31), -(2**63), 10**30, 10**400),
]

NUMBERS = [
    *INTEGERS, 0.5, -0.0, 1e-320, 1e308, "1e400", "-1e400", "nan", "inf", ".nan", ".inf", "1e5",
    "0x10", "0x" + "f" * 5000, "9" * 5000, "1_000", "0o17", "017", "1.", "true", "null", "''", "[]",
]  # fmt: skip

NAMES = [
    *(
        "",
        " ",
        ".",
        "..",
        "../../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "\x1b[31mred",
        "\t",
    ),
    *(
        "x" * 3000,
        "\ud800",
        "\u202eabc",
        "\ufeff",
        "é" * 40,
        "__class__",
        "CON",
        "a/b/c",
        "file://x",
    ),
    *(
        "*",
        "[",
        "%s",
        "{0}",
        "$(id)",
        "`id`",
        "'",
        '"',
        "\\",
        "-1",
        "None",
        "nan",
        "W4A4",
        "weight",
    ),
]


def flip(data: bytes, rng: Random) -> bytes:
    """Change, remove, insert or repeat a few bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        kind = rng.randrange(5)
        begin, end = pick_slice(len(out), rng)
        if kind == 0:
            del out[begin:end]
        elif kind == 1:
            out[begin:begin] = out[begin:end]
        elif kind == 2:
            width = rng.choice([1, 2, 4, 8])
            out[begin : begin + width] = (rng.choice(INTEGERS) % 256**width).to_bytes(
                width, "little"
            )
        elif kind == 3 and out:
            out[min(begin, len(out) - 1)] ^= 1 << rng.randrange(8)
        else:
            out[begin:begin] = rng.randbytes(rng.randrange(1, 9))
    return bytes(out[:65536])


def pick_slice(size: int, rng: Random) -> tuple[int, int]:
    """A random slice, short more often than long."""
    begin = rng.randrange(size + 1)
    longest = rng.choice([1, 4, 16, size])
    return begin, min(size, begin + rng.randrange(longest + 1))


def mutate_json(tree: Any, rng: Random) -> str:
    """Text of a JSON tree with one node changed, or one key there twice."""
    text = json.dumps(_changed(tree, rng))
    if rng.random() < 0.1:
        mark = text.find('": ', rng.randrange(len(text) + 1))
        if mark > 0:
            begin = text.rfind('"', 0, mark)
            value = json.dumps(_hostile(rng))
            text = f'{text[:begin]}{text[begin:mark]}": {value}, {text[begin:]}'
    if rng.random() < 0.05:
        text = text.replace(
            "1", rng.choice(["1e400", "-0", "1E5", "NaN", "9" * 5000, "\ufeff1"]), 1
        )
    return text


def _changed(tree: Any, rng: Random) -> Any:
    children = (
        list(tree)
        if isinstance(tree, dict)
        else list(range(len(tree)))
        if isinstance(tree, list)
        else []
    )
    if not children or rng.random() < 0.12:
        return _hostile(rng)
    key = rng.choice(children)
    copy = tree.copy()
    kind = rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.2 and isinstance(copy, dict):
        copy[rng.choice([*NAMES, *children])] = copy.pop(key)
    elif kind < 0.25:
        other = rng.choice(children)
        copy[key], copy[other] = copy[other], copy[key]
    else:
        copy[key] = _changed(copy[key], rng)
    return copy


def _hostile(rng: Random) -> Any:
    kind = rng.randrange(7)
    if kind < 2:
        # JSON writes integers in decimal, which Python does up to 4300 digits.
        return rng.choice(INTEGERS)
    if kind == 2:
        return rng.choice(NAMES)
    if kind == 3:
        return rng.choice([None, True, False, 0.5, 1e308, float("nan"), float("inf"), -1.5])
    if kind == 4:
        return rng.choice(
            [[], {}, [[]], {"": {}}, [1, [2, [3]]], {"a": [None]}, [-1, -4], [2**62, 0]]
        )
    if kind == 5:
        nested: Any = 1
        for _ in range(rng.choice([5, 90, 900])):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    return [rng.choice(INTEGERS) for _ in range(rng.randrange(6))]
