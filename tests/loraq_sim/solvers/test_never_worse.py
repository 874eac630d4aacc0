"""`loraq` against doing nothing: structured weights on which a descent alone makes things worse."""

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers import loraq, solve
from loraq_sim.solvers.main_grid import main_scale_rule

RNG = np.random.default_rng(20)


def normal(*shape):
    return RNG.standard_normal(shape)


def with_outliers(count, size):
    weight = normal(64, 96)
    weight[RNG.integers(0, 64, count), RNG.integers(0, 96, count)] = size
    return weight


def one_row():
    weight = np.zeros((40, 50))
    weight[7] = normal(50)
    return weight


STRUCTURED = {
    "identity": np.eye(64),
    "permutation": np.eye(48)[RNG.permutation(48)],
    "signs": np.sign(normal(64, 48)),
    "ternary": RNG.integers(-1, 2, (48, 64)) * 0.02,
    "symmetric int4 codes": np.rint(np.clip(normal(48, 64) * 3, -7, 7)),
    "all int4 codes": np.rint(np.clip(normal(48, 64) * 3, -8, 7)),
    "int4 codes and two components": np.rint(np.clip(normal(48, 64) * 3, -7, 7))
    + normal(48, 2) @ normal(2, 64),
    "powers of two": np.sign(normal(48, 48)) * 2.0 ** RNG.integers(-4, 1, (48, 48)),
    "20 outliers of 1000": with_outliers(20, 1e3),
    "3 outliers of 50": with_outliers(3, 50.0),
    "zeros": np.zeros((24, 40)),
    "one nonzero": np.pad(np.full((1, 1), 1.7), ((3, 20), (5, 30))),
    "one row": one_row(),
    "one column": one_row().T,
    "constant": np.full((40, 50), 0.3),
    "diagonal": np.diag(normal(48)),
    "blocks": np.kron(np.eye(4), normal(12, 12)),
    "rank 1": np.outer(normal(40), normal(48)),
    "rank 3": normal(40, 3) @ normal(3, 48),
    "huge": normal(32, 40) * 1e10,
    "tiny": normal(32, 40) * 1e-12,
    "n = 1": normal(1, 70),
    "k = 1": normal(70, 1),
    "short last group": normal(30, 77),
    "rows of many sizes": normal(48, 64) * 10 ** RNG.uniform(-3, 3, (48, 1)),
    "heavy tails": RNG.standard_t(2, (48, 64)),
    "heavier tails": RNG.standard_t(1.3, (64, 96)),
    "nearly identity": np.eye(96) + 0.01 * normal(96, 96),
}
FORMATS = [
    ("int4/g64", "int8/g64"),
    ("int4/g64", "int6/g64"),
    ("int4/g32/e4m3", "int4/g32/e4m3"),
    ("int3/row", "int2/g32"),
    ("int4/tensor", "int8/tensor"),
    ("uint4/g64", "fp16"),
    ("mxfp4", "mxfp6_e2m3"),
    ("nvfp4", "nvfp4"),
]


def ranks_of(weight):
    smaller = min(weight.shape)
    return sorted({1, min(8, smaller), smaller})


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize(("main", "branch"), FORMATS, ids=str)
def test_loraq_is_never_worse_than_rounding_or_than_lqer(name, main, branch):
    weight = STRUCTURED[name].astype(np.float32)
    plain = solve(weight, "rtn", main=main).weight_error
    for rank in ranks_of(weight):
        options = {"main": main, "branch": branch, "rank": rank}
        lqer = solve(weight, "lqer", **options).weight_error
        error = solve(weight, "loraq", preset="fast", **options).weight_error
        assert error <= min(plain, lqer), rank


@pytest.mark.parametrize("name", ["identity", "all int4 codes", "20 outliers of 1000", "rank 3"])
def test_loraq_is_never_worse_than_searched_scales_without_a_branch(name):
    weight = STRUCTURED[name].astype(np.float32)
    for main in ("int4/g64", "mxfp4", "int4/tensor"):
        searched = quantize(
            weight, main, rule=main_scale_rule(solve(weight, "rtn", main=main).main.format)
        )
        missed = np.linalg.norm(weight.astype(np.float64) - searched.dequantize())
        error = solve(weight, main=main, rank=8, preset="fast").weight_error
        # The norm is summed in another order here: 4e-16 of it.
        assert error <= missed / np.linalg.norm(weight.astype(np.float64)) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_mixtures_of_structures_are_never_worse_than_doing_nothing(seed):
    rng = np.random.default_rng(seed)
    names = rng.choice([n for n in STRUCTURED if STRUCTURED[n].shape == (48, 64)], 2, replace=False)
    weight = sum(STRUCTURED[n] * 10.0 ** rng.uniform(-2, 1) for n in names).astype(np.float32)
    rank = int(rng.integers(1, 48))
    options = {"main": "int4/g32", "branch": "int6/g32", "rank": rank}
    error = solve(weight, preset="fast", **options).weight_error
    assert error <= solve(weight, "rtn", main="int4/g32").weight_error
    assert error <= solve(weight, "lqer", **options).weight_error


@pytest.mark.parametrize("branch", ["int8/g64", "int6/g64"])
@pytest.mark.parametrize(
    "name",
    [
        "identity",
        "nearly identity",
        "20 outliers of 1000",
        "heavy tails",
        "heavier tails",
        "rank 3",
    ],
)
def test_a_longer_search_is_never_worse(name, branch):
    weight = STRUCTURED[name].astype(np.float32)
    errors = [
        solve(weight, branch=branch, rank=8, preset=preset).weight_error
        for preset in ("best", "balanced", "fast")
    ]
    assert errors == sorted(errors)


def test_the_candidate_that_won_is_in_the_trace():
    weight = STRUCTURED["symmetric int4 codes"].astype(np.float32)
    solution = solve(weight, main="int4/tensor", rank=4, preset="fast")
    assert (solution.weight_error, solution.trace[-1].stage) == (0.0, "rtn")
    assert solution.rank == 4
    assert not solution.left.dequantize().any()


def stored_errors(solution):
    return {entry.stage: entry.weight_error for entry in solution.trace if entry.is_stored}


def test_the_end_is_returned_where_it_is_best():
    solution = solve(normal(64, 96).astype(np.float32), rank=8, preset="fast")
    errors = stored_errors(solution)
    assert errors["end"] < errors["start"]
    assert solution.weight_error == errors["end"]


def test_the_start_is_returned_where_the_descent_got_lost(monkeypatch):
    def lost(left, right, direction, **steps):
        left *= -1

    monkeypatch.setattr(loraq, "descend", lost)
    weight = (normal(64, 8) @ normal(8, 96) + 0.1 * normal(64, 96)).astype(np.float32)
    solution = solve(weight, rank=8, preset="fast")
    errors = stored_errors(solution)
    assert errors["start"] < 0.5 * errors["end"]
    assert solution.weight_error == errors["start"]


@pytest.mark.parametrize("fails", ["runs away", "not finite", "no root"])
def test_a_descent_that_runs_away_leaves_the_factors_as_they_were(fails, monkeypatch):
    def lost(left, right, direction, **steps):
        if fails == "no root":
            raise np.linalg.LinAlgError("Matrix is not positive definite")
        left *= np.float32(1e9 if fails == "runs away" else np.nan)

    monkeypatch.setattr(loraq, "descend", lost)
    solution = solve(normal(48, 64).astype(np.float32), rank=6, preset="fast")
    still = solve(normal(48, 64).astype(np.float32), rank=6, preset="fast", method="svdquant")
    assert stored_errors(solution)["end"] < 1.2 * still.weight_error


@pytest.mark.parametrize("branch", ["int4/tensor", "nvfp4", "int4/g32/e4m3"])
def test_factors_whose_scales_span_rows_pack_to_what_they_are(branch):
    solution = solve(normal(48, 80).astype(np.float32), branch=branch, rank=12, preset="fast")
    for part in (solution.main, solution.left, solution.right):
        read = QuantizedTensor.unpack(part.pack(), part.format, part.shape)
        np.testing.assert_array_equal(read.dequantize(), part.dequantize())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = np.ones((4, 6), dtype=np.float32)
    weight[2, 3] = bad
    with pytest.raises(InputError, match=r"weight holds 1 NaN or Inf values; .* at \(2, 3\)"):
        solve(weight, rank=1)


def test_best_is_balanced_where_its_own_search_got_lost(monkeypatch):
    weight = normal(48, 64).astype(np.float32)
    balanced = solve(weight, rank=6, branch="int6/g32", preset="balanced")
    real = loraq.descend

    def lost(left, right, direction, *, steps, **options):
        # Only the stages of `best` are this long.
        if steps > 60:
            left *= -1
        else:
            real(left, right, direction, steps=steps, **options)

    monkeypatch.setattr(loraq, "descend", lost)
    best = solve(weight, rank=6, branch="int6/g32", preset="best")
    assert best.main.pack() == balanced.main.pack()
    assert best.weight_error == balanced.weight_error


@pytest.mark.parametrize(("rows", "k"), [(128, 192), (160, 96)])
@pytest.mark.parametrize("kind", ["20 outliers of 1000", "nearly identity"])
def test_loraq_is_never_worse_than_loftq_where_rounding_is_what_to_start_from(kind, rows, k):
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((rows, k))
    if kind == "nearly identity":
        weight = np.eye(rows, k) + 0.01 * weight
    else:
        weight[rng.integers(0, rows, 20), rng.integers(0, k, 20)] = 1000.0
    weight = weight.astype(np.float32)
    options = {"main": "int4/g64", "branch": "int8/g64", "rank": 12}
    solution = solve(weight, preset="balanced", **options)
    assert (
        solution.weight_error <= solve(weight, "loftq", preset="balanced", **options).weight_error
    )
    assert any(entry.stage.endswith("after lqer") for entry in solution.trace)
    stored = min(entry.weight_error for entry in solution.trace if entry.is_stored)
    assert solution.weight_error == stored
