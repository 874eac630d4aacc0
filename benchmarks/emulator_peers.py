"""What a user would run instead of the emulator: the same GEMM, or a slice of it, by other means.

Some peers are imported by name, because they are compared with and never needed. Each peer returns
(name, call, part of the GEMM that one call computes). Slow ones compute a slice.
"""

from collections.abc import Callable, Iterator
from importlib import import_module

import numpy as np

from loraq_sim.emulator.mac_array import MacArray

Peer = tuple[str, Callable, float]


def peers(a: np.ndarray, w: np.ndarray, mac: MacArray, note: Callable[[str], None]) -> list[Peer]:
    """Return the peers that are installed, for a saturating `mac` of one product per add."""
    found: list[Peer] = []
    for make in (_torch_loop, _numpy_loop, _naive_numba, _onnxruntime, _apytypes):
        try:
            found += list(make(a, w, mac))
        except ImportError as error:
            note(f"skipped {make.__name__.strip('_')}: {error.name} is not installed")
    return found


def _torch_loop(a: np.ndarray, w: np.ndarray, mac: MacArray) -> Iterator[Peer]:
    import torch

    torch.set_num_threads(1)
    left = torch.from_numpy(a.T.astype(np.int32))
    right = torch.from_numpy(w.T.astype(np.int32))

    def run():
        acc = torch.zeros(len(a), len(w), dtype=torch.int32)
        for x, y in zip(left, right, strict=True):
            acc.addcmul_(x[:, None], y[None, :]).clamp_(mac.lo, mac.hi)
        return acc

    yield "torch k loop: addcmul_, clamp_", run, 1.0


def _numpy_loop(a: np.ndarray, w: np.ndarray, mac: MacArray) -> Iterator[Peer]:
    rows = max(1, len(a) // 8)
    left, right = a[:rows].T.astype(np.int32), np.ascontiguousarray(w.T.astype(np.int32))

    def run():
        acc = np.zeros((rows, len(w)), np.int32)
        product = np.empty_like(acc)
        for x, y in zip(left, right, strict=True):
            np.multiply(x[:, None], y[None, :], out=product)
            acc += product
            np.clip(acc, mac.lo, mac.hi, out=acc)
        return acc

    yield "NumPy k loop: multiply, add, clip", run, rows / len(a)


def _naive_numba(a: np.ndarray, w: np.ndarray, mac: MacArray) -> Iterator[Peer]:
    from numba import njit

    @njit
    def saturating(a, w, lo, hi, out):
        for m in range(a.shape[0]):
            for n in range(w.shape[0]):
                acc = 0
                for k in range(a.shape[1]):
                    acc = min(max(acc + a[m, k] * w[n, k], lo), hi)
                out[m, n] = acc

    rows = max(1, len(a) // 64)
    some = a[:rows].astype(np.int32)
    right = w.astype(np.int32)

    def run():
        out = np.empty((rows, len(w)), np.int32)
        saturating(some, right, mac.lo, mac.hi, out)
        return out

    yield "naive Numba triple loop", run, rows / len(a)


def _onnxruntime(a: np.ndarray, w: np.ndarray, mac: MacArray) -> Iterator[Peer]:
    del mac  # exact only: it has no narrow accumulator
    onnxruntime, onnx = import_module("onnxruntime"), import_module("onnx")
    kinds, helper = onnx.TensorProto, onnx.helper
    for dtype, kind in ((np.uint8, kinds.UINT8), (np.int8, kinds.INT8)):
        left = helper.make_tensor_value_info("a", kind, a.shape)
        product = helper.make_tensor_value_info("y", kinds.INT32, [len(a), len(w)])
        right = onnx.numpy_helper.from_array(np.ascontiguousarray(w.T), "w")
        node = helper.make_node("MatMulInteger", ["a", "w"], ["y"])
        graph = helper.make_graph([node], "gemm", [left], [product], [right])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        codes = {"a": a.view(dtype)}
        name = f"onnxruntime MatMulInteger, {np.dtype(dtype).name}, exact"
        yield name, lambda session=session, codes=codes: session.run(None, codes), 1.0


def _apytypes(a: np.ndarray, w: np.ndarray, mac: MacArray) -> Iterator[Peer]:
    apytypes = import_module("apytypes")

    rows, columns = min(8, len(a)), min(64, len(w))
    left = apytypes.fx(a[:rows], int_bits=8, frac_bits=0)
    right = apytypes.fx(np.ascontiguousarray(w[:columns].T), int_bits=8, frac_bits=0)

    def run():
        with apytypes.APyFixedAccumulatorContext(
            int_bits=mac.acc_bits, frac_bits=0, overflow=apytypes.OverflowMode.SAT
        ):
            return left @ right

    part = rows * columns / (len(a) * len(w))
    yield "apytypes accumulator context (wraps although asked to saturate)", run, part
