"""Rotation of input channels, against explicit matrices, and through solver and data path."""

import numpy as np
import pytest
from scipy.linalg import hadamard

from loraq_sim.conditioning import hadamard_block, rotate_channels
from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError
from loraq_sim.solvers import METHODS, solve
from loraq_sim.solvers.solve import DEFLATING
from loraq_sim.split import parse_split


@pytest.mark.parametrize(("k", "block"), [(1152, 128), (5600, 32), (384, 128), (6, 2), (64, 64)])
def test_the_largest_power_of_two_that_divides_k_is_the_block(k, block):
    assert hadamard_block("hadamard", k) == block
    assert hadamard_block("hadamard:2", k) == 2
    assert hadamard_block(None, k) is None


@pytest.mark.parametrize(
    ("rotate", "k", "message"),
    [
        ("hadamard", 33, r"K is odd"),
        ("hadamard:128", 96, r"divides K=96 \(up to 32\), got 128"),
        ("hadamard:12", 96, r"got 12"),
        ("hadamard:0", 96, r"got 0"),
        ("hadamard:", 96, r"'hadamard:BLOCK'"),
        ("haar", 96, r"got 'haar'"),
        (64, 128, r"got 64"),
    ],
)
def test_rotations_that_do_not_exist_are_refused(rotate, k, message):
    with pytest.raises(InputError, match=message):
        hadamard_block(rotate, k)


@pytest.mark.parametrize("block", [2, 8, 32])
def test_rotation_is_a_product_with_the_hadamard_matrix(block):
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    kept = x.copy()
    matrix = np.kron(np.eye(96 // block), hadamard(block)) / np.sqrt(block)
    # log2(block) float32 additions and a product, relative to the largest partial sum.
    tolerance = 8 * np.finfo(np.float32).eps * np.abs(x).max() * np.sqrt(block)
    np.testing.assert_allclose(rotate_channels(x, block), x @ matrix, atol=tolerance)
    np.testing.assert_allclose(rotate_channels(rotate_channels(x, block), block), x, atol=tolerance)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(rotate_channels(2 * x, block), 2 * rotate_channels(x, block))


def outlier_case(k=128):
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((64, k)).astype(np.float32)
    x = rng.standard_normal((48, k)).astype(np.float32)
    x[:, 7] *= 40
    return weight, x


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("svdquant_")])
def test_every_method_returns_the_weight_in_its_own_channels(method):
    weight, x = outlier_case()
    options = {"rank": 8, "preset": "fast", "activations": x, "smooth": 0.5}
    options |= {"feedback": "auto"} if method in DEFLATING else {}
    solution = solve(weight, method, rotate="hadamard:32", **options)
    assert solution.rotation == 32
    # What LRC leaves of quiet directions is little: it serves inputs that are rounded.
    assert solution.weight_error < (0.6 if method == "lrc" else 0.3)
    miss = np.linalg.norm(weight - solution.reconstruct()) / np.linalg.norm(weight)
    # Float32 sums against float64 ones.
    assert solution.weight_error == pytest.approx(miss, rel=1e-5)
    if solution.left is not None:
        seen = solution.diagnose(weight)
        assert seen.max_abs_error == pytest.approx(
            float(np.abs(weight - solution.reconstruct()).max()), rel=1e-3
        )


def test_the_data_path_rotates_activations_which_tames_outliers():
    weight, x = outlier_case()
    split = parse_split("W4A4+W8A8r8")
    wanted = x @ weight.T
    errors = {}
    for rotate in (None, "hadamard"):
        options = {"main": split.main_weight, "branch": split.branch_weight, "rank": 8}
        solution = solve(weight, rotate=rotate, preset="fast", **options)
        y = run_layer(x, solution, split, Datapath(out_format="fp32")).y
        errors[rotate] = np.linalg.norm(y - wanted) / np.linalg.norm(wanted)
    assert errors["hadamard"] < 0.7 * errors[None]
    assert errors[None] < 0.3


def test_tuned_smoothing_and_rotation_do_not_mix():
    weight, x = outlier_case()
    with pytest.raises(InputError, match=r"chooses its smoothing in the channels of the layer"):
        solve(weight, "svdquant_tuned", rank=4, activations=x, rotate="hadamard")


@pytest.mark.parametrize("method", ["loraq", "svdquant", "qera"])
def test_a_learned_branch_rotation_keeps_the_bytes_and_nearly_the_error(method):
    weight, x = outlier_case()
    options = {"branch": "int4/g32", "rank": 8, "preset": "fast", "activations": x}
    plain = solve(weight, method, **options)
    turned = solve(weight, method, branch_rotation="learned", **options)
    assert turned.nbytes == plain.nbytes
    assert turned.right.pack() != plain.right.pack()
    assert turned.weight_error < 1.1 * plain.weight_error
    with pytest.raises(InputError, match=r"branch_rotation must be None or 'learned', got 'x'"):
        solve(weight, method, branch_rotation="x", **options)
