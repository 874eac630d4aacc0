"""Rotation, smoothing and the residual input chosen per layer: what suits it, and no harm."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.walk import run_layer
from loraq_sim.solvers import solve

N, K = 96, 128


def _weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)


def _inputs(kind: str, tokens: int = 400) -> np.ndarray:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((tokens, K))
    if kind == "loud channel":
        x[:, 5] *= 60
    elif kind == "loud channels":
        x *= np.exp(rng.normal(0, 1.5, K))
    elif kind == "loud directions":
        x += rng.standard_normal((tokens, 3)) @ rng.standard_normal((3, K)) * 8
    elif kind == "spikes":
        x *= 0.01
        x[rng.integers(tokens, size=600), rng.integers(K, size=600)] += 40
    elif kind == "one-hot":
        x = np.eye(K)[rng.integers(K, size=tokens)] * 3.0
    return x.astype(np.float32)


KINDS = ("plain", "loud channel", "loud channels", "loud directions", "spikes", "one-hot")


def _error(text: str, x: np.ndarray, weight: np.ndarray, **options) -> tuple[float, object]:
    split = lq.parse_split(text)
    solution = solve(
        weight, main=split.main_weight, branch=split.branch_weight, rank=split.rank, preset="fast",
        activations=x[::2], feedback=split.feedback, main_activation=split.main_activation,
        branch_activation=split.branch_activation, main_rule=split.main_rule, **options,
    )  # fmt: skip
    y = run_layer(x[1::2], solution, split, Datapath()).y.astype(np.float64)
    exact = x[1::2].astype(np.float64) @ weight.T
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact)), solution


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["W4A4+W8A8r12", "W4A4~W8A8r12", "W4A4u~W8A8r12", "W4A8~W6A6r12"])
def test_what_is_chosen_is_not_worse_than_nothing_on_rows_it_has_not_seen(split, kind):
    weight, x = _weight(), _inputs(kind)
    plain, _ = _error(split.replace("~", "+"), x, weight)
    chosen, _ = _error(split, x, weight, condition="auto")
    assert chosen <= 1.02 * plain


@pytest.mark.parametrize("kind", ["loud channel", "loud channels", "loud directions"])
def test_what_is_loud_is_quieted(kind):
    weight, x = _weight(), _inputs(kind)
    plain, _ = _error("W4A4+W8A8r12", x, weight)
    chosen, solution = _error("W4A4~W8A8r12", x, weight, condition="auto")
    assert chosen < 0.75 * plain
    done = solution.rotation, solution.smooth is not None, solution.feedback_rank > 0
    assert any(done)


def test_sparse_inputs_are_not_rotated():
    weight, x = _weight(), _inputs("one-hot")
    _, solution = _error("W4A4+W8A8r12", x, weight, condition="auto")
    assert solution.rotation is None


@pytest.mark.parametrize(
    ("activation", "block"),
    [("int4/g64", 128), ("int3/g64", 128), ("int8/g64", None), ("fp16", None)],
)
def test_without_rows_the_formats_decide(activation, block):
    solution = solve(_weight(), rank=8, preset="fast", condition="auto", main_activation=activation)
    assert solution.rotation == block
    assert (solution.smooth is None) == (block is None)


@pytest.mark.parametrize("method", ["rtn", "svdquant", "lqer"])
def test_every_method_may_be_conditioned(method):
    weight, x = _weight(), _inputs("loud channels")
    options = {"rank": 8} if method != "rtn" else {}
    plain = solve(weight, method=method, activations=x, **options)
    chosen = solve(weight, method=method, activations=x, condition="auto", **options)
    split = lq.parse_split("W4A4+W8A8r8")
    exact = x @ weight.T
    errors = [np.linalg.norm(run_layer(x, s, split, Datapath()).y - exact) for s in (plain, chosen)]
    assert errors[1] < errors[0]
    assert chosen.nbytes == plain.nbytes + (0 if chosen.smooth is None else 2 * K)


def test_an_odd_width_has_no_rotation_to_choose():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((8, 33)), rng.standard_normal((50, 33))
    solution = solve(weight, rank=2, activations=x, condition="auto", preset="fast")
    assert solution.rotation is None


def test_the_choice_is_that_of_the_seed():
    weight, x = _weight(), _inputs("loud channels")
    first, second = (_error("W4A4~W8A8r12", x, weight, condition="auto")[1] for _ in range(2))
    np.testing.assert_array_equal(first.main.codes, second.main.codes)
    assert first.feedback_rank == second.feedback_rank
