"""Requantizers against the runtimes they are named after: recorded always, run where installed."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.runtimes import (
    RUNTIMES,
    dynamic_quantize_linear,
    list_runtimes,
    runtime_requantizer,
)

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "runtimes"
FILES = sorted(GOLDEN.glob("*.json"))
# Layers of 192 outputs for each runtime in a test; `record.py --check N` compares more.
LAYERS = 40


def load(name):
    """Import a module of this folder, which is no package, under its own name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


layer_case = load("layer_cases").layer_case
calls = load("runtime_calls")
comparisons = load("comparisons")


def need(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed (pip install 'loraq-sim[runtimes]')")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_codes_of_runtimes_are_ours(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    comparison = comparisons.COMPARISONS[record["comparison"]]
    kinds = set()
    for layer in record["layers"]:
        case = comparisons.layer_of(layer)
        kinds.add(case.kind)
        np.testing.assert_array_equal(
            comparisons.our_codes(comparison, case), np.array(layer["codes"], comparison.out)
        )
    assert kinds >= ({"ties", "near", "extremes"} if "kind" not in comparison.layers else {"ties"})


def test_every_comparison_is_recorded_and_every_runtime_that_claims_it_is_compared():
    recorded = {json.loads(p.read_text(encoding="utf-8"))["comparison"] for p in FILES}
    assert recorded == set(comparisons.COMPARISONS)
    compared = {c.runtime for c in comparisons.COMPARISONS.values()}
    assert compared == {name for name in list_runtimes() if RUNTIMES[name].checked}


def test_recorded_layers_tell_the_rules_apart():
    # Codes of one runtime, requantized as each other does: every pair of rules differs somewhere.
    rules = {}
    for path in FILES:
        record = json.loads(path.read_text(encoding="utf-8"))
        comparison = comparisons.COMPARISONS[record["comparison"]]
        if comparison.out == "int8":
            rules[comparison.runtime] = [comparisons.layer_of(v) for v in record["layers"]]
    assert {"onnxruntime", "litert_reference", "ruy", "xnnpack", "tflite_reference"} <= set(rules)
    layers = [case for cases in rules.values() for case in cases]
    rng = np.random.default_rng(3)
    layers += [layer_case(rng, a_dtype=np.int8, kind="ties") for _ in range(20)]

    def codes(name):
        return [
            runtime_requantizer(
                name,
                a_scale=case.a_scale,
                w_scale=case.w_scale,
                out_scale=case.out_scale,
                zero_point=case.zero_point,
            )(case.accumulators)
            for case in layers
        ]

    distinct = ("onnxruntime", "onednn", "litert_reference", "ruy", "tflite_reference")
    distinct += ("tflite_single_rounding",)
    got = {name: codes(name) for name in distinct}
    for i, one in enumerate(distinct):
        for other in distinct[i + 1 :]:
            pairs = zip(got[one], got[other], strict=True)
            assert any((a != b).any() for a, b in pairs), (one, other)


@pytest.mark.parametrize("name", comparisons.COMPARISONS)
def test_codes_of_installed_runtimes_are_ours(name):
    comparison = comparisons.COMPARISONS[name]
    need(*comparison.needs)
    rng = np.random.default_rng(7)
    for _ in range(LAYERS):
        case = layer_case(rng, out_dtype=comparison.out, **comparison.layers)
        expected = comparison.call(case)
        np.testing.assert_array_equal(
            comparisons.our_codes(comparison, case), expected, err_msg=repr(case)
        )


@pytest.mark.parametrize("a_dtype", [np.uint8, np.int8], ids=["u8s8", "s8s8"])
def test_matmul_integer_of_onnxruntime_is_the_wrapping_array(a_dtype):
    need("onnx", "onnxruntime")
    rng = np.random.default_rng(11)
    for _ in range(LAYERS):
        case = layer_case(rng, a_dtype=a_dtype, w_zeros=True, biases=False)
        np.testing.assert_array_equal(calls.onnx_matmul_integer(case), case.accumulators)
        plain = emulate_gemm(case.a, case.w, MacArray(acc_bits=32))
        whole = case.a.astype(np.int64) @ case.w.astype(np.int64).T
        np.testing.assert_array_equal(plain, whole)


def test_qgemm_of_onnxruntime_multiplies_sums_by_one_float32():
    need("onnx", "onnxruntime")
    rng = np.random.default_rng(12)
    for _ in range(LAYERS):
        case = layer_case(rng, a_dtype=np.uint8, w_zeros=True)
        expected = case.accumulators.astype(np.float32) * (case.a_scale * case.w_scale)
        np.testing.assert_array_equal(calls.onnx_qgemm(case, np.float32), expected)


def test_dynamic_quantize_linear_is_that_of_onnxruntime():
    need("onnx", "onnxruntime")
    rng = np.random.default_rng(13)
    for i in range(LAYERS):
        x = rng.standard_normal((7, 33)) * 10.0 ** rng.uniform(-5, 5) + rng.uniform(-3, 3)
        if i % 4 == 0:
            x = np.abs(x)
        if i % 5 == 0:
            x = np.round(x * 2) / 2
        if i % 9 == 0:
            x[:] = 0
        got = dynamic_quantize_linear(x)
        expected = calls.onnx_dynamic_quantize_linear(x.astype(np.float32))
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
