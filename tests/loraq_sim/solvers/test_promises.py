"""What single methods promise beyond the contract of all: invariants, data, diagnostics."""

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import quantize
from loraq_sim.quantizers.quantize import quantize_near
from loraq_sim.solvers import METHODS, baselines, loraq, solve
from loraq_sim.solvers.main_grid import requantize, stack_rows
from loraq_sim.solvers.solve import NEED_ACTIVATIONS

DATA_FREE = [name for name in METHODS if name not in ("rtn", *NEED_ACTIVATIONS)]


def heavy_tailed(seed=0, shape=(192, 256)):
    rng = np.random.default_rng(seed)
    columns = np.exp(0.3 * rng.standard_normal(shape[1]))
    low_rank = rng.standard_normal((shape[0], 20)) @ rng.standard_normal((20, shape[1]))
    return (rng.standard_t(6, size=shape) * columns + 0.3 * low_rank).astype(np.float32)


def correlated_inputs(k=256, tokens=300, seed=1):
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((tokens, 24)) @ rng.standard_normal((24, k))
    channels = np.exp(rng.standard_normal(k))
    return ((factors + rng.standard_normal((tokens, k))) * channels).astype(np.float32)


def output_error(weight, solution, x):
    return np.linalg.norm(x @ (weight - solution.reconstruct()).T)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize(
    ("main", "branch"),
    [
        ("int4/g64", "int8/g64"),
        ("int4/row", "int8/row"),
        ("int4/tensor", "int8/tensor"),
        ("uint4/g64", "uint8/g32"),
        ("int3/g64", "int6/g32"),
        ("mxint4", "mxint6"),
        ("mxfp4", "mxfp8_e4m3"),
        ("mxfp4", "mxfp6_e3m2"),
        ("mxfp4", "mxfp4"),
        ("nvfp4", "nvfp4"),
        ("nvfp4", "bf16"),
    ],
)
def test_data_free_methods_improve_on_rounding_to_nearest(method, main, branch):
    weight = heavy_tailed()
    plain = solve(weight, "rtn", main=main)
    solution = solve(weight, method, main=main, branch=branch, rank=24, preset="fast")
    assert solution.weight_error < plain.weight_error
    assert (solution.main.format, solution.left.format) == (plain.main.format, parse_format(branch))


@pytest.mark.parametrize("main", ["int4/g64", "mxint4", "mxfp4", "nvfp4"])
def test_loraq_beats_alternation_and_svdquant_on_every_kind_of_grid(main):
    weight = heavy_tailed(2)
    errors = [
        solve(weight, method, main=main, branch="int8/g64", rank=24).weight_error
        for method in ("svdquant", "alternating", "loraq")
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("branch", ["int8/g64", "int6/g64", "int4/g64", "fp16"])
def test_a_short_last_group_is_no_obstacle(branch):
    weight = heavy_tailed(3, (64, 150))
    solution = solve(weight, "loraq", main="int4/g64", branch=branch, rank=10, preset="fast")
    assert solution.weight_error < solve(weight, "svdquant", rank=10).weight_error


def test_a_branch_of_four_bits_is_within_a_fifth_of_eight_bits_at_equal_bytes():
    weight = heavy_tailed(4, (256, 256))
    eight, four = (
        solve(
            weight, "loraq", main="int4/g64", branch=f"int{bits}/g64", budget="fp16@16"
        ).weight_error
        for bits in (8, 4)
    )
    assert four < 1.2 * eight


@pytest.mark.parametrize("main", ["int4/g32/e8m0", "mxint4", "mxfp4"])
@pytest.mark.parametrize("branch", ["int8/g32/e8m0", "mxint6", "mxfp4"])
def test_doubling_the_weight_changes_power_of_two_scales_only(main, branch):
    weight = heavy_tailed(9, (64, 96))
    one = solve(weight, "loraq", main=main, branch=branch, rank=8, preset="fast")
    two = solve(2 * weight, "loraq", main=main, branch=branch, rank=8, preset="fast")
    for part in ("main", "left", "right"):
        first, second = getattr(one, part), getattr(two, part)
        np.testing.assert_array_equal(
            first.codes.astype(np.float32), second.codes.astype(np.float32)
        )
        factor = 1 if part == "left" else 2
        np.testing.assert_array_equal(factor * first.scales, second.scales)
    assert one.weight_error == two.weight_error


def test_a_weight_of_low_rank_keeps_its_start():
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((64, 4)) @ rng.standard_normal((4, 80))).astype(np.float32)
    # fp16 factors: each product carries a relative error of 2**-11 per factor.
    assert solve(weight, "loraq", main="int4/g64", branch="fp16", rank=4).weight_error < 2**-10


@pytest.mark.parametrize("method", ["l2qer", "qera"])
def test_data_aware_methods_beat_lqer_in_the_output(method):
    weight, x = heavy_tailed(5), correlated_inputs()
    errors = [
        output_error(
            weight, solve(weight, name, main="int4/g64", branch="fp16", rank=16, activations=x), x
        )
        for name in ("lqer", method)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ["l2qer", "qera"])
def test_data_aware_methods_ask_for_activations(method):
    with pytest.raises(InputError, match=rf"method '{method}' needs activations"):
        solve(heavy_tailed(), method)


def test_qera_is_the_best_low_rank_term_for_the_output():
    weight, x = heavy_tailed(6, (48, 64)), correlated_inputs(64, 500)
    solution = solve(weight, "qera", main="int4/g64", branch="fp16", rank=6, activations=x)
    residual = (weight - quantize(weight, "int4/g64").dequantize()).astype(np.float64)
    singular = np.linalg.svd(residual @ x.T.astype(np.float64), compute_uv=False)
    optimum = np.sqrt(np.square(singular[6:]).sum())
    # The damping of the second moment and fp16 factors cost less than 1 %.
    assert optimum <= output_error(weight, solution, x) <= 1.01 * optimum


def test_tuned_svdquant_chooses_a_smoothing_and_iterates():
    weight, x = heavy_tailed(7), correlated_inputs()
    plain = solve(weight, "svdquant", main="int4/g64", branch="fp16", rank=16)
    iterated = solve(weight, "svdquant_tuned", main="int4/g64", branch="fp16", rank=16)
    assert iterated.weight_error < plain.weight_error
    assert iterated.smooth is None
    tuned = solve(weight, "svdquant_tuned", main="int4/g64", branch="fp16", rank=16, activations=x)
    assert tuned.smooth.shape == (256,)
    assert tuned.bytes_by_part["smooth"] == 512
    given = solve(
        weight, "svdquant_tuned", rank=16, activations=x, smooth=np.full(256, 2, dtype=np.float32)
    )
    np.testing.assert_array_equal(given.smooth, np.full(256, 2))


def test_flattening_shows_in_the_diagnostics():
    weight = heavy_tailed(8)
    solution = solve(weight, "loraq", main="int4/g64", branch="int8/g64", rank=24)
    seen = solution.diagnose(weight)
    assert seen.amax_over_rms_after < 0.85 * seen.amax_over_rms_before
    shares = list(seen.left_to_win.values())
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    assert seen.left_to_win[128] < 1
    assert 0 < solution.branch_noise < solution.weight_error
    assert seen.max_abs_error == pytest.approx(
        float(np.abs(weight - solution.reconstruct()).max()), rel=1e-3
    )
    with pytest.raises(InputError, match=r"shape \(192, 256\), got \(2, 2\)"):
        solution.diagnose(np.ones((2, 2), dtype=np.float32))


@pytest.mark.parametrize(
    "fmt", ["int8/g64", "int4/row", "uint4/g16", "mxint6", "mxfp8_e4m3", "mxfp4", "fp16"]
)
def test_values_on_a_grid_keep_their_codes(fmt):
    stored = quantize(heavy_tailed(1, (12, 70)), fmt)
    again = requantize(stored.dequantize(), stored)
    np.testing.assert_array_equal(again.codes.astype(np.float32), stored.codes.astype(np.float32))
    parts = [quantize(block, fmt) for block in np.split(heavy_tailed(1, (12, 70)), [5, 6])]
    np.testing.assert_array_equal(stack_rows(parts).dequantize(), stored.dequantize())


def test_scales_searched_near_given_ones_never_lose_to_the_search_alone():
    values, fmt = heavy_tailed(11), parse_format("int4/g64")
    cold = quantize(values, fmt, rule="signed_mse")
    near = quantize_near(values, fmt, "signed_mse", cold.scales * np.float32(1.004))
    lost = [np.square(values - q.dequantize()).sum(axis=1) for q in (cold, near)]
    # Float32 sums of 256 squares.
    assert (lost[1] <= lost[0] * (1 + 1e-5)).all()
    assert lost[1].sum() < lost[0].sum()
    nowhere = quantize_near(values, fmt, "signed_mse", np.zeros_like(cold.scales))
    np.testing.assert_array_equal(nowhere.codes, cold.codes)


def test_published_svdquant_tries_every_pair_of_strengths_and_a_hundred_iterations(monkeypatch):
    weight, x = heavy_tailed(7, (48, 64)), correlated_inputs(64, 60)
    pairs = []
    real = baselines.power_smoothing

    def watched(a, b, *arrays):
        pairs.append((round(a, 2), round(b, 2)))
        return real(a, b, *arrays)

    monkeypatch.setattr(baselines, "power_smoothing", watched)
    options = {"main": "int4/g64", "branch": "fp16", "rank": 4, "preset": "fast"}
    published = solve(weight, "svdquant_published", activations=x, **options)
    grid = [round(0.05 * i, 2) for i in range(20)]
    # No smoothing at all stands for the pair of zeros.
    assert sorted([(0.0, 0.0), *pairs]) == [(a, b) for a in grid for b in grid]
    tuned = solve(weight, "svdquant_tuned", activations=x, **options)
    assert len(tuned.trace) <= 5
    assert {entry.stage for entry in published.trace} == {"svdquant_published"}
    assert published.smooth is not None
    # Without activations both only iterate; the error of the weight tells when to stop.
    long = solve(weight, "svdquant_published", **options)
    errors = [entry.weight_error for entry in long.trace]
    assert len(errors) == 101 or errors[-1] >= errors[-2]
    assert long.weight_error == min(errors)
    assert long.weight_error <= solve(weight, "svdquant_tuned", **options).weight_error


def test_small_groups_with_e4m3_scales_are_worth_their_bytes():
    weight = heavy_tailed(11, (96, 256))
    options = {"branch": "int8/g64", "rank": 12, "preset": "fast"}
    wide, small = (
        {name: solve(weight, name, main=main, **options) for name in ("rtn", "loraq")}
        for main in ("int4/g64/fp16", "int4/g32/e4m3")
    )
    # One fp32 scale of the tensor is all that differs in bytes.
    assert small["loraq"].nbytes == wide["loraq"].nbytes + 4
    assert small["rtn"].weight_error < wide["rtn"].weight_error
    assert small["loraq"].weight_error < 1.15 * wide["loraq"].weight_error
    # The second level makes the size of the weight immaterial.
    tiny = solve(weight * np.float32(2.0**-12), main="int4/g32/e4m3", **options)
    assert tiny.weight_error == pytest.approx(small["loraq"].weight_error, rel=0.01)


@pytest.mark.parametrize("main", ["int4/g32/e4m3", "nvfp4"])
def test_branches_are_fitted_to_scales_as_e4m3_holds_them(main, monkeypatch):
    weight = heavy_tailed(12, (96, 256))
    options = {"main": main, "branch": "int8/g64", "rank": 12, "preset": "fast"}
    fitted = solve(weight, **options)
    monkeypatch.setattr(loraq, "_REFITS", 0)
    plain = solve(weight, **options)
    assert fitted.weight_error < 0.995 * plain.weight_error
    np.testing.assert_array_equal(fitted.main.scales, plain.main.scales)
    assert fitted.nbytes == plain.nbytes
