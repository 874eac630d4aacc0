import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.errors import DumpError

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_the_tiny_pixart_example_reads_as_its_source_says():
    dump = read_layer_dump(EXAMPLES / "tiny_pixart.pt")
    assert len(dump) == 20
    assert dump.meta["model"] == "PixArtTransformer2DModel"
    layer = dump["transformer_blocks.0.ff.net.2"]
    assert (layer.n, layer.k, layer.m, layer.kind) == (128, 512, 512, "ffn_down")
    assert list(dump)[:2] == ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k"]


def test_the_minilm_example_reads_as_its_source_says():
    dump = read_layer_dump(str(EXAMPLES / "minilm.pt"))
    assert len(dump) == 8
    layer = dump["encoder.layer.2.intermediate.dense"]
    assert (layer.n, layer.k, layer.kind) == (1536, 384, "ffn_up")
    assert layer.activations.shape == (256, 384)


@pytest.mark.parametrize("example", ["tiny_pixart.pt", "minilm.pt"])
def test_values_equal_what_torch_loads(example):
    torch = pytest.importorskip("torch")
    raw = torch.load(EXAMPLES / example, weights_only=True)["layers"]
    dump = read_layer_dump(EXAMPLES / example)
    assert list(dump) == list(raw)
    for name, entry in raw.items():
        layer = dump[name]
        for tensor in ("weight", "bias", "activations"):
            np.testing.assert_array_equal(getattr(layer, tensor), entry[tensor].float().numpy())
        assert (layer.kind, layer.group) == (entry["kind"], entry["group"])


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "the file is empty; expected a .pt (torch.save), .safetensors or .npz"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid", "this is a Git LFS pointer"),
        ("a.npz", b"<!doctype html><html></html>", "this is an HTML page"),
        ("a.safetensors", b"hello, layers\n", "this is a text file"),
        ("a.pt", b"\x00" * 40, "this is not a layer dump, or one damaged at its start"),
        ("a.pt", b"\x89HDF\r\n\x1a\n1234567890", "this is an HDF5 file"),
        ("a.npz", b"\x93NUMPY\x01\x00v\x00", "this is a single .npy array; save layers with"),
        ("a.pt", b"\x1f\x8b\x08\x00", "this is gzip-compressed; decompress it first"),
        ("a.pt", b"PK\x03\x04 and nothing else", "truncated or damaged"),
        ("a.pt", b"\x80", "this is not a layer dump"),
        ("a.pt", b"\x80\x04", "this is a Python pickle, which could run code, so it was not"),
        ("a.pt", bytes(257) + b"ustar" + bytes(250), "this is a tar archive"),
        ("a.safetensors", b"\x10" + bytes(7) + b"{not json at all", "damaged or truncated safeten"),
    ],
)
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DumpError, match=re.escape(message)) as caught:
        read_layer_dump(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_directory_and_a_pipe_are_refused(tmp_path):
    with pytest.raises(DumpError, match=r"nowhere\.pt: no such file; check the path"):
        read_layer_dump(tmp_path / "nowhere.pt")
    with pytest.raises(
        DumpError, match="is a directory without a checkpoint .it holds 'nothing'.; give a dump"
    ):
        read_layer_dump(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(DumpError, match="is not a regular file"):
        read_layer_dump(tmp_path / "pipe.pt")
    with pytest.raises(DumpError, match="cannot be opened: .*embedded null"):
        read_layer_dump("a\0b.pt")
    with pytest.raises(DumpError, match="cannot be opened: .*too long"):
        read_layer_dump("x" * 5000)


def test_an_unreadable_file_says_permission_denied(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pt", b"x")
    path.chmod(0)

    def refuse(self, *args, **kwargs):  # The tests may run as root, whom no mode stops.
        assert not stat.S_IMODE(self.stat().st_mode)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DumpError, match="permission denied; make the file readable"):
        read_layer_dump(path)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.1, 0.01])
def test_a_truncated_torch_file_is_detected(tmp_path, keep):
    content = (EXAMPLES / "tiny_pixart.pt").read_bytes()
    path = write(tmp_path / "cut.pt", content[: int(len(content) * keep)])
    with pytest.raises(DumpError, match=r"truncated or damaged \(.*\); copy or export it again"):
        read_layer_dump(path)


def test_a_zip_of_other_files_is_named(tmp_path):
    import zipfile

    path = tmp_path / "photos.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat.jpg", b"meow")
    with pytest.raises(DumpError, match="this is a zip archive of 1 file without tensors"):
        read_layer_dump(path)


def test_whatever_a_reader_library_raises_becomes_one_line(tmp_path, monkeypatch):
    def explode(path):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("loraq_sim.dumps.array_files.open_safetensors_file", explode)
    path = write(tmp_path / "a.safetensors", b"\x02" + bytes(7) + b"{}")
    with pytest.raises(DumpError) as caught:
        read_layer_dump(path)
    assert str(caught.value) == (f"{path}: damaged or not a layer dump (RuntimeError: first line)")


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, loraq_sim.dumps; "
        "print([m for m in ('torch', 'safetensors', 'numba', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
