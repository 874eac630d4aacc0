"""The scaled GEMM in tiles: the bits and statistics of Python integers, and of the other route."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.emulator import scaled_tiles
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.scaled_gemm import BIT_EXACT, by_stretches, scaled_gemm
from loraq_sim.emulator.scaled_tiles import run_scaled
from loraq_sim.emulator.walk import walk_steps
from loraq_sim.evaluate import solve_case
from loraq_sim.formats import parse_format
from loraq_sim.kernels.processor import LOOPS, PATH_VARIABLE, PATHS, choose_path
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.settings import CaseSettings

HERE = PATHS[PATHS.index(choose_path()) :] if choose_path() != LOOPS else ()
FORMATS = (
    *("int4/g64", "int8/g32", "int4/row", "int8/tensor", "int5/g7", "int3/g14", "int8/g16/e8m0"),
    *("uint4/g64", "uint8/g32", "uint5/row", "mxint4", "mxint8", "bfp16ebs8", "mxfp4", "nvfp4"),
    *("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"),
)


def stored(codes, fmt, seed):
    """Codes with random scales."""
    fmt = parse_format(fmt)
    scales = np.exp2(np.random.default_rng(seed).uniform(-9, 3, fmt.scale_shape(codes.shape)))
    return QuantizedTensor(codes=codes, scales=scales.astype(np.float32), format=fmt)


def python_integers(x, w, group, chunk):
    """y, the lowest and the highest prefix of any group, of Python integers."""
    y = np.zeros((len(x.codes), len(w.codes)), np.float32)
    low = high = 0
    for i, a in enumerate(x.codes.tolist()):
        for j, b in enumerate(w.codes.tolist()):
            for g, start in enumerate(range(0, len(a), group)):
                acc, products = 0, [p * q for p, q in zip(a, b, strict=True)][start : start + group]
                for first in range(0, len(products), chunk):
                    acc += sum(products[first : first + chunk])
                    low, high = min(low, acc), max(high, acc)
                scale = np.float32(x.scales[i, g] * w.scales[j, g])
                y[i, j] = np.float32(y[i, j] + np.float32(np.float32(acc) * scale))
    return y, low, high


def adversarial(shape, bits, seed):
    """Codes of one kind each row: the ends, ramps, alternating, zeros, random."""
    rng, (rows, k) = np.random.default_rng(seed), shape
    lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.integers(lo, hi + 1, shape)
    codes[0], codes[1 % rows], codes[2 % rows] = lo, hi, 0
    codes[3 % rows] = np.where(np.arange(k) % 2, lo, hi)
    codes[4 % rows, : k // 2], codes[4 % rows, k // 2 :] = lo, hi
    return codes.astype(np.int8)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize(("group", "k", "bits"), [(16, 48, 8), (32, 70, 4), (7, 20, 8)])
def test_sums_and_extremes_are_those_of_python_integers(monkeypatch, path, chunk, group, k, bits):
    monkeypatch.setenv(PATH_VARIABLE, path)
    x = stored(adversarial((9, k), bits, 1), f"int{bits}/g{group}", 2)
    w = stored(adversarial((35, k), 8, 3), f"int8/g{group}", 4)
    y, low, high = python_integers(x, w, group, chunk)
    found = run_scaled(x, w, MacArray(acc_bits=32, products_per_add=chunk))
    np.testing.assert_array_equal(found.y, y)
    assert found.finite
    bits = max((high if high >= 0 else ~high).bit_length(), (~low).bit_length()) + 1
    assert found.safe_acc_bits == bits


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("saturate", [False, True])
def test_both_routes_agree_in_every_bit_and_count(monkeypatch, path, x_format, saturate):
    monkeypatch.setenv(PATH_VARIABLE, path)
    rng = np.random.default_rng(FORMATS.index(x_format))
    taken = 0
    for w_format in FORMATS:
        m, k, n = (int(v) for v in rng.integers((1, 1, 1), (20, 200, 70)))
        size = 10.0 ** rng.choice([0, -30, 15])
        x = (rng.standard_normal((m, k)) * size).astype(np.float32)
        w = (rng.standard_normal((n, k)) * 2.0 ** rng.integers(-20, 20)).astype(np.float32)
        x[:, : k // 3], w[n // 2 :] = 0, w[n // 2 :] * rng.integers(0, 2)
        operands = quantize(x, x_format), quantize(w, w_format)
        mac = MacArray(
            acc_bits=int(rng.choice([8, 12, 20, 32, 48])),
            overflow=str(rng.choice(["wrap", "saturate", "saturate_symmetric"])),
            products_per_add=int(rng.choice([1, 2, 3, 8, 32])),
            tree_bits=None if rng.random() < 0.7 else int(rng.integers(8, 24)),
        )
        taken += run_scaled(*operands, mac) is not None
        with np.errstate(over="ignore", invalid="ignore"):
            expected, seen = by_stretches(*operands, mac, "fp32", saturate, "initial")
        y, statistics = scaled_gemm(*operands, mac, saturate=saturate)
        np.testing.assert_array_equal(y, expected)
        assert statistics == seen
    assert taken > 0


@pytest.mark.parametrize("path", HERE)
def test_scales_that_are_not_finite_run_on_as_such(monkeypatch, path):
    monkeypatch.setenv(PATH_VARIABLE, path)
    x, w = (stored(adversarial((6, 64), 8, seed), "int8/g32", seed) for seed in (1, 2))
    x.scales[0, 0], x.scales[1, 1], w.scales[3, 0] = np.nan, np.inf, np.inf
    x.codes[1, 32:] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        expected, seen = by_stretches(x, w, MacArray(), "fp32", False, "initial")
    y, statistics = scaled_gemm(x, w, MacArray())
    np.testing.assert_array_equal(y, expected)
    assert np.isnan(y[0]).all()
    assert statistics == seen
    assert statistics.arithmetic == BIT_EXACT


def test_sums_that_overflow_leave_the_count_to_the_other_route():
    x = stored(np.full((2, 32), -128, np.int8), "int8/g32", 1)
    w = stored(np.full((3, 32), -128, np.int8), "int8/g32", 2)
    mac = MacArray(acc_bits=18, overflow="saturate", products_per_add=8)
    assert run_scaled(x, w, mac) is None
    _, statistics = scaled_gemm(x, w, mac)
    # The first chunk reaches 2**17, which an 18-bit accumulator does not hold; so do all others.
    assert statistics.overflow_count == 2 * 3 * 4
    assert statistics.first_overflow_k == 0


def test_one_scale_for_a_block_of_rows_serves_each_of_them():
    x = quantize(np.random.default_rng(0).standard_normal((70, 96)).astype(np.float32), "int8/b32")
    w = quantize(np.random.default_rng(1).standard_normal((40, 96)).astype(np.float32), "int8/g32")
    y, _ = scaled_gemm(x, w, MacArray())
    exact = x.dequantize().astype(np.float64) @ w.dequantize().astype(np.float64).T
    # Three partial sums: each rounded, its scale rounded, and added.
    bound = np.abs(x.dequantize()).astype(np.float64) @ np.abs(w.dequantize()).astype(np.float64).T
    assert (np.abs(y - exact) <= 9 * np.finfo(np.float32).eps * bound).all()


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("chunk", [2, 8, 32])
def test_what_norms_prove_harmless_is(monkeypatch, path, chunk):
    monkeypatch.setenv(PATH_VARIABLE, path)
    monkeypatch.setattr(scaled_tiles, "_WORTH_NORMS", 0)
    rng = np.random.default_rng(chunk)
    for draw in range(12):
        # Most rows are calm; sums of a few go beyond all that the first rows show, some of them
        # only on their way.
        calm = np.rint(rng.standard_normal((150, 96)) * rng.choice([1.0, 2.0, 3.0]))
        codes = np.clip(calm, -7, 7).astype(np.int8)
        loud = rng.integers(20, 150, draw % 4)
        codes[loud] = rng.integers(-7, 8, (len(loud), 96))
        # Up to 588 in the first row, and later up to 1176 and back to 784: as far as norms allow.
        codes[0], codes[0, 32:44], codes[60:80] = 0, 7, 0
        codes[70, 32:56], codes[70, 56:64] = 7, -7
        x = stored(codes, "int4/g32", draw)
        weights = rng.integers(-7, 8, (40, 96)).astype(np.int8)
        weights[draw % 40] = 7
        w = stored(weights, "int4/g32", draw + 1)
        bits = int(rng.choice([11, 12, 13, 20]))
        mac = MacArray(acc_bits=bits, overflow="saturate", products_per_add=chunk)
        expected, seen = by_stretches(x, w, mac, "fp32", False, "initial")
        y, statistics = scaled_gemm(x, w, mac)
        np.testing.assert_array_equal(y, expected)
        assert statistics == seen


def layer_of(text, family, columns, seed):
    """Activations, a solution, its split and a bias."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((columns, 64)).astype(np.float32)
    x = rng.standard_normal((int(rng.integers(1, 40)), 64)).astype(np.float32)
    split = lq.parse_split(text, family=family, group=32)
    method = {"method": "lqer"} if split.rank else {"method": "rtn"}
    layer = lq.Layer(name="layer", kind="mlp_up", weight=weight, activations=x)
    stored_layer = solve_case(layer, CaseSettings(split=split, preset="fast", **method))
    return x, stored_layer, split, rng.standard_normal(columns).astype(np.float32)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("family", ["int", "mxint", "mxfp", "nvfp"])
@pytest.mark.parametrize("out_format", ["bf16", "fp16"])
def test_a_product_that_ends_its_layer_has_the_bits_of_all_steps(
    monkeypatch, path, family, out_format
):
    monkeypatch.setenv(PATH_VARIABLE, path)
    taken = 0
    for seed, (text, columns, has_bias) in enumerate(
        [
            *(("W4A4+W8A8r16", 64, True), ("W4A4+W8A8r16", 96, False), ("W4A4", 64, True)),
            *(("W4A4", 128, False), ("W4A4+W8A8r16", 50, True), ("W8A8+W8A8r8", 32, True)),
        ]
    ):
        x, solution, split, bias = layer_of(text, family, columns, seed)
        bias = bias if has_bias else None
        datapath = lq.Datapath(out_format=out_format)
        # Some outputs beyond fp16, and some that are subnormal there.
        for size in (1.0, 1e-6, 3e4):
            rows = x * np.float32(size)
            every = list(walk_steps(rows, solution, split, datapath, bias))
            seen = []
            output = lq.run_layer(rows, solution, split, datapath, bias=bias, on_step=seen.append)
            expected = every[-1].result.dequantize()
            np.testing.assert_array_equal(output.y, expected)
            np.testing.assert_array_equal(np.signbit(output.y), np.signbit(expected))
            whole = {done.step.name: done.statistics for done in every if done.statistics}
            assert output.gemms == whole
            assert output.clipped == sum((done.clipped for done in every), ())
            products = [done for done in seen if done.step.operation == "gemm"]
            ended = [done for done in products if done.result is None]
            assert ended in ([], products[-1:])
            taken += len(ended)
    assert taken > 0 or (out_format == "fp16" and path != "avx512")
