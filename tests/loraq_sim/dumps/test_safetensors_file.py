import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraq_sim.dumps import array_files as safetensors_file
from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.errors import DumpError


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape).astype(dtype)


def save(path, tensors, layers=None, meta=None, **extra):
    metadata = dict(extra)
    if layers is not None:
        metadata |= {"format": "layer-dump-v0", "layers": json.dumps(layers)}
        metadata |= {"meta": json.dumps(meta or {})}
    save_file(tensors, path, metadata=metadata or None)
    return path


def raw(path, header, data=b""):
    """Write a file by hand, so that its directory may say anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_the_documented_layout_is_read(tmp_path):
    tensors = {
        "b0.q.weight": ramp(4, 3, dtype=np.float16),
        "b0.q.bias": ramp(4),
        "b0.k.weight": ramp(5, 3),
        "b0.q.activations": ramp(7, 3),
    }
    record = {"kind": "self_q", "group": "b0", "rows_per_call": 64, "calls_per_step": 2}
    layers = {
        "b0.q": record,
        "b0.k": {"kind": "self_k", "group": "b0", "activations": "b0.q.activations"},
    }
    dump = read_layer_dump(save(tmp_path / "a.safetensors", tensors, layers, {"model": "toy"}))
    assert list(dump) == ["b0.q", "b0.k"]
    assert dump.meta == {"model": "toy"}
    q, k = dump["b0.q"], dump["b0.k"]
    np.testing.assert_array_equal(q.weight, tensors["b0.q.weight"])
    np.testing.assert_array_equal(q.bias, tensors["b0.q.bias"])
    assert (q.kind, q.group, q.m, q.calls_per_step) == ("self_q", "b0", 64, 2)
    assert k.bias is None
    assert k.activations is q.activations
    assert dump.skipped == {}


def test_any_checkpoint_is_a_dump_without_activations(tmp_path):
    tensors = {
        "fc.weight": ramp(2, 3),
        "norm.weight": ramp(4),
        "steps": ramp(1),
        ".weight": ramp(2, 2),
    }
    dump = read_layer_dump(save(tmp_path / "a.safetensors", tensors, format="pt"))
    assert list(dump) == ["fc"]
    assert dump.meta == {"format": "pt"}
    assert set(dump.skipped) == {"norm.weight", "steps", ".weight"}
    assert dump["fc"].activations is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_floating_dtype_is_read(tmp_path, dtype):
    weight = ramp(3, 4, dtype=dtype)
    dump = read_layer_dump(save(tmp_path / "a.safetensors", {"fc.weight": weight}))
    assert dump.info("fc").dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(dump["fc"].weight, weight.astype(np.float32))


def test_opening_reads_the_directory_only(tmp_path, monkeypatch):
    reads = []
    fromfile = np.fromfile

    def spy(*args, **options):
        reads.append(options["count"])
        return fromfile(*args, **options)

    monkeypatch.setattr(safetensors_file.np, "fromfile", spy)
    path = save(tmp_path / "a.safetensors", {"a.weight": ramp(2, 3), "b.weight": ramp(5, 7)})
    dump = read_layer_dump(path)
    assert [dump.info(name).k for name in dump] == [3, 7]
    assert reads == []
    assert dump["b"].n == 5
    assert reads == [35]


def test_a_file_larger_than_memory_opens_and_its_small_layers_load(tmp_path):
    # Sparse on disk: 1 TiB that nobody could load, then one small layer at its end.
    huge, small = 2**40, 4 * 6
    header = {
        "huge.weight": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, huge]},
        "small.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [huge, huge + small]},
    }
    path = raw(tmp_path / "a.safetensors", header)
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + huge)
        file.seek(start + huge)
        file.write(ramp(2, 3).tobytes())
    dump = read_layer_dump(path)
    assert dump.info("huge").nbytes == huge
    np.testing.assert_array_equal(dump["small"].weight, ramp(2, 3))
    with pytest.raises(
        DumpError, match="layer 'huge': weight would take 1024 GiB as float32, more"
    ):
        dump["huge"]


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.2])
def test_a_truncated_file_is_detected_when_opened(tmp_path, keep):
    path = save(tmp_path / "a.safetensors", {"fc.weight": ramp(20, 30)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DumpError, match="damaged or truncated safetensors file") as caught:
        read_layer_dump(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_vanish_after_opening_are_missed(tmp_path):
    path = save(tmp_path / "a.safetensors", {"fc.weight": ramp(20, 30)})
    dump = read_layer_dump(path)
    stored = dump._stored.layers["fc"].weight
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DumpError, match="ended before byte .*; truncated"):
        stored.load()


ONE = {"fc.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 4]}}, "damaged"),
        ({"a.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4, 8]}}, "damaged"),
        ({**ONE, "b.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}, "damaged"),
        ({"a.weight": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "damaged"),
        (
            {"a.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
            "damaged",
        ),
        ({"a.weight": {"dtype": "X9", "shape": [1, 1], "data_offsets": [0, 4]}}, "damaged"),
        ({"a.weight": 3}, "damaged"),
        (b"{" * 100_000, "damaged"),
        ({"x": {"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16]}}, "damaged"),
        (
            {"x": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}},
            "holds no layers (1 oth",
        ),
        ({**ONE, "__metadata__": {"layers": "{}", "format": "v7"}}, "unknown dump format 'v7'"),
        (
            {**ONE, "__metadata__": {"layers": "{oops", "format": "layer-dump-v0"}},
            "metadata 'layers' is no valid JSON",
        ),
        (
            {**ONE, "__metadata__": {"layers": "[" * 100_000, "format": "layer-dump-v0"}},
            "metadata 'layers' is no valid JSON",
        ),
        (
            {**ONE, "__metadata__": {"meta": "[1]", "format": "layer-dump-v0"}},
            "metadata 'meta' must be a JSON object, got list",
        ),
    ],
)
def test_a_directory_that_lies_is_refused(tmp_path, header, message):
    path = raw(tmp_path / "a.safetensors", header, data=bytes(4))
    with pytest.raises(DumpError, match=re.escape(message)) as caught:
        read_layer_dump(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (7, "its metadata is a int, expected an object"),
        ({"activations": "nowhere"}, "its activations refer to 'nowhere', which the file does not"),
        ({"activations": 5}, "its activations refer to a int, which the file does not hold"),
        ({"rows_per_call": 1.5}, "rows_per_call must be a positive integer up to 2**40, got 1.5"),
        ({"kind": ["a"]}, "kind must be a printable string"),
    ],
)
def test_a_bad_record_spoils_its_own_layer_only(tmp_path, record, message):
    tensors = {"bad.weight": ramp(2, 3), "good.weight": ramp(2, 3)}
    dump = read_layer_dump(save(tmp_path / "a.safetensors", tensors, {"bad": record, "good": {}}))
    assert dump["good"].n == 2
    with pytest.raises(DumpError, match=re.escape(f"layer 'bad': {message}")):
        dump["bad"]


def test_a_listed_layer_without_weight_or_of_wrong_shape_is_named(tmp_path):
    tensors = {"flat.weight": ramp(6), "ghost.bias": ramp(2), "f8.weight": ramp(1, 1)}
    dump = read_layer_dump(
        save(tmp_path / "a.safetensors", tensors, {"ghost": {}, "flat": {}, "f8": {}})
    )
    with pytest.raises(DumpError, match="layer 'ghost': has no tensor 'ghost.weight'"):
        dump.info("ghost")
    with pytest.raises(DumpError, match=r"layer 'flat': weight has shape \(6,\), expected 2-D"):
        dump.info("flat")


def test_an_8_bit_weight_is_refused_by_dtype(tmp_path):
    weight = ramp(2, 3, dtype=np.int8)
    dump = read_layer_dump(save(tmp_path / "a.safetensors", {"fc.weight": weight}))
    with pytest.raises(DumpError, match="layer 'fc': weight has dtype int8; expected float16"):
        dump["fc"]
