"""One contract for every solver, then what each promises."""

import inspect

import numpy as np
import pytest
import torch

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import METHODS, PRESETS, SharedStages, SolveOptions, solve, solve_many
from loraq_sim.solvers.solve import DEFLATING
from loraq_sim.split import WITHOUT_BRANCH, branch_bytes, rank_for_budget

EXAMPLES = {
    "minilm": "encoder.layer.2.attention.self.query",
    "tiny_pixart": "transformer_blocks.3.ff.net.2",
}


@pytest.fixture(scope="module")
def real_weights(request):
    folder = request.config.rootpath / "examples"
    layers = {
        dump: torch.load(folder / f"{dump}.pt", weights_only=True)["layers"][name]
        for dump, name in EXAMPLES.items()
    }
    return {dump: layer["weight"].float().numpy() for dump, layer in layers.items()}


def heavy_tailed(seed=0, shape=(96, 160)):
    rng = np.random.default_rng(seed)
    columns = np.exp(0.3 * rng.standard_normal(shape[1]))
    return (rng.standard_t(6, size=shape) * columns).astype(np.float32)


def inputs_of(seed=1, tokens=80, k=160):
    rng = np.random.default_rng(seed)
    channels = np.exp(rng.standard_normal(k))
    return (rng.standard_normal((tokens, k)) * channels).astype(np.float32)


def stored_bytes(solution):
    return b"".join(part.pack() for part in solution.parts.values())


def error_from_stored_codes(weight, solution):
    """Relative error in float64 from unpacked bytes only."""
    main, left, right = (
        None if part is None else QuantizedTensor.unpack(part.pack(), part.format, part.shape)
        for part in (solution.main, solution.left, solution.right)
    )
    total = main.dequantize().astype(np.float64)
    if left is not None:
        total += left.dequantize().astype(np.float64) @ right.dequantize().astype(np.float64)
    if solution.feedback is not None:
        v = solution.feedback.dequantize().astype(np.float64)
        total += (solution.feedback_left.dequantize() - total @ v.T) @ v
    if solution.smooth is not None:
        total /= solution.smooth.astype(np.float64)
    return np.linalg.norm(weight - total) / np.linalg.norm(weight.astype(np.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("branch", ["fp16", "int8/g64", "int6/g32", "int4/g16"])
def test_every_method_keeps_the_contract(method, branch):
    # 400 pairs of strengths with up to 100 iterations each: a corner of the weight says as much.
    n, k = (32, 64) if method == "svdquant_published" else (96, 160)
    weight, x = heavy_tailed()[:n, :k].copy(), inputs_of()[:, :k].copy()
    kept, kept_x = weight.copy(), x.copy()
    options = {"rank": 12, "preset": "fast", "seed": 3, "activations": x}
    options |= {"feedback": "auto"} if method in DEFLATING else {}
    solution = solve(weight, method, main="int4/g64", branch=branch, **options)
    np.testing.assert_array_equal(weight, kept)
    np.testing.assert_array_equal(x, kept_x)
    assert solution.main.shape == (n, k)
    assert solution.rank == (0 if method in WITHOUT_BRANCH else 12)
    # Both sides multiply stored values; only float32 summation over the rank differs.
    assert solution.weight_error == pytest.approx(
        error_from_stored_codes(weight, solution), rel=1e-4
    )
    np.testing.assert_allclose(
        np.linalg.norm(weight - solution.reconstruct()) / np.linalg.norm(weight),
        solution.weight_error,
        rtol=1e-5,
    )
    smooth_bytes = 0 if solution.smooth is None else 2 * weight.shape[1]
    assert solution.nbytes == len(stored_bytes(solution)) + smooth_bytes
    assert solution.nbytes == sum(solution.bytes_by_part.values())
    assert solution.bits_per_weight == 8 * solution.nbytes / weight.size
    assert solution.seconds > 0
    again = solve(weight, method, main="int4/g64", branch=branch, **options)
    assert stored_bytes(again) == stored_bytes(solution)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "gptq"])
def test_rank_zero_is_round_to_nearest(method):
    weight = heavy_tailed()
    plain = solve(weight, "rtn", main="int4/g64")
    for options in ({"rank": 0}, {"branch": None}):
        solution = solve(weight, method, main="int4/g64", **options)
        assert solution.method == "rtn"
        assert stored_bytes(solution) == stored_bytes(plain)
        assert solution.left is None


@pytest.mark.parametrize("dump", EXAMPLES)
def test_real_layers_improve_from_rtn_over_the_baselines_to_loraq(real_weights, dump):
    weight = real_weights[dump]
    budget = "fp16@32" if dump == "minilm" else "fp16@4"
    errors = [
        solve(weight, method, main="int4/g64", branch="fp16", budget=budget).weight_error
        for method in ("rtn", "lqer", "svdquant", "alternating", "loraq")
    ]
    assert errors == sorted(errors, reverse=True)
    quantized = solve(weight, "loraq", main="int4/g64", branch="int8/g64", budget=budget)
    assert quantized.weight_error < errors[-1]


def test_an_eight_bit_branch_halves_the_error_of_svdquant_at_equal_bytes(real_weights):
    weight = real_weights["minilm"]
    published = solve(weight, "svdquant", main="int4/g64", branch="fp16", rank=32)
    ours = solve(
        weight, "loraq", main="int4/g64", branch="int8/g64", budget="fp16@32", preset="best"
    )
    assert ours.nbytes <= published.nbytes
    assert ours.weight_error <= 0.5 * published.weight_error


@pytest.mark.parametrize("method", ["alternating", "loraq", "loftq", "svdquant_tuned"])
def test_longer_presets_never_lose_and_the_best_iterate_is_returned(method):
    weight = heavy_tailed(5)
    errors = []
    for preset in PRESETS:
        solution = solve(weight, method, main="int4/g64", branch="int4/g64", rank=16, preset=preset)
        stored = [entry.weight_error for entry in solution.trace if entry.is_stored]
        assert solution.weight_error == pytest.approx(min(stored), rel=1e-5)
        errors.append(solution.weight_error)
    assert errors == sorted(errors, reverse=True)


def test_sharing_stages_changes_no_byte():
    weight = heavy_tailed(6)
    specs = [
        {"branch": branch, "rank": rank, "main": main}
        for main in ("int4/g64", "mxfp4")
        for rank in (8, 12)
        for branch in ("int8/g64", "int4/g16", "int6/g32", "fp16")
    ]
    specs += [{"method": "svdquant", "branch": "fp16", "rank": 8}]
    together = solve_many(weight, specs, preset="fast")
    for spec, solution in zip(specs, together, strict=True):
        alone = solve(weight, **spec, preset="fast")
        assert stored_bytes(alone) == stored_bytes(solution)
        assert alone.trace == solution.trace


def test_an_editor_completes_every_option_of_a_solve():
    options = inspect.signature(solve).parameters.keys() - {"weight", "shared"}
    assert SolveOptions.__annotations__.keys() == options


def test_shared_stages_are_kept_apart_by_weight_seed_and_smoothing():
    shared = SharedStages()
    cases = [
        {"weight": heavy_tailed(seed), "seed": number, "smooth": smooth}
        for seed in (0, 1)
        for number in (0, 1)
        for smooth in (None, np.linspace(1, 2, 160))
    ]
    for case in cases:
        solution = solve(**case, rank=8, preset="fast", shared=shared)
        assert stored_bytes(solution) == stored_bytes(solve(**case, rank=8, preset="fast"))


@pytest.mark.parametrize("method", ["l2qer", "qera", "svdquant_tuned"])
def test_shared_stages_are_kept_apart_by_activations(method):
    shared, rng, weight = SharedStages(), np.random.default_rng(8), heavy_tailed(8)
    for _ in range(2):
        x = (rng.standard_normal((40, 160)) * np.exp(rng.standard_normal(160))).astype(np.float32)
        case = {"method": method, "rank": 8, "preset": "fast", "activations": x}
        together = stored_bytes(solve(weight, **case, shared=shared))
        assert together == stored_bytes(solve(weight, **case))


def test_doubling_the_weight_doubles_power_of_two_scales_and_nothing_else():
    weight = heavy_tailed(9)
    one = solve(
        weight, "loraq", main="int4/g32/e8m0", branch="int8/g32/e8m0", rank=8, preset="fast"
    )
    two = solve(
        2 * weight, "loraq", main="int4/g32/e8m0", branch="int8/g32/e8m0", rank=8, preset="fast"
    )
    np.testing.assert_array_equal(one.main.codes, two.main.codes)
    np.testing.assert_array_equal(2 * one.main.scales, two.main.scales)
    assert one.weight_error == pytest.approx(two.weight_error, rel=1e-6)


def test_a_weight_2_to_the_6_smaller_has_the_same_codes():
    # Scales in float32, so that none is rounded otherwise.
    fields = {"main": "int4/g64/fp32", "branch": "int8/g32/fp32", "rank": 8, "preset": "fast"}
    weight = heavy_tailed(9)
    one, two = (solve(values, "loraq", **fields) for values in (weight, weight / 64))
    for name in ("main", "left", "right"):
        np.testing.assert_array_equal(getattr(one, name).codes, getattr(two, name).codes)
    np.testing.assert_array_equal(one.main.scales, 64 * two.main.scales)


def test_without_a_rank_a_small_layer_has_one_it_can_hold():
    assert solve(heavy_tailed(shape=(32, 48)), preset="fast").rank == 32
    assert solve(heavy_tailed(shape=(96, 160)), preset="fast").rank == 64


def test_a_low_rank_weight_is_met_to_the_precision_of_the_branch():
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((64, 4)) @ rng.standard_normal((4, 80))).astype(np.float32)
    # fp16 factors: each product carries a relative error of 2**-11 per factor.
    assert solve(weight, "svdquant", main="int4/g64", branch="fp16", rank=4).weight_error < 2**-10


def test_smoothing_is_undone_by_reconstruct_and_costs_its_bytes():
    rng = np.random.default_rng(4)
    weight = heavy_tailed()
    x = (rng.standard_normal((50, 160)) * np.exp(rng.standard_normal(160))).astype(np.float32)
    solution = solve(weight, "loraq", main="int4/g64", rank=8, activations=x, smooth=0.5)
    assert solution.smooth.shape == (160,)
    assert solution.bytes_by_part["smooth"] == 320
    assert solution.weight_error == pytest.approx(
        error_from_stored_codes(weight, solution), rel=1e-4
    )


def test_a_zero_weight_is_met_exactly():
    solution = solve(np.zeros((8, 16), dtype=np.float32), "loraq", main="int4/g16", rank=2)
    assert solution.weight_error == 0.0


@pytest.mark.parametrize("branch", ["int8/g64", "int6/g64", "int4/g64", "int8/row"])
@pytest.mark.parametrize("shape", [(1152, 1152), (384, 1536), (128, 128), (70, 33)])
def test_budget_rank_is_the_largest_that_fits(branch, shape):
    fmt = parse_format(branch)
    rank = rank_for_budget(*shape, fmt, "fp16@8")
    allowed = 2 * 8 * sum(shape)
    assert branch_bytes(*shape, rank, fmt) <= allowed
    assert rank == min(shape) or branch_bytes(*shape, rank + 1, fmt) > allowed


def test_eight_bit_budget_rank_of_pixart_is_sixty_two():
    assert rank_for_budget(1152, 1152, parse_format("int8/g64"), "fp16@32") == 62


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorq"}, r"unknown method 'lorq'; did you mean 'loraq'"),
        ({"preset": "slow"}, r"unknown preset 'slow'"),
        ({"main": "int4/x"}, r"granularity must be"),
        ({"rank": 97}, r"rank must be an integer from 0 to min\(N, K\) = 96, got 97"),
        ({"rank": -1}, r"got -1"),
        ({"rank": 2.5}, r"got 2.5"),
        ({"rank": 4, "budget": "fp16@4"}, r"give either rank or budget"),
        ({"budget": "fp16"}, r"budget must look like 'fp16@32'"),
        ({"budget": "int2/g64@1", "branch": "fp32"}, r"less than the 1024 bytes of a rank-1"),
        ({"branch": None, "rank": 4}, r"needs a branch format"),
        ({"seed": -1}, r"seed must be an integer from 0, got -1"),
        ({"device": "gpu"}, r"unknown device 'gpu'; did you mean 'cpu'"),
        ({"smooth": 0.5}, r"smoothing by strength needs activations"),
        ({"smooth": np.zeros(160)}, r"smooth factors must be positive .* channel 0 is 0"),
        ({"smooth": np.ones(3)}, r"smooth must have shape \(160,\)"),
        ({"activations": np.ones((4, 3))}, r"activations have K=3, the weight K=160"),
    ],
)
def test_solve_says_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        solve(heavy_tailed(), **options)


def test_solve_refuses_unusable_weights():
    weight = heavy_tailed()
    weight[3, 5] = np.nan
    with pytest.raises(InputError, match=r"weight holds 1 NaN or Inf values; .* nan at \(3, 5\)"):
        solve(weight)
    with pytest.raises(InputError, match=r"weight reaches 1e\+30; beyond 2.81e\+14"):
        solve(np.full((4, 4), 1e30))
    with pytest.raises(InputError, match=r"weight reaches 3e\+14; beyond 2.81e\+14"):
        solve(np.full((4, 4), 3e14))
    with pytest.raises(InputError, match=r"weight must be a non-empty floating 2-D array"):
        solve(np.ones((4, 4), dtype=np.int8))
