"""One row: error and cost of a layer in a split on an accelerator."""

import dataclasses

import numpy as np
import pytest

import hwmodels
import loraq_sim as lq
from loraq_sim.errors import InputError
from loraq_sim.evaluate import reference_output, sample_rows, solve_split
from loraq_sim.machine import cost_split, datapath_for
from loraq_sim.results.rows import COLUMN_NAMES
from loraq_sim.results.wording import labels_of
from loraq_sim.solvers import solve_group
from loraq_sim.split import parse_split


@pytest.fixture(scope="module")
def layer(request):
    dump = lq.read_layer_dump(request.config.rootpath / "examples" / "tiny_pixart.pt")
    return dump["transformer_blocks.0.attn1.to_q"]


def evaluate(layer, split="W4A4+W8A8r8", accelerator="aie2", **options):
    return lq.evaluate_layer(layer, split, accelerator, preset="fast", tokens=32, **options)


def test_a_row_has_the_columns_of_the_schema_and_describes_its_case(layer):
    row = evaluate(layer)
    known = [name for name in COLUMN_NAMES if name in row]
    assert known == list(row)
    assert (row["m"], row["n"], row["k"], row["tokens"]) == (512, 128, 128, 32)
    assert (row["rank"], row["method"], row["split"]) == (8, "loraq", "W4A4+W8A8r8")
    assert row["status"] == "ok"


def test_weight_columns_are_those_of_the_solution(layer):
    row = evaluate(layer)
    solution = lq.solve(
        layer.weight, "loraq", main="int4/g64", branch="int8/g64", rank=8, preset="fast"
    )
    assert row["weight_bytes"] == solution.nbytes
    assert row["weight_error"] == solution.weight_error


def test_what_is_done_to_x_is_in_the_cost_of_the_row(layer):
    plain = evaluate(layer, "W4A4")
    rotated = evaluate(layer, "W4A4", rotate="hadamard:64")
    smoothed = evaluate(layer, "W4A4", smooth=0.5)
    aie2, split = hwmodels.load_accelerator("aie2"), parse_split("W4A4")
    for row, asked in ((rotated, {"rotate": "hadamard:64"}), (smoothed, {"smooth": 0.5})):
        _, cost = cost_split(512, 128, 128, split, aie2, **asked)
        for name in ("latency_s", "energy_j", "dram_bytes", "weight_bytes"):
            assert row[name] == getattr(cost, name), name
            assert row[name] > plain[name] or (name, row) == ("weight_bytes", rotated)


def test_what_a_condition_chose_is_charged_and_named(layer):
    loud = dataclasses.replace(layer, activations=layer.activations.copy())
    loud.activations[:, ::50] *= 30
    plain = evaluate(loud, "W4A4")
    chosen = evaluate(loud, "W4A4", condition="auto")
    assert chosen["output_error"] < 0.8 * plain["output_error"]
    assert (chosen["condition"], chosen["rotation"], chosen["smooth"]) == ("auto", None, None)
    assert "condition auto chose " in chosen["message"]
    words = {"smoothing": {"smooth": 0.5}, "hadamard:128": {"rotate": "hadamard"}}
    asked = {
        k: v for word, how in words.items() if word in chosen["message"] for k, v in how.items()
    }
    assert asked
    _, cost = cost_split(
        512, 128, 128, parse_split("W4A4"), hwmodels.load_accelerator("aie2"), **asked
    )
    assert chosen["latency_s"] == cost.latency_s > plain["latency_s"]
    assert labels_of([plain, chosen]) == ["W4A4", "W4A4 (conditioned auto)"]
    finished = evaluate(loud, "W4A4", finish="data")
    assert labels_of([plain, finished]) == ["W4A4", "W4A4 (finish data)"]


def test_the_working_set_of_a_row_is_that_of_its_call(layer):
    row = evaluate(layer, rows=64)
    # 64 rows of 128 codes of 8 bits with two scales, P of 8 codes and one scale, y in bf16.
    assert row["peak_activation_bytes"] == 64 * (128 + 4) + 64 * (8 + 2) + 64 * 128 * 2
    assert row["working_set_bytes"] == row["peak_activation_bytes"] + row["weight_bytes"]
    assert row["fits_in"] == "l1"


def test_layers_that_share_a_branch_pay_for_it_once(layer):
    split = parse_split("W4A4+W8A8r8")
    weights = {name: layer.weight for name in "qkv"}
    shared = solve_group(
        weights, main="int4/g64", branch="int8/g64", rank=8, preset="fast", share="common"
    )
    rows = [
        lq.evaluate_layer(
            lq.Layer(name=name, weight=layer.weight, activations=layer.activations),
            split, "aie2", tokens=8, solution=solution,
        )
        for name, solution in shared.items()
    ]  # fmt: skip
    aie2 = hwmodels.load_accelerator("aie2")
    _, cost = cost_split(rows[0]["m"], 128, 128, split, aie2, shared_by=3)
    assert {row["latency_s"] for row in rows} == {cost.latency_s}
    stored = sum(row["weight_bytes"] for row in rows)
    one = shared["q"]
    assert stored == 3 * (one.main.nbytes + one.left.nbytes) + one.right.nbytes


@pytest.mark.parametrize("text", ["W4A4", "W4A4+W8A8r8", "W4A8+W6A6@fp16r4", "W8A8+W16A16r4"])
def test_cost_columns_are_those_of_the_cost_model(layer, text):
    row = evaluate(layer, text)
    work, cost = cost_split(512, 128, 128, parse_split(text), hwmodels.load_accelerator("aie2"))
    assert work.rank == row["rank"]
    assert cost.weight_bytes == row["weight_bytes"]
    for name in ("latency_s", "cycles", "energy_j", "dram_bytes", "utilization", "bound"):
        assert row[name] == getattr(cost, name)


@pytest.mark.parametrize("accelerator", ["aie2", "b200"])
@pytest.mark.parametrize("family", ["int", "mxint", "mxfp", "nvfp"])
@pytest.mark.parametrize("text", ["W4A4", "W4A8+W8A8r8", "W4A4+W16A16r8", "W8A8+W4A6r5"])
def test_the_cost_model_counts_the_bytes_the_packer_writes(layer, text, family, accelerator):
    row = evaluate(layer, text, accelerator, family=family)
    hw = hwmodels.load_accelerator(accelerator)
    _, cost = cost_split(512, 128, 128, parse_split(text, family=family), hw)
    assert cost.weight_bytes == row["weight_bytes"]


def test_output_error_compares_with_the_full_precision_layer_with_bias(layer):
    # In 16 bits everywhere, only the roundings to fp16 and to bf16 at the end are left.
    row = evaluate(layer, "W16A16")
    assert 0 < row["output_error"] < 2**-8
    x = layer.activations
    by_hand = np.array([[sum(x[0, k] * layer.weight[5, k] for k in range(128)) + layer.bias[5]]])
    np.testing.assert_allclose(reference_output(layer, x)[:1, 5:6], by_hand, rtol=1e-5)


def test_the_error_is_that_of_the_integer_data_path(layer):
    wide = evaluate(layer, "W8A8")
    narrow = evaluate(layer, "W8A8", datapath={"acc_bits": 14, "overflow": "wrap"})
    assert wide["overflow_count"] == 0
    assert narrow["overflow_count"] > 0
    assert narrow["output_error"] > 10 * wide["output_error"]
    assert narrow["latency_s"] == wide["latency_s"]


def test_same_seed_same_row_and_any_way_to_name_the_accelerator(layer):
    rows = [evaluate(layer), evaluate(layer, accelerator=hwmodels.load_accelerator("xdna1"))]
    for row in rows:
        row.pop("seconds")
    assert rows[0] == rows[1]


def test_a_solution_at_hand_is_used(layer):
    split = parse_split("W4A4+W8A8r8")
    zero = lq.solve(
        np.zeros_like(layer.weight), "svdquant", main="int4/g64", branch="int8/g64", rank=8
    )
    row = evaluate(layer, split, solution=zero)
    assert row["method"] == "svdquant"
    assert row["output_error"] > 0.5


def test_a_layer_without_activations_has_weight_error_and_cost_only(layer):
    bare = lq.Layer(name="bare", weight=layer.weight, rows_per_call=64)
    row = evaluate(bare)
    assert row["m"] == 64
    assert row["tokens"] == 0
    assert row["output_error"] is None
    assert row["weight_error"] > 0
    assert row["latency_s"] > 0
    assert "no activations" in row["message"]


def test_sampled_rows_are_spread_over_all_of_them():
    rows = np.arange(100, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(sample_rows(rows, 4)[:, 0], [0, 25, 50, 75])
    assert sample_rows(rows, 100) is rows
    assert sample_rows(rows, 1000) is rows
    assert sample_rows(None, 3) is None


def test_overrides_replace_what_the_file_says():
    aie2 = hwmodels.load_accelerator("aie2")
    path = datapath_for(aie2, {"acc_bits": 20, "p_format": "fp16", "out_format": "fp32"})
    assert (path.mac.acc_bits, path.p_format, path.out_format) == (20, "fp16", "fp32")
    assert path.mac.overflow == aie2.datapath.overflow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "W4A5r"}, r"split 'W4A5r' is not understood"),
        ({"datapath": {"acc_bit": 20}}, r"unknown datapath setting 'acc_bit'; did you mean"),
        ({"method": "best"}, r"layer 'transformer_blocks.0.attn1.to_q', .* unknown method 'best'"),
        ({"split": "W4A4+W8A8r999"}, r"layer .*split W4A4\+W8A8r999: rank must be"),
        ({"tokens": 0}, r"tokens must be a positive integer, below .*, got 0"),
    ],
)
def test_evaluate_says_what_is_wrong(layer, options, message):
    options = {"split": "W4A4", "accelerator": "aie2"} | options
    with pytest.raises(InputError, match=message):
        lq.evaluate_layer(layer, **options)


def test_scales_at_the_end_of_their_format_are_remarked_on(layer):
    tiny = lq.Layer(name="tiny", weight=layer.weight * np.float32(1e-9))
    assert "scales of main are at an end of the fp16 range" in evaluate(tiny, "W8A8")["message"]
    assert evaluate(layer)["message"] == ""


def test_an_unknown_accelerator_is_named_with_its_neighbors(layer):
    with pytest.raises(hwmodels.AcceleratorError, match=r"aie3.*aie2"):
        evaluate(layer, accelerator="aie3")


@pytest.fixture(scope="module")
def loud():
    """64 x 128 with outputs up to 1e5 and P up to 1.4e5, as diffusion models have them."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((64, 128)) * 0.5).astype(np.float32)
    activations = (rng.standard_normal((32, 128)) * 5000).astype(np.float32)
    return lq.Layer(name="loud", weight=weight, activations=activations)


def test_an_output_beyond_fp16_is_counted_named_and_has_an_infinite_error(loud):
    row = lq.evaluate_layer(loud, "W8A8", "t4", preset="fast")
    exact = loud.activations.astype(np.float64) @ loud.weight.T.astype(np.float64)
    with np.errstate(over="ignore"):
        wild = np.isinf(exact.astype(np.float16))
    # The exact outputs next to the limit lie further from it than what 8 bits change.
    assert row["clipped_count"] == wild.sum() == 32
    first = np.flatnonzero(wild.any(axis=1))[0]
    assert row["first_clipped"] == f"y in fp16, row {first}"
    assert (row["status"], row["output_error"], row["sqnr_db"]) == ("overflow", np.inf, -np.inf)
    assert row["cosine"] is None
    assert (
        f"32 of 2,048 values of y overflow fp16 to infinity (first: row {first})" in row["message"]
    )
    kept = lq.evaluate_layer(loud, "W8A8", "h100", preset="fast")
    assert (kept["status"], kept["clipped_count"], kept["first_clipped"]) == ("ok", 0, None)
    assert kept["output_error"] < 0.02


def test_the_first_row_is_that_of_the_dump_also_in_a_sample(loud):
    row = lq.evaluate_layer(loud, "W8A8", "t4", preset="fast", tokens=5)
    exact = loud.activations.astype(np.float64) @ loud.weight.T.astype(np.float64)
    rows = np.arange(5) * 32 // 5
    first = next(int(index) for index in rows if (np.abs(exact[index]) > 65520).any())
    assert row["first_clipped"] == f"y in fp16, row {first}"


def test_a_kernel_may_clamp_what_the_file_lets_overflow(loud):
    path = {"float_overflow": {"fp16": "saturate"}}
    row = lq.evaluate_layer(loud, "W8A8", "t4", preset="fast", datapath=path)
    assert (row["status"], row["clipped_count"]) == ("ok", 32)
    assert "32 of 2,048 values of y are clamped to the largest fp16" in row["message"]
    assert 0.01 < row["output_error"] < 0.1
    rules = datapath_for(hwmodels.load_accelerator("t4"), path).float_overflow
    assert (rules.fp16, rules.bf16, rules.fp8_e4m3) == ("saturate", "infinity", "saturate")


def test_p_and_scales_beyond_fp16_are_named(loud):
    path = {"p_format": "fp16", "out_format": "bf16"}
    row = lq.evaluate_layer(loud, "W8A8+W8A8r8", "h100", preset="fast", datapath=path)
    assert row["status"] == "overflow"
    assert row["first_clipped"].startswith("P in fp16, row ")
    assert "values of P overflow fp16 to infinity" in row["message"]
    huge = lq.Layer(name="huge", weight=loud.weight, activations=loud.activations * 100)
    row = lq.evaluate_layer(huge, "W4A4", "aie2", preset="fast")
    assert row["first_clipped"].startswith("scales of X_a in fp16, row ")
    assert row["status"] == "overflow"


def test_stored_scales_and_factors_at_their_end_are_counted():
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((16, 32)) * 1e7).astype(np.float32)
    row = lq.evaluate_layer(lq.Layer(name="w", weight=weight), "W2A8", "aie2", preset="fast")
    # Scales are the largest magnitude over 1, beyond fp16 in every group.
    assert row["clipped_count"] == 16
    assert row["first_clipped"] == "stored main"
    assert "16 of 16 scales of main are at an end of the fp16 range" in row["message"]
    wide = lq.Layer(name="w", weight=weight, activations=np.ones((2, 32), np.float32))
    row = lq.evaluate_layer(wide, "W16A16", "aie2", preset="fast")
    assert row["clipped_count"] == (np.abs(weight) >= 65520).sum()
    assert "values of main are clamped to the largest fp16" in row["message"]


def test_zero_points_run_on_the_integer_path_under_their_label(layer):
    split = dataclasses.replace(
        parse_split("W4A4+W8A8r8"), main_activation=lq.parse_format("uint4/g64")
    )
    row = evaluate(layer, split)
    assert row["split"] == "W4A4u+W8A8r8"
    assert (row["arithmetic"], row["message"]) == ("bit exact", "")
    assert row["safe_acc_bits"] is not None
    plain = evaluate(layer)
    assert (plain["arithmetic"], plain["message"]) == ("bit exact", "")


def gelu_layer(rng, k=128):
    """Inputs as GELU leaves them, read by a second layer of a feed-forward part."""
    h = rng.standard_normal((96, k)).astype(np.float32)
    x = (0.5 * h * (1 + np.tanh(0.7978845608 * (h + 0.044715 * h**3)))).astype(np.float32)
    weight = rng.standard_normal((48, k)).astype(np.float32)
    bias = rng.standard_normal(48).astype(np.float32)
    return lq.Layer(name="ff.net.2", kind="ffn_down", weight=weight, bias=bias, activations=x)


def test_grids_for_activations_lower_the_error_and_cost_what_they_cost():
    layer = gelu_layer(np.random.default_rng(0))
    rows = {
        text: lq.evaluate_layer(layer, text, "aie2", preset="fast")
        for text in ("W8A4", "W8A4s", "W8A4u", "W8A4g", "W8A4u8", "W8A16i")
    }
    assert {text: row["split"] for text, row in rows.items()} == {text: text for text in rows}
    assert {row["arithmetic"] for row in rows.values()} == {"bit exact"}
    error = {text: row["output_error"] for text, row in rows.items()}
    assert error["W8A4s"] < error["W8A4"]
    assert error["W8A4u"] < 0.7 * error["W8A4"]
    assert error["W8A4g"] < 0.7 * error["W8A4"]
    assert error["W8A16i"] < 0.2 * error["W8A4"]
    assert "inputs after GELU run as uint4/g64/fp16/z0 of x + 0.171875" in rows["W8A4g"]["message"]
    cycles = {text: row["cycles"] for text, row in rows.items()}
    assert cycles["W8A4s"] == cycles["W8A4"] < min(cycles["W8A4g"], cycles["W8A4u"])
    energy = {text: row["energy_j"] for text, row in rows.items()}
    assert energy["W8A4u8"] < energy["W8A4u"]
    # The 16-bit mode runs at half the rate of the 8-bit one.
    assert cycles["W8A16i"] > cycles["W8A4"]


def test_the_shift_after_gelu_changes_nothing_but_the_grid():
    layer = gelu_layer(np.random.default_rng(1))
    split = lq.parse_split("W8A8g+W8A8r8")
    solution = lq.solve(layer.weight, main="int8/g64", branch="int8/g64", rank=8, preset="fast")
    path = lq.Datapath(out_format="fp32")
    run_split = split.for_layer(layer)
    run = lq.run_layer(layer.activations, solution, run_split, path, bias=layer.bias)
    exact = layer.activations @ solution.reconstruct().T + layer.bias
    assert np.linalg.norm(run.y - exact) < 0.01 * np.linalg.norm(exact)


def test_a_machine_without_a_mode_for_the_codes_says_so():
    layer = gelu_layer(np.random.default_rng(2))
    with pytest.raises(hwmodels.AcceleratorError, match="no MAC mode wide enough for int W8A16i"):
        lq.evaluate_layer(layer, "W8A16i", "h100", preset="fast")
    row = lq.evaluate_layer(layer, "W8A4u", "mi300x", preset="fast")
    assert row["status"] == "ok"


def test_the_first_row_that_is_clipped_is_one_of_the_dump():
    x = np.ones((40, 16), np.float32)
    x[20] = 3e4
    layer = lq.Layer(name="a", weight=np.ones((8, 16), np.float32), activations=x)
    # Rows 0, 10, 20 and 30 run; 16 times 3e4 is beyond fp16 in the third of them.
    row = lq.evaluate_layer(layer, "W8A8", "h100", tokens=4, datapath={"out_format": "fp16"})
    assert row["first_clipped"] == "y in fp16, row 20"
    assert "(first: row 20)" in row["message"]


def test_the_first_overflow_is_that_of_the_main_branch_where_all_overflow():
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(s).astype(np.float32) for s in ((8, 64), (32, 64)))
    layer = lq.Layer(name="a", weight=weight, activations=x)
    narrow = {"acc_bits": 10, "overflow": "saturate"}
    row = lq.evaluate_layer(layer, "W8A8+W8A8r16", "aie2", preset="fast", datapath=narrow)
    assert row["first_overflow"].startswith("main k=")


def test_what_a_zero_point_adds_to_the_stored_weight_is_the_sums_of_its_codes():
    """Cost and row differ by two bytes for each output and group of K, counted by hand."""
    rng = np.random.default_rng(3)
    layer = lq.Layer(
        name="l",
        weight=rng.standard_normal((24, 100)).astype(np.float32),
        activations=rng.standard_normal((8, 100)).astype(np.float32),
    )
    for split, outputs in (("W4A4", 0), ("W4A4u", 24), ("W4A8+W8A8r4", 0), ("W4A4u8", 24)):
        row = lq.evaluate_layer(layer, split, "aie2", preset="fast")
        _, cost = cost_split(8, 24, 100, lq.parse_split(split), hwmodels.load_accelerator("aie2"))
        assert cost.weight_bytes - row["weight_bytes"] == 2 * outputs * 2, split
        assert cost.dram_bytes == row["dram_bytes"], split


def test_patches_of_convolutions_are_not_rotated_unseen(layer):
    split, asked = parse_split("W4A4+W8A8r8"), {"preset": "fast", "condition": "auto"}
    unseen = dataclasses.replace(layer, activations=None)
    assert solve_split(unseen, split, **asked).rotation == 128
    patches = dataclasses.replace(unseen, kind="resblock_conv")
    assert solve_split(patches, split, **asked).rotation is None
    # What is asked for stays, and rows may say otherwise.
    assert solve_split(patches, split, rotate="hadamard:64", **asked).rotation == 64
    seen = [dataclasses.replace(layer, kind=kind) for kind in ("linear", "resblock_conv")]
    assert len({solve_split(each, split, **asked).rotation for each in seen}) == 1
