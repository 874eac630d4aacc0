"""GGUF files, written here byte by byte; blocks are decoded by the published layouts in Python."""

import re
import struct

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.errors import DumpError

RNG = np.random.default_rng(7)
N, K = 2, 256
NAME = "double_blocks.0.txt_mlp.0"


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_file(tensors, facts=(), version=3):
    """`tensors`: name, sizes (outermost first), type, bytes."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts))
    for key, kind, payload in facts:
        head += text(key) + struct.pack("<I", kind) + payload
    data = b""
    for name, shape, kind, content in tensors:
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += text(name) + struct.pack("<I", len(shape)) + sizes
        head += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def half(data):
    return float(np.frombuffer(data, "<f2")[0])


def q8_0(block):
    return [half(block[:2]) * code for code in np.frombuffer(block[2:], "i1").tolist()]


def nibbles(data):
    return [byte & 15 for byte in data] + [byte >> 4 for byte in data]


def q4_0(block):
    return [half(block[:2]) * (code - 8) for code in nibbles(block[2:])]


def q4_1(block):
    return [half(block[:2]) * code + half(block[2:4]) for code in nibbles(block[4:])]


def q4_k(block):
    d, low, scales, codes = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    values = []
    for part in range(8):
        if part < 4:
            scale, least = scales[part] & 63, scales[part + 4] & 63
        else:
            scale = (scales[part + 4] & 15) | (scales[part - 4] >> 6) << 4
            least = (scales[part + 4] >> 4) | (scales[part] >> 6) << 4
        of_part = codes[32 * (part // 2) : 32 * (part // 2) + 32]
        for byte in of_part:
            code = byte >> 4 if part % 2 else byte & 15
            values.append(d * scale * code - low * least)
    return values


def q6_k(block):
    low, high, d = block[:128], block[128:192], half(block[208:210])
    scales = np.frombuffer(block[192:208], "i1").tolist()
    values = []
    for i in range(256):
        of_half, inside = divmod(i, 128)
        quarter, at = divmod(inside, 32)
        byte = low[64 * of_half + 32 * (quarter % 2) + at]
        four = byte >> 4 if quarter > 1 else byte & 15
        two = high[32 * of_half + at] >> (2 * quarter) & 3
        values.append(d * scales[i // 16] * ((four | two << 4) - 32))
    return values


# Type, values a block, bytes a block, where its fp16 numbers stand, decoder.
CODED = {
    "Q8_0": (8, 32, 34, (0,), q8_0),
    "Q4_0": (2, 32, 18, (0,), q4_0),
    "Q4_1": (3, 32, 20, (0, 2), q4_1),
    "Q4_K": (12, 256, 144, (0, 2), q4_k),
    "Q6_K": (14, 256, 210, (208,), q6_k),
}


def random_blocks(n_values, block, size, halves):
    blocks = []
    for _ in range(n_values // block):
        content = bytearray(RNG.integers(0, 256, size, dtype=np.uint8).tobytes())
        for place in halves:
            content[place : place + 2] = np.float16(RNG.uniform(0.01, 2)).tobytes()
        blocks.append(bytes(content))
    return blocks


@pytest.mark.parametrize("name", CODED)
def test_blocks_are_decoded_as_published(tmp_path, name):
    pytest.importorskip("gguf")
    kind, block, size, halves, decode = CODED[name]
    blocks = random_blocks(N * K, block, size, halves)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file([(f"{NAME}.weight", (N, K), kind, b"".join(blocks))]))
    dump = lq.read_layer_dump(path)
    assert list(dump) == [NAME]
    assert dump.info(NAME).dtype == name
    assert dump.info(NAME).nbytes == N * K // block * size
    expected = np.array([decode(one) for one in blocks]).reshape(N, K)
    # Products of two or three numbers in float32.
    np.testing.assert_allclose(dump[NAME].weight, expected, rtol=5e-7, atol=2e-6)


@pytest.mark.parametrize("kind", [0, 1, 30])
def test_floats_need_no_package(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    values = RNG.integers(-8, 8, (N, K)).astype(np.float32)
    bits = values.view(np.uint32) >> 16
    content = {0: values, 1: values.astype("<f2"), 30: bits.astype("<u2")}[kind].tobytes()
    facts = [
        ("general.architecture", 8, text("flux")),
        ("general.alignment", 4, struct.pack("<I", 32)),
        ("names", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
    ]
    bias = np.arange(N, dtype="<f4").tobytes()
    tensors = [
        (f"model.diffusion_model.{NAME}.weight", (N, K), kind, content),
        (f"model.diffusion_model.{NAME}.bias", (N,), 0, bias),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file(tensors, facts))
    dump = lq.read_layer_dump(path)
    np.testing.assert_array_equal(dump[NAME].weight, values)
    np.testing.assert_array_equal(dump[NAME].bias, [0, 1])
    assert dump.meta["general.architecture"] == "flux"


def test_comfyui_says_what_shape_a_tensor_had(tmp_path):
    values = np.arange(64, dtype="<f4")
    shape = struct.pack("<IQ2i", 5, 2, 4, 16)
    facts = [("comfy.gguf.orig_shape.fc.weight", 9, shape)]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file([("fc.weight", (64,), 0, values.tobytes())], facts))
    np.testing.assert_array_equal(lq.read_layer_dump(path)["fc"].weight, values.reshape(4, 16))


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file([("fc.weight", (N, K), 8, bytes(N * K // 32 * 34))]))
    with pytest.raises(DumpError, match=re.escape("pip install 'loraq-sim[gguf]'")):
        lq.read_layer_dump(path)


WHOLE = gguf_file([("fc.weight", (4, 8), 0, bytes(128))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "ends early; truncated"),
        (WHOLE[:-1], "ends beyond the file; truncated"),
        (WHOLE[:60], "ends early"),
        (gguf_file([], version=1), "GGUF version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "more than the file has room for"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "more than the file has room for"),
        (gguf_file([("w", (4, 8), 0, bytes(128))] * 2), "is there twice"),
        (gguf_file([("w", (4,) * 9, 0, b"")]), "a tensor of 9 dimensions"),
        (gguf_file([], [("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
        (gguf_file([], [("a", 13, b"")]), "a value of type 13"),
        (gguf_file([]), "holds no layers"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(DumpError, match=re.escape(message)) as caught:
        lq.read_layer_dump(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
