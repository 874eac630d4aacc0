"""Predicted against measured time, on every public row, with given and with searched tiles."""

import pytest

from hwmodels import (
    AcceleratorError,
    GemmWorkload,
    branch_overheads,
    list_accelerators,
    load_accelerator,
    measured_rows,
    summarize,
    validate,
)
from hwmodels.branch import split_into_kernels
from hwmodels.kernel_cycles import single_core_cycles
from hwmodels.loader import SHIPPED

ROWS = measured_rows()
NEEDED = "device,kernel,a_format,w_format,out_format,M,K,N,time_ms\n"


def _results(*devices, prefix="", **options):
    results = [
        row
        for name in list_accelerators()
        for row in validate(load_accelerator(name), ROWS, **options)
    ]
    return [r for r in results if r["device"] in devices and r["kernel"].startswith(prefix)]


def _errors(results):
    return [abs(row["error"]) for row in results]


def test_every_shipped_row_is_predicted():
    results = _results("xdna1", "xdna2", "sm120", "b200", "mi350x", "a100")
    assert len(results) == len(ROWS) == 36


@pytest.mark.parametrize("device", ["xdna1", "xdna2"])
def test_whole_array_rows_with_their_tiles(device):
    errors = _errors(_results(device, prefix="whole-array"))
    assert sum(errors) / len(errors) <= 0.05
    assert max(errors) <= 0.08


@pytest.mark.parametrize(
    "row",
    [r for r in _results("xdna1", "xdna2", search_tiles=True) if r["kernel"] == "whole-array GEMM"],
    ids=lambda row: f"{row['device']}-{row['main']}-{row['out_bits']}",
)
def test_the_best_tile_found_is_as_fast_as_the_published_kernel(row):
    assert abs(row["error"]) <= 0.12


def test_single_core_rows():
    assert max(_errors(_results("xdna1", prefix="single core"))) <= 0.08


@pytest.mark.parametrize(("device", "mean"), [("sm120", 0.10), ("b200", 0.06), ("a100", 0.05)])
def test_gpu_rows(device, mean):
    errors = _errors(_results(device))
    assert sum(errors) / len(errors) <= mean


def test_the_authors_kernel_with_its_recomputed_branch():
    (row,) = _results("mi350x")
    assert row["rank"] == 64
    assert abs(row["error"]) <= 0.10


def test_fused_branch_overheads_are_within_five_points():
    overheads = branch_overheads(_results("sm120"))
    assert len(overheads) == 8
    assert sum(abs(row["difference"]) for row in overheads) / 8 <= 0.05


def test_rows_that_name_a_product_use_its_variant():
    by_kernel = {row["kernel"]: row["accelerator"] for row in _results("xdna2")}
    assert by_kernel["whole-array GEMM, small tile"] == "aie2p@hx370"
    assert by_kernel["whole-array GEMM"] == "aie2p"


@pytest.mark.parametrize("name", ["b200@tuned", "a100@40gb", "aie2@hawk_point", "aie2p@hx370"])
def test_a_variant_is_validated_by_the_rows_of_its_machine(name, tmp_path):
    path = tmp_path / "mine.csv"
    machine = name.partition("@")[0]
    path.write_text(f"{NEEDED}{machine},x,bf16,bf16,bf16,512,512,512,1.0\n")
    (row,) = validate(load_accelerator(name), measured_rows(path))
    assert row["accelerator"] == name


def test_a_users_file_may_have_variants_with_products(tmp_path):
    path = tmp_path / "chip.yaml"
    text = (SHIPPED / "aie2p.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("name: aie2p", "name: chip", 1), encoding="utf-8")
    results = validate(load_accelerator(path), ROWS)
    assert {row["accelerator"] for row in results} == {"chip", "chip@hx370"}


def test_the_summary_is_the_mean_and_worst_of_absolute_errors():
    rows = [{"device": "x", "error": error} for error in (-0.1, 0.3)]
    assert summarize(rows) == [
        {"device": "x", "rows": 2, "mean_error": pytest.approx(0.2), "worst_error": 0.3}
    ]


def test_single_core_cycles_follow_the_stated_formula():
    # 16 blocks of 16 x 16: 232 ideal cycles, 7 of overhead, 3.7 per 64 of 256 output bytes.
    work = GemmWorkload(
        m=64, n=64, k=232, main="W8A8", out_bits=8, scale_bits=0, partial_bits=8, group=None
    )
    hw = load_accelerator("aie2")
    cycles = single_core_cycles(hw, split_into_kernels(work, hw)[0], (64, 232, 64))
    assert cycles == pytest.approx(16 * (232 + 7 + 3.7 * 4), rel=1e-12)


def test_a_measured_tile_beyond_our_buffers_is_searched_instead(tmp_path):
    path = tmp_path / "mine.csv"
    text = NEEDED.replace("time_ms", "time_ms,tile_mkn")
    path.write_text(text + "xdna1,x,int8,int8,int32,512,512,512,1.0,256x256x256\n")
    (row,) = validate(load_accelerator("aie2"), measured_rows(path))
    assert row["tile_mkn"] != "256x256x256"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a100,x,int8,int8,int7,1,1,1,1", r"mine.csv:2: unknown out_format 'int7'; known: int8"),
        ("a100,x,int9,int8,int8,1,1,1,1", r"mine.csv:2: unknown format 'int9'"),
        ("a100,x,int8,mxfp4,int8,1,1,1,1", r"are of two families"),
        ("a100,x,int8,int8,int8,0,1,1,1", r"mine.csv:2: M must be a positive number, got '0'"),
        ("a100,x,int8,int8,int8,1,1,1,fast", r"time_ms must be a positive number, got 'fast'"),
        ("a100,x,int8,int8,int8,1,1,1,-2", r"time_ms must be a positive number, got '-2'"),
        ("a100,x rank 9 bf16 branch,int8,int8,int8,4,4,4,1", r"rank=9 must be at most"),
    ],
)
def test_broken_rows_are_named_with_their_line(tmp_path, line, message):
    path = tmp_path / "mine.csv"
    path.write_text(NEEDED + line + "\n", encoding="utf-8")
    with pytest.raises(AcceleratorError, match=message):
        measured_rows(path)


def test_a_table_without_a_needed_column_is_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("device,kernel,M,N,K\nx,y,1,2,3\n", encoding="utf-8")
    with pytest.raises(AcceleratorError, match="missing column 'a_format'; needed: device"):
        measured_rows(path)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(AcceleratorError, match="cannot read measured table .*gone.csv"):
        measured_rows(tmp_path / "gone.csv")
