"""Smoothing and rotation that are chosen: rules without data, comparisons with data."""

from pathlib import Path

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.conditioning import balanced_smoothing, rotate_channels
from loraq_sim.errors import InputError
from loraq_sim.quantizers import quantize
from loraq_sim.solvers import solve

EXAMPLES = Path(__file__).parents[3] / "examples"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_loud_channels(tokens=200, k=128, seed=1):
    x = normal(tokens, k, seed=seed)
    x[:, ::40] *= 25
    return x


def output_error(weight, solution, x, bits=4):
    scaled, entering = weight, x
    if solution.smooth is not None:
        scaled, entering = weight * solution.smooth, x / solution.smooth
    if solution.rotation is not None:
        scaled = rotate_channels(scaled, solution.rotation)
        entering = rotate_channels(entering, solution.rotation)
    rounded, wide = (quantize(entering, f"int{b}/g64").dequantize() for b in (bits, 8))
    p = quantize(wide @ solution.right.dequantize().T, "int8/g64").dequantize()
    y = rounded @ solution.main.dequantize().T + p @ solution.left.dequantize().T
    return np.linalg.norm(y - x @ weight.T)


OPTIONS = {"rank": 8, "branch": "int8/g64", "preset": "fast"}


def test_balanced_smoothing_makes_the_product_of_both_sums_least():
    weight = normal(40, 24) * np.linspace(0.5, 3, 24, dtype=np.float32)
    x = normal(90, 24, seed=1) * np.linspace(4, 1, 24, dtype=np.float32)
    factors = balanced_smoothing(weight, x).astype(np.float64)

    def product(s):
        return np.square(x / s).sum() * np.square(weight * s).sum()

    # By Cauchy and Schwarz no factors give less than (sum_k rms x_k rms w_k)^2; float16 ones are
    # off by 2**-11 each.
    bound = (np.linalg.norm(x, axis=0) * np.linalg.norm(weight, axis=0)).sum() ** 2
    assert bound <= product(factors) * (1 + 1e-6)
    assert product(factors) <= bound * (1 + 1e-5)
    assert product(factors) < product(np.ones(24))
    assert np.exp(np.log(factors).mean()) == pytest.approx(1, rel=1e-3)


def test_most_channels_may_have_been_silent():
    weight, x = normal(40, 24), normal(90, 24, seed=1)
    x[:, :16] = 0
    factors = balanced_smoothing(weight, x)
    assert factors[:16].min() > 0.3 * np.median(factors[16:])


@pytest.mark.parametrize("condition", ["auto", "rms"])
def test_channels_that_were_quiet_may_get_loud(condition):
    """What an activation function kept near zero in the rows seen is not amplified without end."""
    weight, x = normal(96, 128), with_loud_channels(400)
    seen, later = x[::2].copy(), x[1::2]
    seen[:, 5::16] *= 1e-3
    how = OPTIONS | {"activations": seen, "main_activation": "int8/g64"}
    plain, chosen = (solve(weight, condition=name, **how) for name in (None, condition))
    assert chosen.smooth is not None
    assert chosen.smooth[5::16].min() > 0.3 * np.median(chosen.smooth)
    errors = [output_error(weight, each, later, 8) for each in (chosen, plain)]
    assert errors[0] < 1.3 * errors[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_auto_chooses_is_better_on_unseen_rows_than_nothing(bits):
    weight, x = normal(96, 128), with_loud_channels(400)
    how = OPTIONS | {"activations": x[::2], "main_activation": f"int{bits}/g64"}
    plain, chosen = (solve(weight, condition=name, **how) for name in (None, "auto"))
    gain = output_error(weight, chosen, x[1::2], bits) / output_error(weight, plain, x[1::2], bits)
    assert gain < 0.8
    assert chosen.smooth is not None or chosen.rotation is not None


def test_auto_leaves_alone_what_nothing_helps():
    # Uniform values fill their grid: a rotation only makes tails.
    rng = np.random.default_rng(3)
    weight, x = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((96, 128), (400, 128)))
    solution = solve(weight, condition="auto", activations=x, **OPTIONS)
    assert (solution.smooth, solution.rotation) == (None, None)


def test_auto_does_not_rotate_where_a_rotation_does_harm():
    # One group holds all that is loud: turned, it is in every group.
    weight, x = normal(96, 128), normal(400, 128, seed=1)
    x[:, 64:] *= 0.01
    weight[:, 64:] *= 100
    solution = solve(weight, condition="auto", activations=x, **OPTIONS)
    assert solution.rotation is None or solution.smooth is not None
    plain = solve(weight, activations=x, **OPTIONS)
    assert output_error(weight, solution, x) <= 1.02 * output_error(weight, plain, x)


@pytest.mark.parametrize(
    ("k", "activation", "rotation"),
    [
        (128, "int4/g64", 128),
        (96, "int4/g64", 32),
        (100, "int4/g64", None),
        (128, "int8/g64", None),
    ],
)
def test_without_data_inputs_of_four_bits_are_rotated(k, activation, rotation):
    weight = normal(64, k)
    weight[:, ::4] *= 8
    options = {"condition": "auto", "main_activation": activation, **OPTIONS}
    solution = solve(weight, **options)
    assert solution.rotation == rotation
    if activation == "int8/g64":
        assert solution.smooth is None
    else:
        # As if all inputs were equally loud: columns that are large get smaller.
        assert solution.smooth[::4].max() < 0.7 * solution.smooth[1::4].min()
    assert solve(weight, excluded=("smooth",), **options).smooth is None


def test_what_is_given_stays():
    weight, x = normal(96, 128), with_loud_channels()
    given = {"activations": x, **OPTIONS}
    assert solve(weight, condition="auto", rotate="hadamard:16", **given).rotation == 16
    factors = np.linspace(0.5, 2, 128, dtype=np.float32).astype(np.float16)
    for condition in ("auto", "rms"):
        solution = solve(weight, condition=condition, smooth=factors, **given)
        np.testing.assert_array_equal(solution.smooth, factors)
    np.testing.assert_array_equal(
        solve(weight, condition="rms", **given).smooth, balanced_smoothing(weight, x)
    )


def test_conditions_that_cannot_be_met_are_one_line():
    with pytest.raises(InputError, match="condition='rms' .* pass activations=, or use rotate="):
        solve(normal(8, 16), condition="rms")
    with pytest.raises(InputError, match="unknown condition 'rmse'; did you mean 'rms'"):
        solve(normal(8, 16), condition="rmse")


# Codes of each grid that the two others do not hold: chosen by the error of the output alone.
CODES = {"": np.arange(-7, 8), "s": np.arange(-8, 8), "u": np.arange(0, 16)}


def on_grid(letter, tokens=128, k=64):
    """Inputs whose every group of 64 holds all codes of one grid of 4 bits."""
    rng = np.random.default_rng(4)
    codes = np.resize(CODES[letter], k)
    return np.stack([rng.permutation(codes) for _ in range(tokens)]).astype(np.float32) * 0.37


@pytest.mark.parametrize("letter", list(CODES))
def test_a_grid_that_is_left_open_is_the_one_that_holds_the_inputs(letter):
    options = OPTIONS | {"activations": on_grid(letter), "main_rule": "auto"}
    solution = solve(normal(96, 64), condition="auto", **options)
    assert (solution.grid, solution.rotation, solution.smooth) == (letter, None, None)
    # Nobody chose it where the caller says it.
    assert solve(normal(96, 64), **OPTIONS, condition="auto").grid is None


def test_what_a_machine_lacks_is_not_chosen():
    weight, x = normal(96, 128), with_loud_channels(400)
    how = OPTIONS | {"activations": x, "main_rule": "auto"}
    free = solve(weight, condition="auto", **how)
    assert (free.rotation, free.grid) == (128, "u")
    unturned = solve(weight, condition="auto", **how, excluded=("hadamard",))
    assert unturned.rotation is None
    assert unturned.smooth is not None
    bare = solve(weight, condition="auto", **how, excluded=("hadamard", "smooth", "zero_points"))
    assert (bare.rotation, bare.smooth) == (None, None)
    assert bare.grid in ("", "s")
    without_data = OPTIONS | {"main_rule": "auto", "condition": "auto"}
    assert solve(weight, **without_data).grid == "u"
    bare = solve(weight, **without_data, excluded=("hadamard", "zero_points"))
    assert (bare.rotation, bare.grid) == (None, "s")


def test_a_grid_cannot_be_chosen_by_nobody_or_of_nothing():
    with pytest.raises(InputError, match="who chooses the grid .* Give condition='auto', or write"):
        solve(normal(8, 16), main_rule="auto")
    with pytest.raises(InputError, match="left open for symmetric integers, got mxfp4"):
        solve(normal(8, 32), main_rule="auto", condition="auto", main_activation="mxfp4")
    with pytest.raises(InputError, match="unknown choice of a condition 'hadamart'; did you mean"):
        solve(normal(8, 16), condition="auto", excluded=("hadamart",))


@pytest.mark.parametrize("is_known", [True, False])
def test_four_bit_inputs_keep_what_the_main_branch_rounds_small(is_known):
    weight = normal(96, 24) * np.linspace(3, 0.1, 24, dtype=np.float32) @ normal(24, 128, seed=1)
    weight += 0.3 * normal(96, 128, seed=2)
    x = np.random.default_rng(5).standard_normal((400, 128)).astype(np.float32)
    how = OPTIONS | {"activations": x[::2] if is_known else None, "rotate": "hadamard"}
    how |= {"smooth": np.ones(128), "preset": "balanced"}
    both = [solve(weight, **how, condition=condition) for condition in (None, "auto")]
    plain, chosen = (output_error(weight, solution, x[1::2]) for solution in both)
    assert chosen < 0.97 * plain
    # At the cost of the weight alone, and by less that inputs are multiplied with.
    assert both[1].weight_error > both[0].weight_error
    rounded = [np.linalg.norm(solution.main.dequantize()) for solution in both]
    assert rounded[1] < 0.98 * rounded[0]
    # Eight bits lose little of inputs: there the weight decides.
    eight = how | {"main_activation": "int8/g64"}
    same = [solve(weight, **eight, condition=condition) for condition in (None, "auto")]
    assert same[0].main.pack() == same[1].main.pack()


def test_a_residual_input_that_is_not_worth_it_leaves_the_other_choices_alone():
    layer = lq.read_layer_dump(EXAMPLES / "tiny_pixart.pt")["transformer_blocks.0.attn2.to_v"]
    how = {"activations": layer.activations[::2], "condition": "auto", "preset": "fast"}
    how |= {"main_activation": "uint4/g64", "branch": "int4/g64", "branch_activation": "int8/g64"}
    how |= {"budget": "fp16@4"}
    without, may_have = (solve(layer.weight, feedback=each, **how) for each in (None, "auto"))
    assert may_have.feedback is None
    assert may_have.rotation == without.rotation
    np.testing.assert_array_equal(may_have.smooth, without.smooth)
    assert may_have.main.pack() == without.main.pack()


def test_smoothing_balances_what_the_branch_leaves_of_integers_and_all_of_floats():
    weight, x = normal(96, 128), normal(256, 128, seed=1)
    # Loud channels of the weight, which few components carry: the main branch is rid of them.
    weight[:, :4] *= 20
    x *= np.exp(normal(1, 128, seed=2))
    options = {"condition": "auto", "activations": x, **OPTIONS}
    allowed = 2 * np.median(balanced_smoothing(weight, x)[:4])
    found = {
        inputs: solve(weight, main_activation=inputs, rotate="hadamard", **options).smooth
        for inputs in ("int4/g64", "mxfp4")
    }
    assert np.median(found["int4/g64"][:4]) > allowed
    assert found["mxfp4"] is None or np.median(found["mxfp4"][:4]) < allowed
