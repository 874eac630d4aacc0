"""The torch device against the CPU: kernels and one step to rounding, whole solves in distribution.

``torch:cpu`` is the code of ``cuda`` without a GPU; with one, every test here runs on it as well.
"""

import logging

import numpy as np
import pytest
import torch

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.kernels.quantize import range_direction
from loraq_sim.solvers import METHODS, SharedStages, solve
from loraq_sim.solvers import torch_directions as on_torch
from loraq_sim.solvers.low_rank import CPU, balanced_factors, descend, truncated_svd
from loraq_sim.solvers.main_grid import MainGrid
from loraq_sim.solvers.problem import find_device
from loraq_sim.solvers.solve import DEFLATING
from loraq_sim.solvers.torch_directions import TorchDevice

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"
)
DEVICES = ["torch:cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
MAINS = ["int4/g64", "int4/g48", "int3/row", "int4/tensor", "mxint4", "mxfp4", "nvfp4"]
EPS = 2.0**-23


@pytest.fixture(params=DEVICES)
def device(request):
    return find_device(request.param)


def heavy_tailed(seed=0, shape=(96, 176)):
    rng = np.random.default_rng(seed)
    columns = np.exp(0.3 * rng.standard_normal(shape[1]))
    return (rng.standard_t(6, size=shape) * columns).astype(np.float32)


def factors_of(weight, rank=12):
    return balanced_factors(*truncated_svd(weight, rank, rng=np.random.default_rng(1)))


def grid_of(main, weight):
    return MainGrid(parse_format(main), weight.shape)


@pytest.fixture
def small_blocks(monkeypatch):
    """A few rows a block, the last one short."""
    monkeypatch.setattr(on_torch, "_BLOCK_ELEMENTS", 7 * 176 + 1)


# ---------------------------------------------------------------- kernels


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("group", [16, 48, 64, 176])
@pytest.mark.parametrize("doublings", [3, 4, 5])
@pytest.mark.parametrize("offset", [0.0, 1 / 32])
def test_range_direction_agrees_with_the_kernel(device, group, doublings, offset):
    weight, product = heavy_tailed(), 0.3 * heavy_tailed(1)
    product[3] = weight[3]  # Groups of which nothing is left.
    expected = product.copy()
    range_direction(weight, expected, group, doublings, np.float32(offset))
    actual = torch.from_numpy(product.copy()).to(device.put(weight).device)
    on_torch.range_direction(device.put(weight), actual, group, doublings, offset)
    # Elements are the same float32 operations but for the sum of the group, which is off by at
    # most n * eps / 2 in either order and enters to a power between -1 and 0; four more roundings.
    largest = np.abs(expected).max()
    np.testing.assert_allclose(
        device.get(actual), expected, rtol=(group + 8) * EPS, atol=EPS * largest * 2.0**-20
    )
    np.testing.assert_array_equal(device.get(actual)[3], 0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("main", MAINS)
def test_rounding_leaves_what_the_kernel_leaves(device, main):
    weight, product = heavy_tailed(), 0.3 * heavy_tailed(1)
    weight[5] = product[5]  # A row that never gets a scale,
    grid, group = grid_of(main, weight), grid_of(main, weight).rows(weight)[1]
    scales = device.put(grid.scales.reshape(len(grid.rows(weight)[0]), -1).copy())
    for step in range(6):
        moved = product * np.float32(1 - 0.01 * step)
        moved[5] = product[5]
        if step == 2:
            moved[6] += weight[6]  # and one that changes between fresh scales.
        left = moved.copy()
        norm = grid.leave(weight, left, step)
        rows = [device.put(grid.rows(values)[0].copy()) for values in (weight, moved)]
        square = on_torch.round_residual(*rows, group, grid, step, scales)
        ours, theirs = device.get(scales), grid.scales.reshape(scales.shape)
        # Two scales of equal error to rounding may swap: none of these groups has such a pair.
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(device.get(rows[1]).reshape(left.shape), left)
        # float32 sums over a group in two orders, each off by at most n * eps / 2; then float64.
        assert float(square) == pytest.approx(norm**2, rel=(group + 2) * EPS)


def test_a_group_without_a_scale_gets_one_at_any_step(device):
    weight, nothing = heavy_tailed(), np.zeros((96, 176), dtype=np.float32)
    grid = grid_of("int4/g64", weight)
    scales = torch.zeros((96, 3), device=device.put(weight).device)
    on_torch.round_residual(device.put(weight), device.put(nothing), 64, grid, 1, scales)
    assert bool((scales > 0).all())


@pytest.mark.parametrize("value", [2.0**-3, np.nextafter(np.float32(2.0**-3), np.float32(1)), 0.7])
def test_fresh_powers_of_two_are_the_next_ones_up(device, value):
    v = device.put(np.array([[[value, -value / 2, 0]]], dtype=np.float32))
    scale = float(on_torch._fresh_scales(v, 1.0, True))
    assert np.frexp(scale)[0] == 0.5
    assert scale / 2 < value <= scale


# ---------------------------------------------------------------- one step, one factorization


def descended(device, main, stage, steps):
    weight = heavy_tailed(2)
    grid = grid_of(main, weight)
    with device.working():
        left, right = (device.put(factor.copy()) for factor in factors_of(weight))
        directions = device.directions(weight, grid, holds=stage.startswith("held"))

        def flatten(left, right, step):
            return directions.flatten(left, right, 3)

        stride = 0.05 * directions.distance(left, right) / np.sqrt(12)
        direction = flatten if stage.endswith("flatten") else directions.leave
        descend(left, right, direction, steps=steps, stride=stride)
        norms = directions.finish()
        return device.get(left) @ device.get(right), norms, grid.scales


@pytest.mark.parametrize(
    ("stage", "main"),
    [
        *(("flatten", "int4/g48"), ("held flatten", "int4/g48"), ("held leave", "int4/g48")),
        *(("leave", main) for main in MAINS),
    ],
)
def test_one_step_of_a_descent_agrees(device, stage, main):
    expected, norms, scales = descended(CPU, main, stage, 1)
    actual, device_norms, device_scales = descended(device, main, stage, 1)
    # Measured: 7e-8. Where a value lies within rounding of a tie, its code may flip: that moves D
    # by one step of the grid, 1/37 of ||D|| = sqrt(96 * 176 / 12) steps, and the step of P, 5 % of
    # what is left, by about as large a share. A wrong direction would be off by those 5 %.
    assert np.linalg.norm(actual - expected) <= 0.05 / 37 * np.linalg.norm(expected)
    np.testing.assert_allclose(device_norms, norms, rtol=1e-4)
    assert np.mean(np.abs(device_scales - scales) > 1e-4 * np.abs(scales)) <= 0.01


def test_truncated_svd_agrees(device):
    weight = heavy_tailed(3)
    expected = truncated_svd(weight, 12, rng=np.random.default_rng(4))
    actual = truncated_svd(weight, 12, rng=np.random.default_rng(4), device=device)
    # The same sketch: what is left of subspace iteration differs by the rounding of the products
    # times the condition of the sketch (about 10): 100 eps sqrt(K) at most.
    distance = np.linalg.norm(actual[0] @ actual[1] - expected[0] @ expected[1])
    assert distance <= 100 * np.sqrt(176) * EPS * np.linalg.norm(weight)
    assert actual[0].dtype == actual[1].dtype == np.float32


# ---------------------------------------------------------------- whole solves


@pytest.mark.parametrize("branch", ["int8/g32", "int4/g16"])
@pytest.mark.parametrize("main", ["int4/g64", "int4/g48", "mxint4", "mxfp4", "nvfp4", "uint4/g64"])
def test_loraq_ends_as_close_as_on_the_cpu(device, main, branch):
    weight = heavy_tailed(5, (200, 352))
    options = {"main": main, "branch": branch, "rank": 24, "preset": "fast"}
    expected = solve(weight, **options)
    actual = solve(weight, **options, device=device.name)
    # A flipped code grows over the steps, so errors agree as those of weights that differ by their
    # rounding do. Over six such weights the error of either device has a standard deviation of at
    # most 0.21 % (8-bit branch) and 0.32 % (4-bit) and the means differ by at most 0.25 %; of three
    # bundled and two larger layers the devices differ by 0.9 % and 2.0 % at most, the CPU from
    # itself by 1.4 %. Five standard deviations of a difference (sqrt(2) of one) are allowed.
    allowed = {"int8/g32": 0.015, "int4/g16": 0.023}[branch]
    assert actual.weight_error == pytest.approx(expected.weight_error, rel=allowed)
    left = np.linalg.norm(weight - actual.reconstruct()) / np.linalg.norm(weight)
    # Reported on the CPU from what is stored, wherever it was found; float32 against float64.
    assert actual.weight_error == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("loraq", "rtn")])
def test_other_methods_take_their_factorization_from_the_device(device, method):
    weight = heavy_tailed(6)
    x = np.random.default_rng(7).standard_normal((80, 176)).astype(np.float32)
    options = {"rank": 12, "preset": "fast", "activations": x}
    options |= {"feedback": "auto"} if method in DEFLATING else {}
    expected = solve(weight, method, **options)
    actual = solve(weight, method, **options, device=device.name)
    # Few roundings, so few flips: 1.3e-3 at most over three weights (svdquant_tuned, which stops
    # where its error first rises), 3e-4 for the others; times four.
    assert actual.weight_error == pytest.approx(expected.weight_error, rel=5e-3)


def test_rank_zero_is_the_same_bytes_on_any_device(device):
    weight = heavy_tailed(8)
    expected, actual = (solve(weight, rank=0, device=name) for name in ("cpu", device.name))
    assert actual.main.pack() == expected.main.pack()


def test_equal_seeds_give_equal_bytes_and_the_weight_is_left_alone(device):
    weight = heavy_tailed(9)
    kept = weight.copy()
    weight.flags.writeable = False
    first, second = (solve(weight, rank=12, preset="fast", device=device.name) for _ in range(2))
    np.testing.assert_array_equal(weight, kept)
    for part in ("main", "left", "right"):
        assert getattr(first, part).pack() == getattr(second, part).pack()


def test_the_trace_says_where_refining_ran(device, caplog):
    caplog.set_level(logging.INFO, logger="loraq_sim.solvers.loraq")
    weight = heavy_tailed(10)
    for main, where in (("int4/g64", device.name), ("uint4/g64", "cpu"), ("mxfp6_e2m3", "cpu")):
        caplog.clear()
        trace = solve(weight, main=main, rank=12, preset="fast", device=device.name).trace
        assert {e.device for e in trace if e.stage == "refine"} == {where}
        assert {e.device for e in trace if e.is_stored} == {"cpu"}
        assert ("cannot round" in caplog.text) == (where == "cpu")


def test_shared_stages_are_kept_apart_by_device(device):
    weight, shared = heavy_tailed(11), SharedStages()
    options = {"rank": 12, "preset": "fast"}
    solve(weight, **options, shared=shared)
    mixed = solve(weight, **options, shared=shared, device=device.name)
    alone = solve(weight, **options, device=device.name)
    assert mixed.main.pack() == alone.main.pack()
    assert device.name in {entry.device for entry in mixed.trace}


# ---------------------------------------------------------------- the caller's settings


def precision():
    return torch.get_float32_matmul_precision()


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_matmul_precision_holds_inside_only(device, chosen):
    before = precision()
    try:
        torch.set_float32_matmul_precision(chosen)
        with device.working():
            assert torch.backends.cuda.matmul.allow_tf32 is False
        assert precision() == chosen
        with pytest.raises(KeyError), device.working():
            raise KeyError
        assert precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="from torch 2.9"
)
def test_precision_of_one_backend_holds_inside_only(device):
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        with device.working():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_autocast_and_default_dtype_of_the_caller_change_nothing(device):
    weight = heavy_tailed(12)
    options = {"rank": 12, "preset": "fast", "device": device.name}
    expected = solve(weight, **options)
    kept = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast(device.put(weight).device.type, dtype=torch.bfloat16):
            actual = solve(weight, **options)
    finally:
        torch.set_default_dtype(kept)
    assert actual.main.pack() == expected.main.pack()


def test_a_full_memory_is_an_input_error(device):
    with pytest.raises(InputError, match=r"ran out of memory: .*device='cpu'"), device.working():
        raise torch.OutOfMemoryError("CUDA out of memory")


# ---------------------------------------------------------------- names


def test_cuda_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"torch.cuda.is_available\(\) is False.*device='cpu'"):
        solve(heavy_tailed(), rank=4, device="cuda")


def test_cuda_out_of_range_names_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"'cuda:7' is not here: torch sees cuda:0, cuda:1;"):
        find_device("cuda:7")
    assert find_device("cuda:1").name == "cuda:1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cud", "unknown device 'cud'; did you mean 'cuda'"),
        ("CPU", "did you mean 'cpu'"),
        ("cuda:-1", "unknown device 'cuda:-1'"),
        ("mps", "Known: cpu, cuda, cuda:0"),
        (None, "unknown device 'None'"),
    ],
)
def test_unknown_devices_get_a_suggestion(name, message):
    with pytest.raises(InputError, match=message):
        solve(heavy_tailed(), rank=4, device=name)


def test_a_torch_device_is_a_name_too():
    assert find_device(torch.device("cpu")) is CPU
    assert isinstance(find_device("torch:cpu"), TorchDevice)
