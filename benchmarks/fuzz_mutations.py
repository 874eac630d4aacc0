"""Mutations that keep most of a file's structure: the reader then gets past its first checks.

Each takes the bytes of a file and a `random.Random` and returns changed bytes. Bytes that a
mutation cannot take apart are flipped instead.
"""

import io
import json
import re
import sqlite3
import struct
import zipfile
from random import Random

from fuzz_pickles import mutate_legacy, mutate_pickle
from fuzz_values import INTEGERS, NAMES, NUMBERS, flip, mutate_json, pick_slice

__all__ = ["MUTATIONS"]

_YAML = [
    "&a [*a]", "*a", "!!python/object/apply:os.system ['true']", "!!binary aGk=", "<<: {a: 1}",
    "? [a, b]\n: c", "---", "...", "%YAML 1.1", "- " * 50 + "x", "{" * 60, "[" * 200, "|", ">-",
    "!!int x", "!!float 1e400", "!!set {a, b}", "!<tag:yaml.org,2002:int> 9", "\t", "\ufeff",
    '"\\UFFFFFFFF"', '"\\ud800"', "'", '"', "# c", "a: &x 1", "? ", ": ", "~", "yes", "2001-01-01",
    "0o17", "0b11", "1:20", "1_000", "+.inf", "-.nan", '"\\x00"', "\x85", "\u2028", "!", "&", "@",
]  # fmt: skip
_TOML = [
    "a.b.c.d = 1", "[a.b]", "[[override]]", "x = 1979-05-27T07:32:00Z", "x = 07:32:00", "nan",
    "x = {a = {b = 1}}", '"""', "'''", '"\\uD800"', '"\\U00110000"', "inf", "-nan", "[" * 200,
    "x = [" + "[" * 60, "true", "[datapath]", "array = 'fp32'", "combine = 'bf16'", "\ufeff",
    "p_format = 'fp16'", "tree_bits = 9", "products_per_add = 3", "rank = true", "\x00",
    "budget = 'fp16@2'",
    "split = 'W4A4'", "hw = ['aie2@emulated_int4']", "group = 7", "family = 'mxfp'", "\r", "1e400",
    "hw = '../x.yaml'", "layers = '['", "seeds = []", "splits = []", "W9A9", "W4A4+W8A8r999999",
]  # fmt: skip
_CSV = [
    ",", '"', "\n", "\r", "\x00", "\ufeff", "single core", "rank 99999 W8 branch", "unfused",
    "rank 8 int8 branch", "recompute", "0x0x0", "8x8x8", "²x²x²", "-1x2x3", "1e999", "nan", "inf",
    "-inf", "0", "1e-320", "١٢", "²", "int8", "nvfp4", "fp8", "M", "device", "a100", "aie2",
    "_1", "1_0",
    "9" * 5000 + "x1x1", "rank " + "9" * 5000 + " int8 branch", "NVIDIA", "x" * 5000,
]  # fmt: skip
_TEXT_NUMBER = re.compile(r"[-+]?\d[\d_]*(\.\d+)?([eE][-+]?\d+)?")
_HOSTILE_SQL = [
    "UPDATE rows SET {c} = x'00ff'", "UPDATE rows SET {c} = 'text'", "UPDATE rows SET {c} = 9e999",
    "UPDATE rows SET {c} = NULL", "UPDATE rows SET {c} = -9223372036854775808",
    "UPDATE rows SET {c} = CAST(x'ff' AS TEXT)", "UPDATE rows SET {c} = '{{\"a\": 1}}'",
    "UPDATE rows SET {c} = '[1]'", "UPDATE rows SET {c} = '{{\"case_id\": 1, \"layer\": []}}'",
    "UPDATE rows SET {c} = char(0, 10, 27, 55296)", "ALTER TABLE rows DROP COLUMN {c}",
    "ALTER TABLE rows RENAME COLUMN {c} TO other", "DROP TABLE rows", "DROP TABLE planned",
    "DROP TABLE runs", "PRAGMA user_version = 3", "PRAGMA user_version = -1",
    "PRAGMA application_id = 0", "UPDATE runs SET provenance = '['", "DELETE FROM rows",
    "UPDATE runs SET provenance = x'00'", "UPDATE runs SET provenance = '[1]'",
    "UPDATE planned SET run = 'x', position = x'01'", "UPDATE planned SET case_id = x'ff'",
    "DROP TABLE rows; CREATE VIEW rows AS WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i+1 "
    "FROM t) SELECT i AS case_id FROM t",
    "CREATE TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM rows; END",
    "ALTER TABLE rows ADD COLUMN g AS (randomblob(900000000))", "CREATE INDEX i ON rows({c})",
    "PRAGMA writable_schema=ON; UPDATE sqlite_master SET sql = replace(sql, 'TEXT', 'T(')",
    "PRAGMA writable_schema=ON; UPDATE sqlite_master SET rootpage = 1",
    "PRAGMA writable_schema=ON; UPDATE sqlite_master SET type = 'view'",
]  # fmt: skip


def mutate_zip(data: bytes, rng: Random) -> bytes:
    """Change the members of a zip file, or the fields of its directory."""
    if rng.random() < 0.2:
        return _zip_directory(data, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(i.filename, archive.read(i), i.compress_type) for i in archive.infolist()]
    except Exception:
        return flip(data, rng)
    if not members:
        return flip(data, rng)
    at = rng.randrange(len(members))
    name, content, method = members[at]
    kind = rng.randrange(12)
    if kind < 7:
        members[at] = (name, _member(name, content, rng), method)
    elif kind == 7:
        folder, slash, last = name.rpartition("/")
        other = [rng.choice(NAMES), "data.pkl", "DATA.PKL", name.swapcase(), f"../{name}"]
        members[at] = (rng.choice([folder + slash + rng.choice(other), *other]), content, method)
    elif kind == 8:
        members.insert(rng.randrange(len(members) + 1), members[at])
    elif kind == 9:
        del members[at]
    elif kind == 10:
        methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        members[at] = (name, content, rng.choice(methods))
    else:
        members[at] = (name, rng.choice([data, b"", b"\0" * 10**6, content * 2]), method)
    return _zip_of(members) if members else b"PK\x05\x06" + bytes(18)


def _zip_of(members: list) -> bytes:
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # Of names that are there twice: on purpose.
        for name, content, method in members:
            text = name.encode("utf-8", "replace").decode()
            archive.writestr(zipfile.ZipInfo(text[:60000]), content, compress_type=method)
    return buffer.getvalue()


def _zip_directory(data: bytes, rng: Random) -> bytes:
    """Overwrite one field of a local header, a directory entry or the end record."""
    places = [m.start() for m in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06)", data)]
    if not places:
        return flip(data, rng)
    at = rng.choice(places) + rng.randrange(4, 46)
    width = rng.choice([1, 2, 4])
    value = rng.choice(INTEGERS) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
    return (data[:at] + (value % 256**width).to_bytes(width, "little") + data[at + width :])[:65536]


def _member(name: str, content: bytes, rng: Random) -> bytes:
    if name.endswith(".pkl") and rng.random() < 0.9:
        return mutate_pickle(content, rng)
    if name.endswith(".npy") and rng.random() < 0.8:
        return _npy_header(content, rng)
    return flip(content, rng)


def _npy_header(content: bytes, rng: Random) -> bytes:
    if len(content) < 10 or rng.random() < 0.1:
        return flip(content, rng)
    size = struct.unpack("<H", content[8:10])[0]
    header = content[10 : 10 + size].decode("latin-1")
    body = content[10 + size :]
    kind = rng.randrange(5)
    if kind == 0:
        types = ["'|O'", "'<U9'", "'<f8'", "'>f4'", "'|V2147483647'", "[('a', '<f4')]", "'<M8[s]'"]
        types += ["('<f4', (2147483648,))", "'" + "f4," * 500 + "'", "'<U268435455'", "'<c16'"]
        header = re.sub(r"'descr': [^,]*", f"'descr': {rng.choice(types)}", header)
    elif kind == 1:
        sizes = ", ".join(str(rng.choice(NUMBERS)) for _ in range(rng.randrange(6)))
        header = re.sub(r"\([^)]*\)", f"({sizes},)" if sizes else "()", header)
    elif kind == 2:
        header = header.replace("False", rng.choice(["True", "None", "1", "[]", "(" * 99]))
    elif kind == 3:
        header = _text(header, rng, ["(", "{", "__import__('os')", "L", "#", "\n", "}", "9" * 5000])
    else:
        body = flip(body, rng)
    encoded = header.encode("latin-1", "replace")[:60000]
    if rng.random() < 0.7:
        size = len(encoded)
    return content[:8] + struct.pack("<H", size) + encoded + body


def mutate_torch(data: bytes, rng: Random) -> bytes:
    """A zip of a pickle and tensors, or the row of pickles that torch wrote before 1.6."""
    return mutate_zip(data, rng) if data[:2] == b"PK" else mutate_legacy(data, rng)


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """Change the JSON header, the JSON texts inside its metadata, or the values."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        body = data[8 + size :]
    except (ValueError, RecursionError):
        return flip(data, rng)
    if rng.random() < 0.1:
        return flip(data[: 8 + size], rng) + flip(body, rng)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    items = metadata.items() if isinstance(metadata, dict) else ()
    texts = [key for key, value in items if isinstance(value, str) and value[:1] == "{"]
    if texts and rng.random() < 0.5:
        key = rng.choice(texts)
        try:
            metadata[key] = mutate_json(json.loads(metadata[key]), rng)
        except (ValueError, RecursionError):
            metadata[key] = flip(metadata[key].encode(), rng).decode("utf-8", "replace")
        text = json.dumps(header)
    else:
        text = mutate_json(header, rng)
    if rng.random() < 0.15:
        body = rng.choice([b"", body * 2, flip(body, rng), bytes(len(body)), b"\xff" * len(body)])
    encoded = text.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    size = len(encoded) if rng.random() < 0.95 else rng.choice(INTEGERS) % 2**64
    return size.to_bytes(8, "little") + encoded + body


def mutate_gguf(data: bytes, rng: Random) -> bytes:
    """Put another number where the directory has one: counts, lengths, types, sizes, offsets."""
    if rng.random() < 0.3:
        return flip(data, rng)
    place = rng.randrange(max(1, min(len(data), 320) - 8))
    layout = rng.choice(["<B", "<I", "<Q"])
    size = struct.calcsize(layout)
    number = rng.choice([*INTEGERS, *range(16)]) % 2 ** (8 * size)
    return data[:place] + struct.pack(layout, number) + data[place + size :]


def mutate_text_json(data: bytes, rng: Random) -> bytes:
    """Change the tree of a JSON file, or its bytes."""
    if rng.random() < 0.2:
        return flip(data, rng)
    try:
        return json.dumps(mutate_json(json.loads(data), rng)).encode()
    except (ValueError, RecursionError, TypeError):
        return flip(data, rng)


def mutate_protobuf(data: bytes, rng: Random) -> bytes:
    """Change one field of a message, as deep as it parses: its number, value, length or place."""
    if rng.random() < 0.2:
        return flip(data, rng)
    fields = _fields(data)
    if not fields:
        return flip(data, rng)
    place = rng.randrange(len(fields))
    key, value = fields[place]
    if key & 7 == 2 and rng.random() < 0.75 and len(value) > 1:
        fields[place] = (key, mutate_protobuf(value, rng))
    else:
        action = rng.randrange(4)
        if action == 0:
            del fields[place]
        elif action == 1:
            fields.insert(rng.randrange(len(fields) + 1), (key, value))
        elif action == 2:
            fields[place] = (rng.choice([1, 2, 3, 4, 5, 8, 9, 13, 14, 20]) << 3 | key & 7, value)
        else:
            fields[place] = (key & ~7, _varint(rng.choice(INTEGERS) % 2**64))
    return b"".join(
        _varint(key) + (_varint(len(value)) if key & 7 == 2 else b"") + value
        for key, value in fields
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """Key and value of each field of a message; nothing if it is none."""
    found, place = [], 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while place < len(data) and shift < 64:
            byte = data[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
        raise ValueError

    try:
        while place < len(data):
            key = number()
            if key & 7 == 2:
                size = number()
                if size > len(data) - place:
                    return []
                found.append((key, data[place : place + size]))
                place += size
            elif key & 7 == 0:
                start = place
                number()
                found.append((key, data[start:place]))
            else:
                return []
    except ValueError:
        return []
    return found


def mutate_sqlite(data: bytes, rng: Random) -> bytes:
    """Run a hostile statement on the database, or change bytes where pages keep their structure."""
    if rng.random() < 0.5:
        return _sqlite_bytes(data, rng)
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(data)
        columns = [row[1] for row in connection.execute("PRAGMA table_info(rows)")]
        column = f'"{rng.choice(columns)}"' if columns else "extra"
        connection.executescript(rng.choice(_HOSTILE_SQL).format(c=column))
        return connection.serialize()
    except (sqlite3.Error, OverflowError, ValueError):
        return _sqlite_bytes(data, rng)
    finally:
        connection.close()


def _sqlite_bytes(data: bytes, rng: Random) -> bytes:
    if len(data) < 512:
        return flip(data, rng)
    if rng.random() < 0.1:
        return data[: rng.randrange(len(data))]
    page = rng.randrange(len(data) // 512) * 512
    # File header, page header with its cell pointers, or anywhere.
    at = rng.choice([rng.randrange(100), page + rng.randrange(40), rng.randrange(len(data))])
    byte = bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])])
    return data[:at] + byte + data[at + 1 :]


def _text(text: str, rng: Random, tokens: list[str]) -> str:
    """Change one line, number or token of a text."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(9)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == 2:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines[at] = " " * rng.randrange(9) + lines[at].lstrip()
    elif kind in (4, 5):
        found = list(_TEXT_NUMBER.finditer(text))
        if found:
            where = rng.choice(found)
            return text[: where.start()] + str(rng.choice(NUMBERS)) + text[where.end() :]
    elif kind == 6:
        head = re.match(r"[^:=,]*[:=,]?\s*", lines[at])[0]
        lines[at] = head + rng.choice([*tokens, *NAMES])
    elif kind == 7:
        cut = rng.randrange(len(text) + 1)
        return text[:cut] + rng.choice(tokens) + text[cut:]
    else:
        begin, end = pick_slice(len(text), rng)
        return text[:begin] + text[end:]
    return "\n".join(lines)


def _text_mutation(tokens: list[str]):
    def mutate(data: bytes, rng: Random) -> bytes:
        if rng.random() < 0.1:
            return flip(data, rng)
        text = data.decode("utf-8", "surrogateescape")
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            text = _text(text, rng, tokens)
        if rng.random() < 0.03:
            encoding = rng.choice(["utf-16", "utf-8-sig", "utf-32", "latin-1"])
            return text.replace("\n", "\r\n").encode(encoding, "replace")
        return text.encode("utf-8", "surrogateescape" if _is_escaped(text) else "surrogatepass")

    return mutate


def _is_escaped(text: str) -> bool:
    return all(not 0xD800 <= ord(c) <= 0xDFFF or 0xDC80 <= ord(c) <= 0xDCFF for c in text)


MUTATIONS = {
    "torch": mutate_torch,
    "safetensors": mutate_safetensors,
    "npz": mutate_zip,
    "gguf": mutate_gguf,
    "index": mutate_text_json,
    "config": mutate_text_json,
    "onnx": mutate_protobuf,
    "nunchaku": mutate_safetensors,
    "adapter": mutate_safetensors,
    "accelerator": _text_mutation(_YAML),
    "plan": _text_mutation(_TOML),
    "measured": _text_mutation(_CSV),
    "store": mutate_sqlite,
    "quantized": mutate_safetensors,
}
"""Reader name to its mutation."""
