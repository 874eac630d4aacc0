import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps.file_kind import TORCH_LEGACY_MAGIC
from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.errors import DumpError

torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny_pixart.pt"


class RunsCode:
    """Creates a file when unpickled: what a hostile dump would do."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def save(path, root, **options):
    torch.save(root, path, **options)
    return path


def entry(n=2, k=3, **fields):
    return {"weight": torch.arange(n * k, dtype=torch.float16).reshape(n, k), **fields}


def plain_pickle(path, root, **options):
    path.write_bytes(pickle.dumps(root, **options))
    return path


def legacy(path, root):
    return save(path, root, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save, "refused, nothing was run: its pickle asks for 'posix.mkdir'"),
        (legacy, "refused, nothing was run: its pickle asks for 'posix.mkdir'"),
        (plain_pickle, "this is a Python pickle, which could run code ("),
    ],
    ids=["torch zip", "torch legacy", "plain pickle"],
)
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path, write, message):
    marker = tmp_path / "it_ran"
    path = write(tmp_path / "evil.pt", {"layers": {"a": entry()}, "meta": RunsCode(marker)})
    with pytest.raises(DumpError, match=re.escape(message)) as caught:
        read_layer_dump(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_of_any_protocol_runs_nothing(tmp_path, protocol):
    marker = tmp_path / "it_ran"
    path = plain_pickle(tmp_path / "evil.pt", RunsCode(marker), protocol=protocol)
    with pytest.raises(DumpError, match="was not loaded|a text file|not a layer dump"):
        read_layer_dump(path)
    assert not marker.exists()


@pytest.mark.parametrize("write", [save, legacy])
def test_torch_itself_refuses_code_should_the_scan_miss_it(tmp_path, monkeypatch, write):
    monkeypatch.setattr("loraq_sim.dumps.torch_file.find_unsafe_name", lambda *_: None)
    marker = tmp_path / "it_ran"
    path = write(tmp_path / "evil.pt", {"layers": {"a": RunsCode(marker)}})
    with pytest.raises(DumpError, match="torch cannot load it: Weights only load failed") as caught:
        read_layer_dump(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_the_scan_refuses_before_torch_sees_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / "evil.pt", {"layers": RunsCode(tmp_path / "x")})
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    with pytest.raises(DumpError, match="refused, nothing was run"):
        read_layer_dump(path)


def test_opening_maps_the_file_and_converts_no_tensor(monkeypatch):
    seen = {}
    load = torch.load

    def spy(*args, **options):
        seen.update(options)
        return load(*args, **options)

    reads = []
    to_numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch, "load", spy)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda t: reads.append(t.shape) or to_numpy(t))
    dump = read_layer_dump(EXAMPLE)
    infos = [dump.info(name) for name in dump]
    assert seen == {"map_location": "cpu", "weights_only": True, "mmap": True}
    assert (len(infos), reads) == (20, [])
    assert dump["transformer_blocks.3.attn1.to_q"].n == 128
    assert reads == [(128, 128), (128,), (512, 128)]


def test_a_mapping_without_the_wrapper_is_read(tmp_path):
    root = {"b": entry(kind="ffn_up", rows_per_call=96, calls_per_step=2), "a": entry(4, 5)}
    dump = read_layer_dump(save(tmp_path / "plain.pt", root))
    assert list(dump) == ["b", "a"]
    assert (dump["b"].m, dump["b"].calls_per_step, dump["b"].kind) == (96, 2, "ffn_up")
    np.testing.assert_array_equal(dump["b"].weight, [[0, 1, 2], [3, 4, 5]])


def test_a_state_dict_is_read_without_activations(tmp_path):
    model = torch.nn.Sequential(
        OrderedDict(
            fc=torch.nn.Linear(5, 4),
            norm=torch.nn.LayerNorm(4),
            point=torch.nn.Conv2d(4, 6, 1, bias=False),
            wide=torch.nn.Conv2d(4, 6, 3),
        )
    )
    dump = read_layer_dump(save(tmp_path / "model.pt", model.state_dict()))
    assert list(dump) == ["fc", "point", "wide"]
    assert (dump.info("wide").n, dump.info("wide").k) == (6, 36)
    assert set(dump.skipped) == {"norm.weight", "norm.bias"}
    fc = dump["fc"]
    np.testing.assert_array_equal(fc.weight, model.fc.weight.detach().numpy())
    np.testing.assert_array_equal(fc.bias, model.fc.bias.detach().numpy())
    assert fc.activations is None
    assert (dump["point"].n, dump["point"].k) == (6, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_dtype_and_a_strided_view_are_read(tmp_path, dtype):
    weight = torch.arange(24, dtype=getattr(torch, dtype)).reshape(6, 4).T
    dump = read_layer_dump(save(tmp_path / "a.pt", {"fc": {"weight": weight}}))
    assert dump.info("fc").dtype == dtype
    np.testing.assert_array_equal(dump["fc"].weight, weight.float().numpy())


def test_a_parameter_that_requires_grad_is_read(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    dump = read_layer_dump(save(tmp_path / "a.pt", {"fc": {"weight": weight}}))
    np.testing.assert_array_equal(dump["fc"].weight, np.ones((2, 3)))


def test_a_legacy_file_is_read_whole(tmp_path):
    path = legacy(tmp_path / "old.pt", {"fc": entry()})
    assert path.read_bytes().startswith(TORCH_LEGACY_MAGIC)
    np.testing.assert_array_equal(read_layer_dump(path)["fc"].weight, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("keep", [0.95, 0.6, 0.2])
def test_a_truncated_legacy_file_is_refused(tmp_path, keep):
    path = legacy(tmp_path / "old.pt", {"fc": entry(40, 30)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DumpError, match="truncated|torch cannot load it"):
        read_layer_dump(path)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ([1, 2], "holds a list, expected a mapping of layer names to tensors"),
        (torch.ones(2, 3), "holds a Tensor, expected a mapping"),
        ({}, "holds no layers; expected tensors named <layer>.weight, or a 'layers' mapping"),
        ({"format": "layer-dump-v0", "layers": {}}, "holds no layers"),
        ({"format": "layer-dump-v9", "layers": {"a": entry()}}, "unknown dump format 'layer-dump"),
        ({"epoch": 3}, "holds no layers"),
        ({"norm.weight": torch.ones(4)}, "holds no layers (1 other tensors)"),
        ({"meta": 4, "layers": {"a": entry()}}, "meta must be a mapping, got int"),
    ],
)
def test_content_without_layers_is_refused(tmp_path, root, message):
    with pytest.raises(DumpError, match=re.escape(message)):
        read_layer_dump(save(tmp_path / "a.pt", root))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "layer 'bad': is a str, expected a mapping with 'weight'"),
        ({"bias": torch.ones(2)}, "layer 'bad': has no weight"),
        ({"weight": [[1.0]]}, "layer 'bad': weight is a list, expected a tensor"),
        ({"weight": torch.ones(1, 1).expand(3000, 3000)}, "or repeated beyond the file's size"),
        ({"weight": torch.ones(2, 3, dtype=torch.int8)}, "layer 'bad': weight has dtype int8"),
        (
            {"weight": torch.ones(2, 3, dtype=torch.complex64)},
            "layer 'bad': weight has dtype complex64",
        ),
        (entry(kind=5), "layer 'bad': kind must be a printable string"),
        (entry(rows_per_call=10**40), "layer 'bad': rows_per_call must be a positive integer"),
        ({"weight": torch.full((2, 3), float("nan"))}, "layer 'bad': weight holds 6 of 6 values"),
    ],
)
def test_one_bad_layer_leaves_the_others_usable(tmp_path, bad, message):
    dump = read_layer_dump(save(tmp_path / "a.pt", {"bad": bad, "good": entry()}))
    assert dump["good"].n == 2
    with pytest.raises(DumpError, match=re.escape(message)):
        dump["bad"]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.ones(2, 3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (np.ones(2), "numpy._core.multiarray._reconstruct"),
    ],
)
def test_harmless_objects_beyond_dense_tensors_are_refused_by_name(tmp_path, value, name):
    path = save(tmp_path / "a.pt", {"fc": entry(), "extra": value})
    with pytest.raises(
        DumpError, match=re.escape(f"asks for {name!r}, which no dense tensor needs")
    ):
        read_layer_dump(path)


def test_names_that_are_no_text_spoil_their_own_layer_only(tmp_path):
    root = {"layers": {1: entry(), "a\nb": entry(), "x" * 9999: entry(), "good": entry()}}
    dump = read_layer_dump(save(tmp_path / "a.pt", root))
    assert dump["good"].n == 2
    with pytest.raises(DumpError, match="layer 'entry 0': its name is a int, expected text"):
        dump["entry 0"]
    for name in ("a\nb", "x" * 9999):
        with pytest.raises(DumpError, match="a layer name must be a non-empty printable") as caught:
            dump.info(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def rezip(source, target, change):
    """Copy a zip, passing each (name, bytes) through `change`, which returns (bytes, method)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content, method = change(info.filename, old.read(info))
            new.writestr(info.filename, content, compress_type=method)
    return target


def test_a_compressed_copy_is_refused_since_mapping_would_read_noise(tmp_path):
    path = save(tmp_path / "a.pt", {"fc": entry()})
    squeezed = rezip(path, tmp_path / "b.pt", lambda name, data: (data, zipfile.ZIP_DEFLATED))
    with pytest.raises(DumpError, match="a .pt file that was compressed again"):
        read_layer_dump(squeezed)


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path):
    path = save(tmp_path / "a.pt", {"fc": {"weight": torch.ones(200, 200)}})

    def inflate(name, data):
        if name.endswith("data.pkl"):
            # 40000 and 200 as pickled by protocol 2: BININT2 and BININT1.
            assert data.count(b"M\x40\x9c") == 1
            data = data.replace(b"M\x40\x9c", b"J\x00\x00\x00\x40").replace(b"K\xc8", b"M\xff\xff")
        return data, zipfile.ZIP_STORED

    forged = rezip(path, tmp_path / "b.pt", inflate)
    with pytest.raises(DumpError, match="torch cannot load it|repeated beyond the file's size"):
        read_layer_dump(forged)["fc"]


def test_damaged_instructions_are_refused(tmp_path):
    path = save(tmp_path / "a.pt", {"fc": entry()})

    def cut(name, data):
        return (data[:-40] if name.endswith("data.pkl") else data), zipfile.ZIP_STORED

    with pytest.raises(DumpError, match=r"damaged or truncated \("):
        read_layer_dump(rezip(path, tmp_path / "b.pt", cut))


def test_a_key_nested_too_deep_to_hash_is_refused_and_the_process_lives(tmp_path):
    path = save(tmp_path / "a.pt", {"fc": entry()})
    deep = b"\x80\x02})" + b"\x85" * 3_000_000 + b"Ns."

    def replace(name, data):
        return (deep if name.endswith("data.pkl") else data), zipfile.ZIP_STORED

    with pytest.raises(DumpError, match="damaged or truncated .objects nested deeper than 100"):
        read_layer_dump(rezip(path, tmp_path / "b.pt", replace))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("constants.pkl", "this is a TorchScript archive"),
        ("archive_format", "torch.export program"),
    ],
)
def test_archives_that_hold_programs_are_refused(tmp_path, member, message):
    path = tmp_path / "program.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/data.pkl", b"")
        archive.writestr(f"program/{member}", b"pt2")
    with pytest.raises(DumpError, match=message):
        read_layer_dump(path)


def test_a_torch_file_with_the_suffix_of_safetensors_says_so(tmp_path):
    path = save(tmp_path / "a.safetensors", {"fc": entry()})
    with pytest.raises(DumpError, match="this is a torch.save file; rename it to end in .pt"):
        read_layer_dump(path)


def test_a_torch_file_with_another_suffix_is_read_by_content(tmp_path):
    assert list(read_layer_dump(save(tmp_path / "a.npz", {"fc": entry()}))) == ["fc"]


@pytest.mark.parametrize("version", ["2.5.1+cpu", "1.13.0"])
def test_an_old_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(DumpError, match=re.escape(f"torch {version} does not load untrusted")):
        read_layer_dump(EXAMPLE)


def test_missing_torch_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DumpError, match="files need torch; pip install 'torch>=2.6'"):
        read_layer_dump(EXAMPLE)
