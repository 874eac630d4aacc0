import io
import json
import re
import zipfile

import numpy as np
import pytest

from loraq_sim.dumps import array_files as npz_file
from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.errors import DumpError


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape).astype(dtype)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def npy(array):
    content = io.BytesIO()
    np.lib.format.write_array(content, array)
    return content.getvalue()


def archive_of(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


RECORD = {
    "format": "layer-dump-v0",
    "meta": {"model": "toy"},
    "layers": {
        "q": {"kind": "self_q", "group": "g", "rows_per_call": 64},
        "k": {"kind": "self_k", "group": "g", "activations": "q.activations"},
    },
}


@pytest.mark.parametrize(
    "metadata",
    [
        np.array(json.dumps(RECORD)),
        np.array(json.dumps(RECORD).encode()),
        np.frombuffer(json.dumps(RECORD).encode(), dtype=np.uint8),
    ],
    ids=["text", "bytes", "uint8"],
)
def test_the_documented_layout_is_read(tmp_path, metadata):
    arrays = {
        "k.weight": ramp(5, 3),
        "q.weight": ramp(4, 3, dtype=np.float16),
        "q.bias": ramp(4, dtype=np.float64),
        "q.activations": ramp(7, 3),
    }
    dump = read_layer_dump(save(tmp_path / "a.npz", **arrays, __metadata__=metadata))
    assert list(dump) == ["q", "k"]
    assert dump.meta == {"model": "toy"}
    q, k = dump["q"], dump["k"]
    np.testing.assert_array_equal(q.weight, arrays["q.weight"])
    np.testing.assert_array_equal(q.bias, arrays["q.bias"])
    assert (q.kind, q.group, q.m) == ("self_q", "g", 64)
    assert k.activations is q.activations
    assert dump.skipped == {}


def test_plain_savez_is_a_dump_in_file_order(tmp_path):
    arrays = {"b.weight": ramp(2, 3), "a.weight": ramp(4, 3), "a.activations": ramp(5, 3)}
    dump = read_layer_dump(save(tmp_path / "a.npz", **arrays, extra=ramp(4)))
    assert list(dump) == ["b", "a"]
    assert dump.info("a").tokens == 5
    assert list(dump.skipped) == ["extra"]


def test_compressed_and_fortran_ordered_arrays_are_read(tmp_path):
    weight = np.asfortranarray(ramp(6, 5, dtype=">f8"))
    np.savez_compressed(tmp_path / "a.npz", **{"fc.weight": weight})
    layer = read_layer_dump(tmp_path / "a.npz")["fc"]
    np.testing.assert_array_equal(layer.weight, weight)
    assert layer.weight.flags.c_contiguous


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    reads = []
    read_array = np.lib.format.read_array

    def spy(file, **options):
        reads.append((file.name, options))
        return read_array(file, **options)

    monkeypatch.setattr(np.lib.format, "read_array", spy)
    dump = read_layer_dump(
        save(tmp_path / "a.npz", **{"a.weight": ramp(2, 3), "b.weight": ramp(5, 7)})
    )
    assert [dump.info(name).k for name in dump] == [3, 7]
    assert reads == []
    assert dump["b"].n == 5
    assert reads == [("b.weight.npy", {"allow_pickle": False})]


def test_pickled_objects_are_refused_and_nothing_runs(tmp_path):
    marker = tmp_path / "it_ran"

    class RunsCode:
        def __reduce__(self):
            import os

            return os.mkdir, (str(marker),)

    evil = np.array([RunsCode()], dtype=object)
    path = save(tmp_path / "a.npz", **{"fc.weight": ramp(2, 3), "evil": evil})
    with pytest.raises(
        DumpError, match="member 'evil' holds pickled objects, which could run code"
    ):
        read_layer_dump(path)
    assert not marker.exists()


def header_for(shape, descr="<f4"):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"shape": shape, "fortran_order": False, "descr": descr}
    )
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an array", "member 'fc.weight' is damaged"),
        (npy(ramp(2, 3))[:60], "member 'fc.weight' is damaged"),
        (npy(ramp(2, 3))[:-4], "needs 152; damaged or forged"),
        (header_for((2**40, 2**40)), "member 'fc.weight' declares 128 bytes but its header"),
        (header_for((-1, -4)), "member 'fc.weight' is damaged (negative size in shape)"),
        (b"\x93NUMPY\x09\x00" + bytes(64), "member 'fc.weight' is damaged"),
        (b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').mkdir('x')".ljust(118), "is damaged"),
    ],
)
def test_a_damaged_member_is_named_before_anything_is_allocated(tmp_path, content, message):
    path = archive_of(tmp_path / "a.npz", {"fc.weight.npy": content})
    with pytest.raises(DumpError, match=re.escape(message)) as caught:
        read_layer_dump(path)
    assert "\n" not in str(caught.value)


def test_a_zip_bomb_is_refused_when_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_file, "_SMALL_BYTES", 2**16)
    zeros = {"fc.weight.npy": npy(np.zeros((1000, 1000), dtype=np.float32))}
    path = archive_of(tmp_path / "a.npz", zeros, zipfile.ZIP_DEFLATED)
    with pytest.raises(DumpError, match="to 4000000, more than 100-fold: a zip bomb"):
        read_layer_dump(path)
    dense = archive_of(tmp_path / "b.npz", zeros, zipfile.ZIP_STORED)
    assert read_layer_dump(dense)["fc"].n == 1000


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (np.array("{oops"), "metadata '__metadata__' is no valid JSON"),
        (np.array("[1]"), "metadata '__metadata__' must be a JSON object, got list"),
        (
            np.array(3.5),
            "__metadata__ must be a 0-d string or uint8 array, got float64 of shape ()",
        ),
        (np.array('{"format": "v7"}'), "unknown dump format 'v7'; expected layer-dump-v0"),
        (np.array('{"layers": 3}'), "metadata 'layers' must be a JSON object"),
        (np.array('{"meta": [3]}'), "meta must be a mapping, got list"),
        (np.frombuffer(b"\xff\xfe", dtype=np.uint8), "damaged or not a layer dump (UnicodeDecode"),
    ],
)
def test_bad_metadata_is_refused(tmp_path, metadata, message):
    path = save(tmp_path / "a.npz", **{"fc.weight": ramp(2, 3), "__metadata__": metadata})
    with pytest.raises(DumpError, match=re.escape(message)):
        read_layer_dump(path)


def test_structured_and_integer_arrays_are_refused_by_dtype(tmp_path):
    record = np.zeros((2, 3), dtype=[("a", "f4"), ("b", "f4")])
    arrays = {
        "bad.weight": record,
        "int.weight": ramp(2, 3, dtype=np.int32),
        "good.weight": ramp(2, 2),
    }
    dump = read_layer_dump(save(tmp_path / "a.npz", **arrays))
    assert dump["good"].n == 2
    for name, dtype in [("bad", "void64"), ("int", "int32")]:
        with pytest.raises(DumpError, match=f"layer '{name}': weight has dtype {dtype}"):
            dump[name]


def test_flipped_bits_are_detected_when_the_layer_loads(tmp_path):
    path = save(tmp_path / "a.npz", **{"fc.weight": ramp(200, 300)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DumpError, match="layer 'fc': weight cannot be read: Bad CRC-32"):
        read_layer_dump(path)["fc"]


def test_an_archive_without_layers_is_refused(tmp_path):
    with pytest.raises(DumpError, match=r"holds no layers \(1 other tensors\)"):
        read_layer_dump(save(tmp_path / "a.npz", x=ramp(3)))
