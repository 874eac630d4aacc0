"""Small real files of every kind a user can be handed, written by the product's own writers.

Hostile ones stand beside them: pickles that would run code leave a mark in the scratch folder.
"""

import argparse
import io
import json
import os
import pickle
import sqlite3
import struct
from pathlib import Path

import numpy as np

__all__ = ["SEEDS"]

_PLAN = """\
dump = "layers.npz"
hw = ["aie2", "a100"]
layers = ["*"]
splits = ["W4A4", "W4A4+W8A8r2", "W4A4+W8A8@fp16r2"]
methods = ["loraq", "rtn"]
presets = ["fast"]
seeds = [0, 1]
family = "int"
group = 64
tokens = 8
smooth = 0.5
fused = true

[datapath]
acc_bits = [16, 24]
overflow = "saturate"

[[override]]
layers = "ffn_*"
rank = 4
method = "rtn"
"""


class _Runs:
    """Leaves a mark when it is unpickled by a careless reader."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self._mark}",)


class _Wrapped:
    """Pickles as torch pickles torchao's int8 tensors, by a class of theirs that is not here."""

    def __init__(self, weight) -> None:
        self.weight = weight

    def __reduce__(self):
        import torch

        n, k = self.weight.shape
        facts = {
            "qdata": self.weight.to(torch.int8),
            "scale": torch.ones(n, 1),
            "zero_point": torch.zeros(n, 1, dtype=torch.int8),
            "block_size": [1, k],
        }
        build = torch._utils._rebuild_wrapper_subclass
        kind = argparse.Namespace  # Stands for the class: no record looks its class up.
        made = build, kind, (kind, torch.float32, torch.Size((n, k))), facts
        return torch._tensor._rebuild_from_type_v2, made


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "ffn_up.weight": rng.standard_normal((4, 6)).astype(np.float32),
        "ffn_up.bias": rng.standard_normal(4).astype(np.float32),
        "ffn_up.activations": rng.standard_normal((5, 6)).astype(np.float16),
        "attn.weight": rng.standard_normal((3, 6)).astype(np.float64),
    }


def _dump(scratch: Path, suffix: str) -> bytes:
    from loraq_sim.dumps.write import write_layer_dump
    from loraq_sim.layers import Layer

    arrays = _arrays()
    shared = arrays["ffn_up.activations"]
    layers = [
        Layer(name="ffn_up", weight=arrays["ffn_up.weight"], bias=arrays["ffn_up.bias"],
              activations=shared, kind="ffn_up", group="block0", rows_per_call=64),
        Layer(name="attn", weight=arrays["attn.weight"], activations=shared, group="block0"),
    ]  # fmt: skip
    path = scratch / f"seed{suffix}"
    write_layer_dump(path, layers, meta={"model": "tiny", "steps": [1, 2]}, overwrite=True)
    return path.read_bytes()


def _torch_seeds(scratch: Path) -> list[bytes]:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    entry = {"weight": tensors["attn.weight"], "activations": tensors["ffn_up.activations"]}
    state = torch.nn.Linear(6, 4).state_dict(prefix="fc.")
    roots = [
        tensors,
        {"attn": entry | {"kind": "self_q", "rows_per_call": 64, "calls_per_step": 2}},
        {"format": "layer-dump-v0", "meta": {"steps": (1, 2)}, "layers": {"attn": entry}},
        state,
        {"fc.weight": torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))},
        {"conv.weight": torch.ones(4, 6, 1, 1).transpose(0, 1)},
        {"model": {"module.fc.weight": tensors["attn.weight"]}, "ema": state, "epoch": 3},
        {"blocks": {"0": {"fc": {"weight": tensors["attn.weight"]}}, "1": {"x": 1}}},
        {"fc.weight": torch.ones(4, 6).to(torch.float8_e4m3fn), "fc.scale_weight": torch.ones(1)},
    ]
    # Objects that are read as records: arguments of a training, and a tensor that wraps others.
    records = [
        {"model": state, "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.99))},
        {"fc.weight": _Wrapped(tensors["attn.weight"]), "fc.bias": torch.ones(3)},
    ]
    found = [_dump(scratch, ".pt")]
    for root in [*roots, *records]:
        for is_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(root, buffer, _use_new_zipfile_serialization=is_zip)
            found.append(buffer.getvalue())
    mark = scratch / "code-was-run"
    buffer = io.BytesIO()
    torch.save({"fc.weight": tensors["attn.weight"], "x": _Runs(mark)}, buffer)
    return [*found, buffer.getvalue(), pickle.dumps(_Runs(mark)), pickle.dumps({"a": 1})]


def _npz_seeds(scratch: Path) -> list[bytes]:
    found = [_dump(scratch, ".npz")]
    objects = np.array([_Runs(scratch / "code-was-run")], dtype=object)
    for save, arrays in (
        (np.savez, _arrays()),
        (np.savez_compressed, _arrays()),
        (np.savez, {"fc.weight": np.asfortranarray(_arrays()["attn.weight"])}),
        (np.savez, {"fc.weight": objects}),
    ):
        buffer = io.BytesIO()
        save(buffer, **arrays)
        found.append(buffer.getvalue())
    return found


def _safetensors_seeds(scratch: Path) -> list[bytes]:
    from safetensors.numpy import save

    arrays = {name: array for name, array in _arrays().items() if "attn" not in name}
    found = [_dump(scratch, ".safetensors"), save(arrays), save(arrays, metadata={"format": "np"})]
    ones = np.ones((4, 6), np.float32)
    codes = ones.astype(np.int8)
    state = b'{"blocksize": 4, "shape": [4, 4], "nested_blocksize": 2, "nested_offset": 0.5}'
    coded = {
        "fc.weight": codes.view(np.uint8)[:2, :4],
        "fc.weight.absmax": codes.view(np.uint8)[0, :4],
        "fc.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "fc.weight.nested_absmax": ones[0, :2],
        "fc.weight.nested_quant_map": np.linspace(0, 1, 256, dtype=np.float32),
        "fc.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }
    experts = {"experts.gate_up_proj": np.ones((2, 12, 4), np.float32)}
    experts |= {"experts.down_proj": np.ones((2, 4, 6), np.float32), "router.weight": ones[:2, :4]}
    others = {"model.diffusion_model.a.in_proj_weight": ones, "vae.conv.weight": ones[:, :, None]}
    others |= {"c.weight": ones, "c.bias": ones[0], "d.weight": np.ones((2, 3, 3, 3), np.float32)}
    for tensors in (
        {"fc.weight": codes, "fc.weight_scale": ones[:, :3]},
        {"fc.weight": codes, "fc.SCB": ones[0, :4]},
        *(coded, experts, others),
    ):
        found.append(save({name: np.ascontiguousarray(x) for name, x in tensors.items()}))
    return found


def _gguf_seeds(scratch: Path) -> list[bytes]:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    facts = [
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("general.name") + struct.pack("<I", 8) + text("flux"),
        text("names") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("comfy.gguf.orig_shape.fc.weight") + struct.pack("<IIQ2i", 9, 5, 2, 4, 8),
    ]
    found = []
    # Type, bytes of 32 values: f32, f16, bf16 and, where the package is there, coded blocks.
    for kind, size in ((0, 128), (1, 64), (30, 64), (8, 34), (2, 18)):
        head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(facts)) + b"".join(facts)
        head += text("fc.weight") + struct.pack("<I2QIQ", 2, 8, 4, kind, 0)
        head += text("fc.bias") + struct.pack("<IQIQ", 1, 4, 0, 128)
        found.append(head + bytes(-len(head) % 32) + bytes(size) + bytes(128 - size + 16))
    return found


def _shards(scratch: Path) -> dict[str, str]:
    """Two shards in the scratch folder; the file of each tensor."""
    from safetensors.numpy import save

    where = {}
    for number, name in enumerate(("blocks.0.attn1.to_q", "blocks.0.ff.net.2"), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        weight = np.full((4, 6), number, np.float32)
        (scratch / file).write_bytes(save({f"{name}.weight": weight}))
        where[f"{name}.weight"] = file
    return where


def _index_seeds(scratch: Path) -> list[bytes]:
    where = _shards(scratch)
    first, second = where.values()
    wrong = dict.fromkeys(where, first)
    return [
        json.dumps({"metadata": {"total_size": 192}, "weight_map": where}).encode(),
        json.dumps({"weight_map": {"blocks.0.attn1.to_q.weight": first}}, indent=1).encode(),
        json.dumps({"weight_map": wrong | {"other": second}}).encode(),
        json.dumps({"weight_map": {"a": "../model.safetensors"}}).encode(),
    ]


def _config_seeds(scratch: Path) -> list[bytes]:
    where = _shards(scratch)
    (scratch / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    size = {"patch_size": 2, "sample_size": 128}
    return [
        json.dumps({"_class_name": "PixArtTransformer2DModel"} | size).encode(),
        json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": [96, 64]}).encode(),
        json.dumps({"_class_name": "Unknown", "patch_size": 1, "sample_size": 32}).encode(),
        b"{}",
    ]


def _message(*fields: tuple[int, object]) -> bytes:
    """Protocol buffers: numbers as varints, everything else with its length."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else bytes(value)
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def _onnx_seeds(scratch: Path) -> list[bytes]:
    """Graphs of MatMul with bias, Gemm and 1x1 Conv, field by field as onnx.proto numbers them."""
    ones = np.ones((6, 4), np.float32)

    def tensor(name: str, array: np.ndarray) -> bytes:
        dims = tuple((1, size) for size in array.shape)
        return _message(*dims, (2, 1), (8, name), (9, array.tobytes()))

    def node(op: str, inputs: tuple[str, ...], output: str, *attributes: bytes) -> bytes:
        ins = tuple((1, name) for name in inputs)
        more = tuple((5, one) for one in attributes)
        return _message(*ins, (2, output), (3, f"/fc/{op}"), (4, op), *more)

    def value(name: str, *shape: int) -> bytes:
        dims = _message(*((1, _message((1, size))) for size in shape))
        return _message((1, name), (2, _message((1, _message((1, 1), (2, dims))))))

    transposed = _message((1, "transB"), (3, 1), (20, 2))
    graphs = [
        (node("MatMul", ("x", "w"), "y"), tensor("w", ones)),
        (node("Gemm", ("x", "w"), "y", transposed), tensor("w", ones.T.copy())),
        (node("Conv", ("x", "w"), "y"), tensor("w", ones[:, :, None, None])),
        (node("MatMul", ("x", "fc.weight"), "y"), tensor("fc.weight", ones)),
    ]
    found = []
    for call, weight in graphs:
        graph = _message(
            *((1, call), (2, "g"), (5, weight), (11, value("x", 3, 6)), (12, value("y", 3, 4))),
        )
        found.append(_message((1, 8), (2, "torch"), (7, graph), (8, _message((2, 17)))))
    return found


def _nunchaku_seeds(scratch: Path) -> list[bytes]:
    import loraq_sim as lq
    from loraq_sim.nunchaku import write_nunchaku
    from loraq_sim.solvers import solve_group

    formats = {"main": "int4/g64", "branch": "fp16", "rank": 2, "preset": "fast"}
    weight, path = np.ones((4, 8), np.float32), scratch / "seed.safetensors"
    trio = solve_group({f"a.to_{part}": weight for part in "qkv"}, **formats)
    found = []
    floats = {"ffn_up": lq.solve(weight, **formats | {"main": "nvfp4", "branch": "bf16"})}
    for solved in ({"ffn_up": lq.solve(weight, **formats)}, trio, floats):
        write_nunchaku(path, solved, config={"_class_name": "x"}, overwrite=True)
        found.append(path.read_bytes())
    return found


def _adapter_seeds(scratch: Path) -> list[bytes]:
    from safetensors.numpy import save

    down, up = np.ones((2, 6), np.float32), np.ones((4, 2), np.float16)
    named = {
        "kohya": {
            "lora_unet_a_b.lora_down.weight": down,
            "lora_unet_a_b.lora_up.weight": up,
            "lora_unet_a_b.alpha": np.array(2, np.float32),
        },
        "diffusers": {"transformer.a.b.lora_A.weight": down, "transformer.a.b.lora_B.weight": up},
        "peft": {
            "base_model.model.a.b.lora_A.style.weight": down,
            "base_model.model.a.b.lora_B.style.weight": up,
        },
        "old": {"a.processor.b_lora.down.weight": down, "a.processor.b_lora.up.weight": up},
        "other": {"lora_unet_a_b.lokr_w1": up, "lora_unet_a_b.dora_scale": down},
    }
    return [save(tensors) for tensors in named.values()]


def _accelerator_seeds(scratch: Path) -> list[bytes]:
    from hwmodels.loader import SHIPPED

    found = []
    for name in ("aie2", "a100", "systolic"):
        lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        # Comments and long sources only slow the parser down.
        kept = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        found.append("\n".join(kept).encode())
    return [*found, b"name: x\nunits: {rows: 4, columns: 4}\nmodes: [{name: int8}]\n"]


def _plan_seeds(scratch: Path) -> list[bytes]:
    (scratch / "layers.npz").write_bytes(_dump(scratch, ".npz"))
    small = b'dump = "layers.npz"\nhw = "aie2"\nsplits = "W4A4"\nmethods = "rtn"\n'
    return [_PLAN.encode(), small, b"[datapath]\ncombine = 'bf16'\n[[override]]\nlayers = 'a'\n"]


def _measured_seeds(scratch: Path) -> list[bytes]:
    from hwmodels.validation import MEASURED_CSV

    lines = MEASURED_CSV.read_text(encoding="utf-8").splitlines()
    picked = [line for line in lines[1:] if "branch" in line or "single core" in line][:8]
    several = [lines[0], *lines[1:6], *picked]
    return ["\n".join(several).encode(), "\r\n".join(several[:3]).encode()]


def _store_seeds(scratch: Path) -> list[bytes]:
    from loraq_sim.results.store import ResultStore

    path = scratch / "seed.sqlite"
    path.unlink(missing_ok=True)
    with ResultStore.open(path, create=True) as store:
        cases = [f"case{index}" for index in range(4)]
        store.begin_run({"command": ["sweep", "--seed", "0"], "seed": 0}, cases)
        for index, case in enumerate(cases):
            row = {"layer": "ffn_up", "split": "W4A4", "status": "ok", "output_error": 0.1 * index}
            store.add(case, row | {"latency_s": 1e-3, "pareto": index == 0, "note": "x"})
    # Small pages: mutations then reach every structure of the file.
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA page_size = 512")
    connection.execute("VACUUM")
    connection.close()
    empty = scratch / "empty.sqlite"
    sqlite3.connect(empty).execute("CREATE TABLE t (a)").connection.close()
    return [path.read_bytes(), empty.read_bytes()]


def _quantized_seeds(scratch: Path) -> list[bytes]:
    import loraq_sim as lq
    from loraq_sim.quantized_model import write_quantized_model

    weight, path = _arrays()["ffn_up.weight"], scratch / "seed.safetensors"
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((8, 6)).astype(np.float32)
    options = {"method": "loraq", "preset": "fast", "seed": 0}
    found = []
    for main, extra in (
        ("int4/g4", {"branch": "int8/g2", "rank": 2}),
        ("nvfp4", {}),
        ("uint4/row", {}),
        ("mxfp4", {"branch": "fp16", "rank": 1, "activations": inputs, "smooth": 0.5}),
    ):
        solution = lq.solve(weight, main=main, **options, **extra)
        write_quantized_model(path, {"ffn_up": solution}, meta={"model": "x"}, overwrite=True)
        found.append(path.read_bytes())
    return found


SEEDS = {
    "torch": _torch_seeds,
    "safetensors": _safetensors_seeds,
    "npz": _npz_seeds,
    "gguf": _gguf_seeds,
    "index": _index_seeds,
    "config": _config_seeds,
    "onnx": _onnx_seeds,
    "nunchaku": _nunchaku_seeds,
    "adapter": _adapter_seeds,
    "accelerator": _accelerator_seeds,
    "plan": _plan_seeds,
    "measured": _measured_seeds,
    "store": _store_seeds,
    "quantized": _quantized_seeds,
}
"""Reader name to the function that makes its seed files (as bytes), given a scratch folder."""
