"""Objects in a .pt are read as records: arguments of trainers, quantized tensors of torchao.

Their classes are stood in for by modules made here, so that torch.save writes what it writes for
the real ones; they are gone when the file is read.
"""

import argparse
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.errors import DumpError

N, K, GROUP = 8, 32, 16


class Wrapper(torch.Tensor):
    """A tensor subclass that holds others, as torchao's are."""

    @staticmethod
    def __new__(cls, shape, **parts):
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)
        made.__dict__.update(parts)
        return made

    def __init__(self, shape, **parts):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError


@pytest.fixture
def torchao(monkeypatch):
    """Classes of a module ``torchao.quantization`` that exists while a file is written."""
    module = types.ModuleType("torchao.quantization")
    for name in ("Int8Tensor", "AffineQuantizedTensor", "PlainAQTTensorImpl", "TiledImpl"):
        made = type(name, (Wrapper,), {"__module__": module.__name__})
        setattr(module, name, made)
    module.PerRow = type("PerRow", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def saved(path, tensors, monkeypatch):
    torch.save(tensors, path)
    monkeypatch.delitem(sys.modules, "torchao.quantization", raising=False)
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    return path


def codes_and_scales():
    rng = np.random.default_rng(4)
    codes = rng.integers(-128, 128, (N, K)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (N, K // GROUP)).astype(np.float32)
    zeros = rng.integers(-3, 4, (N, K // GROUP)).astype(np.int8)
    whole = codes.astype(np.float64) - np.repeat(zeros, GROUP, 1)
    return codes, scales, zeros, whole * np.repeat(scales, GROUP, 1)


@pytest.mark.parametrize("way", ["Int8Tensor", "AffineQuantizedTensor"])
def test_plain_codes_of_torchao_are_decoded(torchao, tmp_path, monkeypatch, way):
    codes, scales, zeros, exact = codes_and_scales()
    names = ("qdata",) if way == "Int8Tensor" else ("int_data",)
    parts = {names[0]: torch.from_numpy(codes), "scale": torch.from_numpy(scales)}
    parts["zero_point"] = torch.from_numpy(zeros)
    if way == "Int8Tensor":
        weight = torchao.Int8Tensor((N, K), **parts, block_size=[1, GROUP], kwargs=torchao.PerRow())
    else:
        inner = torchao.PlainAQTTensorImpl((N, K), **parts)
        weight = torchao.AffineQuantizedTensor((N, K), tensor_impl=inner, block_size=(1, GROUP))
    tensors = {"fc.weight": weight, "fc.bias": torch.ones(N), "plain.weight": torch.ones(4, K)}
    path = saved(tmp_path / "a.pt", tensors, monkeypatch)
    dump = read_layer_dump(path)
    assert list(dump) == ["fc", "plain"]
    assert dump.info("fc").dtype == "int8 x scale"
    # Codes and scales are exact in float32, their product is rounded once.
    np.testing.assert_allclose(dump["fc"].weight, exact, rtol=2**-23)
    np.testing.assert_array_equal(dump["fc"].bias, np.ones(N, np.float32))
    assert "torchao.quantization" not in sys.modules


def test_codes_packed_for_a_kernel_are_refused_alone(torchao, tmp_path, monkeypatch):
    packed = torchao.TiledImpl((N, K), packed_weight=torch.zeros(1, 1, 32, 4, dtype=torch.int32))
    weight = torchao.AffineQuantizedTensor((N, K), tensor_impl=packed, block_size=(1, GROUP))
    tensors = {"fc.weight": weight, "plain.weight": torch.ones(4, K)}
    dump = read_layer_dump(saved(tmp_path / "a.pt", tensors, monkeypatch))
    np.testing.assert_array_equal(dump["plain"].weight, np.ones((4, K), np.float32))
    with pytest.raises(DumpError, match=r"packed for a kernel; save .*dequantize\(\)"):
        dump["fc"]


def test_a_checkpoint_with_the_arguments_of_its_training_is_read(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    content = {
        "model": {"fc.weight": torch.nn.Parameter(weight), "half.weight": weight.half().t()},
        "args": argparse.Namespace(lr=1e-4, model="DiT-XL/2", betas=(0.9, 0.99)),
        "best": np.float64(3.0),
    }
    torch.save(content, tmp_path / "train.pt")
    dump = read_layer_dump(tmp_path / "train.pt")
    np.testing.assert_array_equal(dump["fc"].weight, weight.numpy())
    np.testing.assert_array_equal(dump["half"].weight, weight.numpy().T)


@pytest.mark.parametrize("shared", [False, True])
def test_tensors_read_with_records_are_those_that_torch_reads(tmp_path, shared):
    torch.manual_seed(3)
    whole = torch.randn(6, 8)
    tensors = {
        "a.weight": whole[1:4] if shared else whole[1:4].clone(),
        "b.weight": whole[:, 2:6].to(torch.bfloat16),
        "c.weight": whole.to(torch.float8_e4m3fn),
        "d.weight": whole.double().T,
        "d.bias": torch.randn(8),
    }
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save(tensors | {"args": argparse.Namespace(x=1)}, tmp_path / "records.pt")
    plain, records = (read_layer_dump(tmp_path / f"{name}.pt") for name in ("plain", "records"))
    assert list(plain) == list(records)
    for name in plain:
        np.testing.assert_array_equal(plain[name].weight, records[name].weight)
        assert plain.info(name).dtype == records.info(name).dtype


class _Evil:
    """Pickles as a call of a function in a module that is on the path."""

    def __init__(self, name, argument):
        self.name, self.argument = name, argument


class _Pickler(pickle._Pickler):
    def save(self, value, *more, **options):
        if not isinstance(value, _Evil):
            return super().save(value, *more, **options)
        module, _, name = value.name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        super().save((value.argument,))
        return self.write(pickle.REDUCE)


def evil(path, name):
    """A zip as torch.save makes it, whose pickle calls `name`."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("archive/data.pkl", "w") as file:
        _Pickler(file, protocol=2).dump({"args": _Evil(name, str(path) + ".ran"), "x": 1})
    return path


def test_a_module_that_a_record_names_is_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "omegaconf"
    folder.mkdir()
    mark = tmp_path / "imported"
    (folder / "__init__.py").write_text(f"open({str(mark)!r}, 'w')\ndef run(x): open(x, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = evil(tmp_path / "a.pt", "omegaconf.run")
    with pytest.raises(DumpError, match="holds no layers"):
        read_layer_dump(path)
    assert not mark.exists()
    assert not (tmp_path / "a.pt.ran").exists()
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.exec", "torchao_evil.run", "numpy.load", "torch.load"]
)
def test_other_names_are_refused_still(tmp_path, name):
    with pytest.raises(DumpError, match=f"refused, nothing was run: its pickle asks for '{name}'"):
        read_layer_dump(evil(tmp_path / "a.pt", name))
