"""Kernel families: which one runs a layer, what it changes, how far it is trusted."""

import pytest

from hwmodels import (
    AcceleratorError,
    GemmWorkload,
    cross_validate,
    estimate_cost,
    family_text,
    fit_family,
    fitted_family,
    load_accelerator,
    measured_rows,
    with_overrides,
)
from hwmodels.families import family_named, machine_under, serving_families
from hwmodels.loader import SHIPPED

T4, H100, AIE2P = (load_accelerator(name) for name in ("t4", "h100", "aie2p"))
INT8 = {"main": "W8A8", "group": None, "scale_bits": 0}


def _gemm(m, n, k, **fields):
    return GemmWorkload(m=m, n=n, k=k, **(INT8 | fields))


def test_a_layer_runs_in_the_family_that_serves_its_mode():
    assert estimate_cost(_gemm(64, 4096, 4096), T4).kernel == "cutlass_scaled"
    assert estimate_cost(_gemm(64, 4096, 4096, main="W16A16"), T4).kernel == "cublas"
    # Of families for few rows and for all the faster one counts.
    few = _gemm(1, 4096, 4096, main="W16A16")
    named = [estimate_cost(few, AIE2P, kernel=f) for f in ("gemv", "iron_whole_array")]
    assert estimate_cost(few, AIE2P).latency_s == min(cost.latency_s for cost in named)


def test_a_family_asked_for_by_name_runs_and_an_unknown_one_is_refused():
    work = _gemm(2048, 2048, 2048, main="W16A16")
    by_name = {
        name: estimate_cost(work, AIE2P, kernel=name).latency_s
        for name in ("iron_whole_array", "mlir_air", "iron_gemm")
    }
    assert len(set(by_name.values())) == 3
    with pytest.raises(AcceleratorError, match="no kernel family 'mlir_aie'; did you mean"):
        estimate_cost(work, AIE2P, kernel="mlir_aie")
    with pytest.raises(AcceleratorError, match="no kernel family 'x'; its file lists none"):
        estimate_cost(work, load_accelerator("systolic"), kernel="x")


@pytest.mark.parametrize(
    ("work", "confidence"),
    [
        (_gemm(64, 4096, 4096), "measured"),
        (_gemm(4096, 4096, 4096), "extrapolated"),  # Its rows have at most 128 rows.
        (_gemm(64, 4096, 4096, main="W4A4"), "extrapolated"),  # Rows are of int8.
        (_gemm(64, 4096, 4096, branch="W16A16", rank=16), "extrapolated"),
    ],
)
def test_confidence_is_what_the_rows_carry(work, confidence):
    cost = estimate_cost(work, T4)
    family = family_named(T4, cost.kernel)
    assert cost.confidence == confidence
    spread = family.worst_error if confidence == "measured" else max(0.3, 2 * family.worst_error)
    assert cost.latency_high_s == pytest.approx(cost.latency_s * (1 + spread), rel=1e-12)
    assert cost.roofline_latency_s <= cost.latency_low_s < cost.latency_s


def test_without_rows_a_cost_is_assumed():
    cost = estimate_cost(_gemm(64, 4096, 4096), load_accelerator("h200"))
    assert (cost.confidence, cost.mean_error, cost.worst_error) == ("assumed", None, None)
    assert cost.latency_high_s == pytest.approx(1.5 * cost.latency_s, rel=1e-12)
    assert estimate_cost(_gemm(64, 64, 64), load_accelerator("systolic")).kernel == "generic"


def test_bytes_and_energy_of_macs_do_not_hang_on_the_family():
    work = _gemm(2048, 2048, 2048, main="W16A16")
    costs = [estimate_cost(work, AIE2P, kernel=f) for f in ("iron_whole_array", "mlir_air")]
    assert costs[0].dram_bytes == costs[1].dram_bytes
    assert costs[0].parts["energy_j"]["mac_main"] == costs[1].parts["energy_j"]["mac_main"]
    assert costs[0].modes == costs[1].modes


def _with(hw, **values):
    """The bare chip, no library's kernels on it, with some keys of `kernel` changed."""
    bare = hw.model_copy(update={"kernels": ()})
    return with_overrides(bare, {f"kernel.{key}": value for key, value in values.items()})


def test_overlap_goes_from_the_larger_to_the_sum():
    work = _gemm(64, 4096, 4096)
    latency = {f: estimate_cost(work, _with(T4, overlap_fraction=f)).latency_s for f in (0, 0.5, 1)}
    assert latency[0.5] == pytest.approx((latency[0] + latency[1]) / 2, rel=0.02)
    cost = estimate_cost(work, _with(T4, overlap_fraction=0))
    busy, parts = cost.busy_s, cost.parts["latency_s"]
    memory = max(busy["l1"], busy["l2"], busy["dram"])
    outside = parts["fill"] + parts["dispatch"]
    assert cost.latency_s == pytest.approx(busy["compute"] + memory + outside, rel=1e-12)


def test_cutting_the_depth_helps_where_tiles_are_few_and_costs_nothing_elsewhere():
    few, many = _gemm(64, 256, 65536), _gemm(8192, 8192, 1024)
    whole, cut = (_with(H100, split_k_max=parts) for parts in (1, 16))
    assert estimate_cost(few, cut).latency_s < 0.5 * estimate_cost(few, whole).latency_s
    assert estimate_cost(many, cut).latency_s <= estimate_cost(many, whole).latency_s
    assert estimate_cost(many, cut).latency_s >= 0.9 * estimate_cost(many, whole).latency_s
    even = _with(H100, balance="stream_k", split_k_max=16)
    assert estimate_cost(few, even).latency_s < 0.5 * estimate_cost(few, whole).latency_s


def test_rows_of_y_may_lie_along_either_axis_of_an_array():
    # 64 columns are 8 for each of 8 units, half a register block, but whole blocks for 4.
    work = _gemm(4096, 64, 4096)
    by_axis = {
        axis: estimate_cost(work, _with(AIE2P, m_axis=axis)).latency_s
        for axis in ("rows", "columns", "either")
    }
    assert by_axis["columns"] < by_axis["rows"]
    assert by_axis["either"] == min(by_axis.values())


def test_a_second_pass_over_y_is_charged_unless_y_is_wide_already():
    work = _gemm(4096, 4096, 512, main="W16A16")
    inside, again = (_with(AIE2P, output_cast=how) for how in ("inside", "second_pass"))
    more = estimate_cost(work, again).latency_s - estimate_cost(work, inside).latency_s
    assert more == pytest.approx(100e-6 + 4096 * 4096 * 8 / 70e9, rel=1e-9)
    wide = _gemm(4096, 4096, 512, main="W16A16", out_bits=32)
    assert estimate_cost(wide, again).latency_s == estimate_cost(wide, inside).latency_s


def test_what_l2_holds_is_the_state_of_the_call():
    small, large = _gemm(16, 2048, 2048), _gemm(16, 65536, 8192)
    times = {
        state: [estimate_cost(work, H100, weights=state).latency_s for work in (small, large)]
        for state in ("cold", "warm", "flushed")
    }
    assert times["warm"][0] < times["cold"][0] < times["flushed"][0]
    assert times["warm"][1] == times["cold"][1]  # 512 MiB are beyond any L2.
    with pytest.raises(AcceleratorError, match="weights='hot' must be one of cold, warm, flushed"):
        estimate_cost(small, H100, weights="hot")


def test_a_graph_launches_for_what_the_file_says():
    hw = H100.model_copy(
        update={"dispatch": H100.dispatch.model_copy(update={"graph_launch_s": 1e-6})}
    )
    costs = [estimate_cost(_gemm(64, 64, 64), hw, launch=how) for how in ("stream", "graph")]
    assert costs[0].latency_s - costs[1].latency_s == pytest.approx(2e-6, rel=1e-9)


def test_a_change_of_a_key_is_meant_for_every_family():
    changed = with_overrides(T4, {"memories.dram.sustained_fraction": 0.5})
    for family in (*T4.kernels, None):
        under = machine_under(changed, family and family_named(changed, family.name))
        assert under.memories.dram.sustained_fraction == 0.5
    one = with_overrides(T4, {"kernels.cublas.modes.fp16.sustained_fraction": 0.5})
    rates = [machine_under(one, f).modes[-1].sustained_fraction for f in one.kernels]
    assert rates == [T4.modes[-1].sustained_fraction, 0.5]


def test_a_broken_family_is_named_with_its_line(tmp_path):
    text = (SHIPPED / "t4.yaml").read_text(encoding="utf-8")
    path = tmp_path / "t4.yaml"
    for old, new, message in (
        ("kernel.split_k_max: 8", "kernel.split_kmax: 8", "kernels.cutlass_scaled: unknown key"),
        ("kernel.split_k_max: 8", "kernel.split_k_max: 0", "kernel.split_k_max: input should be"),
        ("rows: 17\n    measured_m: [1, 128]\n", "rows: 17\n", "needs measured_m"),
        ("serves: [plain]", "serves: [attention]", "has a block attention"),
    ):
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(AcceleratorError, match=rf"t4.yaml:\d+: .*{message}"):
            load_accelerator(path)


def test_a_family_for_few_rows_competes_with_the_general_one():
    names = [family.name for family in serving_families(AIE2P, "plain", "bf16", 1)]
    assert names == ["gemv", "iron_whole_array"]
    assert [f.name for f in serving_families(AIE2P, "plain", "bf16", 2)] == ["iron_whole_array"]


def test_a_fit_finds_the_values_that_made_the_rows(tmp_path):
    truth = {"modes.fp16.sustained_fraction": 0.45, "memories.dram.sustained_fraction": 0.55}
    family = family_named(T4, "cublas").model_copy(update={"set": truth})
    made = T4.model_copy(update={"kernels": (family,)})
    lines = ["device,kernel,a_format,w_format,out_format,M,K,N,time_ms,family,weights,source"]
    for index, (m, k, n) in enumerate(
        [
            (1, 4096, 4096),
            (64, 4096, 12288),
            (512, 4096, 4096),
            (4096, 4096, 4096),
            (16, 8192, 8192),
        ]
    ):
        work = GemmWorkload(m=m, n=n, k=k, main="W16A16", group=None, rounds_x=False)
        ms = 1e3 * estimate_cost(work, made, kernel="cublas", weights="cold").latency_s
        source = f"bench {index % 2}"
        lines.append(f"t4,x,fp16,fp16,fp16,{m},{k},{n},{ms:.6g},cublas,cold,{source}")
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = measured_rows(path)
    fit = fit_family(T4, "cublas", rows)
    assert (fit.rows, fit.sources, fit.modes) == (5, 2, ("fp16",))
    # The pull to the chip's own values leaves an error.
    assert fit.mean_error < 0.12
    assert fit.held_out_error is not None
    assert fit.values["modes.fp16.sustained_fraction"] == pytest.approx(0.45, rel=0.2)
    assert fit.values["memories.dram.sustained_fraction"] == pytest.approx(0.55, rel=0.3)
    # The entry that it writes, with values of three digits, is one that a file takes.
    text = (
        (SHIPPED / "t4.yaml").read_text(encoding="utf-8").replace("name: t4\n", "name: mine\n", 1)
    )
    start = text.index("\nkernels:\n")
    machine = tmp_path / "machine.yaml"
    entry = family_text(fitted_family(T4, fit, rows))
    machine.write_text(text[: start + 1] + "kernels:\n" + entry, encoding="utf-8")
    (read,) = load_accelerator(machine).kernels
    assert (read.rows, read.mean_error) == (5, pytest.approx(fit.mean_error, abs=3e-3))


def test_what_rows_say_nothing_of_stays_where_it_is_expected(tmp_path):
    """Long kernels of a machine that keeps a fifth of its rate say nothing of its DRAM."""
    made = with_overrides(T4, {"kernels.cublas.modes.fp16.sustained_fraction": 0.2})
    lines = ["device,kernel,a_format,w_format,out_format,M,K,N,time_ms,family,weights,source"]
    for index in range(3):
        m, n, k = 2048 + 1024 * index, 8192, 8192
        work = GemmWorkload(m=m, n=n, k=k, main="W16A16", group=None, rounds_x=False)
        ms = 1e3 * estimate_cost(work, made, kernel="cublas").latency_s
        lines.append(f"t4,x,fp16,fp16,fp16,{m},{k},{n},{ms:.6g},cublas,cold,bench")
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fit = fit_family(T4, "cublas", measured_rows(path))
    assert fit.values["modes.fp16.sustained_fraction"] == pytest.approx(0.2, rel=0.1)
    # Of the chip's own 0.8, and what other families make of theirs.
    assert fit.values["memories.dram.sustained_fraction"] == pytest.approx(0.8, rel=0.1)


def test_fitting_refuses_what_no_row_is_of():
    others = [row for row in measured_rows() if row["device"] != "t4"]
    with pytest.raises(AcceleratorError, match="no row is of t4; the devices of the table: a100"):
        fit_family(T4, "cublas", others)
    plain = {"device": "t4", "kernel": "mine", "M": "64", "K": "64", "N": "64", "time_ms": "1"}
    row = plain | {"a_format": "int8", "w_format": "int8", "out_format": "int8"}
    message = r"no row of t4 is of the kernel family 'cublas' \(serves plain, .*rows are int8 GEMMs"
    with pytest.raises(AcceleratorError, match=message):
        fit_family(T4, "cublas", [row])
    with pytest.raises(AcceleratorError, match="t4 has no kernel family 'cublaz'; did you mean"):
        fit_family(T4, "cublas", [row | {"family": "cublaz"}])


def test_a_row_left_out_extends_no_range():
    """The only row of a machine is predicted without itself: nothing measured stands behind it."""
    (row,) = cross_validate(load_accelerator("mi350x"), measured_rows())
    assert (row["kernel_family"], row["confidence"]) == ("loraq_fused", "assumed")


@pytest.mark.parametrize(("m", "confidence"), [(256, "measured"), (257, "extrapolated")])
def test_sizes_up_to_twice_the_measured_are_inside(m, confidence):
    assert family_named(T4, "cutlass_scaled").measured_m == (1, 128)
    assert estimate_cost(_gemm(m, 4096, 4096), T4).confidence == confidence
