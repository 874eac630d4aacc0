"""Dumps a stranger could hand over: each test hung, crashed or was half-read once."""

import io
import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch

from loraq_sim.dumps import read_layer_dump
from loraq_sim.dumps.file_kind import find_unsafe_name
from loraq_sim.errors import DumpError


def _zip(path, members, method=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return path


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _safetensors(path, header, body=bytes(24)):
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def test_shared_tuples_that_expand_without_end_are_refused():
    # Forty tuples, each its predecessor twice: hashing the last one visits 2**40 objects.
    data = b"\x80\x02)" + b"2\x86" * 40 + b"."
    assert len(pickle.loads(data[:2] + b")" + b"2\x86" * 3 + b".")) == 2
    with pytest.raises(ValueError, match="nested tuples of more than"):
        find_unsafe_name(io.BytesIO(data))


def test_a_second_directory_in_capitals_is_not_overlooked(tmp_path):
    # torch finds "archive/data.pkl" whatever its case, so it would read another one than the scan.
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    renamed = [(name.replace("data.pkl", "DATA.PKL"), content) for name, content in members]
    other = [("other/data.pkl", pickle.dumps({}, protocol=2))]
    with pytest.raises(DumpError, match="directory of tensors is repeated"):
        read_layer_dump(_zip(tmp_path / "two.pt", [*renamed, *other]))


def test_names_inside_a_pt_file_cannot_reach_the_terminal(tmp_path):
    path = _zip(tmp_path / "x.pt", [("a/data.pkl", b"\x80\x02}."), ("\x1b[31mred", b"")])
    with pytest.raises(DumpError) as caught:
        read_layer_dump(path)
    assert str(caught.value).isprintable()


def test_a_pickle_protocol_that_does_not_exist_is_damage(tmp_path):
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    changed = [(n, b"\x80\x52" + c[2:] if n.endswith(".pkl") else c) for n, c in members]
    with pytest.raises(DumpError, match="pickle protocol 82"):
        read_layer_dump(_zip(tmp_path / "x.pt", changed))


def test_other_pickle_protocols_load_without_a_warning(tmp_path):
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "x.pt", pickle_protocol=3)
    np.testing.assert_array_equal(read_layer_dump(tmp_path / "x.pt")["fc"].weight, np.ones((2, 3)))


def test_compressions_numpy_never_writes_are_refused(tmp_path):
    content = _npy(np.ones((2, 3), np.float32))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = _zip(tmp_path / "x.npz", [("fc.weight.npy", content)], method)
        with pytest.raises(DumpError, match="compressed in a way NumPy does not use"):
            read_layer_dump(path)


def test_many_small_bombs_are_one_bomb(tmp_path):
    content = _npy(np.zeros((2048, 4096), np.float32))
    members = [(f"fc{index}.weight.npy", content) for index in range(3)]
    path = _zip(tmp_path / "x.npz", members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(DumpError, match="its members unpack to"):
        read_layer_dump(path)


def test_metadata_is_no_bomb(tmp_path):
    metadata = _npy(np.frombuffer(b'{"a": [' + b" " * 2**22 + b"]}", np.uint8))
    members = [("fc.weight.npy", _npy(np.ones((2, 3)))), ("__metadata__.npy", metadata)]
    with pytest.raises(DumpError, match="zip bomb"):
        read_layer_dump(_zip(tmp_path / "x.npz", members, zipfile.ZIP_DEFLATED))


def test_headers_of_python_2_load_without_a_warning(tmp_path):
    content = _npy(np.ones((2, 3), np.float32)).replace(b"(2, 3), }  ", b"(2L, 3L), }")
    path = _zip(tmp_path / "x.npz", [("fc.weight.npy", content)])
    np.testing.assert_array_equal(read_layer_dump(path)["fc"].weight, np.ones((2, 3)))


def test_a_tensor_named_twice_is_refused(tmp_path):
    entry = '"fc.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}'
    other = '"fc.weight": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [-8, 9]}'
    path = _safetensors(tmp_path / "x.safetensors", f"{{{other}, {entry}}}")
    with pytest.raises(DumpError, match="there twice|damaged"):
        read_layer_dump(path)
    # The library takes the last of two; in this order it would pass.
    assert len(read_layer_dump(_safetensors(tmp_path / "y.safetensors", f"{{{entry}}}"))) == 1


def test_metadata_that_cannot_be_printed_is_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    for meta in ({"a": "\ud800"}, {"\udfff": 1}):
        metadata = {"format": "layer-dump-v0", "meta": json.dumps(meta)}
        header = json.dumps({"__metadata__": metadata, "fc.weight": entry})
        with pytest.raises(DumpError, match="no Unicode text"):
            read_layer_dump(_safetensors(tmp_path / "x.safetensors", header))


def test_a_backslash_in_a_damaged_header_does_not_warn(tmp_path):
    content = _npy(np.ones((2, 3), np.float32)).replace(b"'<f4'", b"'\\)4'")
    with pytest.raises(DumpError, match="is damaged"):
        read_layer_dump(_zip(tmp_path / "x.npz", [("fc.weight.npy", content)]))


def test_a_signaling_nan_is_reported_without_a_warning(tmp_path):
    weight = np.ones((2, 3))
    weight.view(np.uint64)[0, 1] = 0x7FF0000000000001
    np.savez(tmp_path / "x.npz", **{"fc.weight": weight})
    with pytest.raises(DumpError, match="NaN or Inf"):
        read_layer_dump(tmp_path / "x.npz")["fc"]


def test_a_backslash_in_a_plain_pickle_does_not_warn(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"\x80\x02S'a\\q'\n.")
    with pytest.raises(DumpError, match="a Python pickle"):
        read_layer_dump(tmp_path / "x.pt")
