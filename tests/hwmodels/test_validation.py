"""Predicted against measured time, on the rows the shipped machines were measured with."""

import pytest

from hwmodels import AcceleratorError, load_accelerator, measured_rows, validate
from hwmodels.branch import split_into_kernels
from hwmodels.kernel_cycles import single_core_cycles
from hwmodels.workload import GemmWorkload


def _rows(name, prefix=""):
    rows = validate(load_accelerator(name), measured_rows())
    return [row for row in rows if row["kernel"].startswith(prefix)]


def test_every_xdna1_and_a100_row_is_predicted():
    assert len(_rows("aie2", "whole-array")) == 4
    assert len(_rows("aie2", "single core")) == 3
    assert len(_rows("a100")) == 1


@pytest.mark.parametrize("row", _rows("aie2", "whole-array"), ids=lambda row: row["main"])
def test_xdna1_whole_array_rows_are_within_five_percent(row):
    assert abs(row["error"]) <= 0.05


@pytest.mark.parametrize("row", _rows("aie2", "single core"), ids=lambda row: str(row["out_bits"]))
def test_xdna1_single_core_rows_are_within_eight_percent(row):
    assert abs(row["error"]) <= 0.08


def test_the_a100_row_is_within_fifteen_percent():
    assert abs(_rows("a100")[0]["error"]) <= 0.15


def test_single_core_cycles_follow_the_stated_formula():
    # 16 blocks of 16 x 16: 232 ideal cycles, 7 of overhead, 3.7 per 64 of 256 output bytes.
    work = GemmWorkload(
        m=64, n=64, k=232, main="W8A8", out_bits=8, scale_bits=0, partial_bits=8, group=None
    )
    hw = load_accelerator("aie2")
    cycles = single_core_cycles(hw, split_into_kernels(work, hw)[0], (64, 232, 64))
    assert cycles == pytest.approx(16 * (232 + 7 + 3.7 * 4), rel=1e-12)


def test_a_table_without_a_needed_column_is_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("device,kernel,M,N,K\nx,y,1,2,3\n", encoding="utf-8")
    with pytest.raises(AcceleratorError, match="missing column 'a_format'; needed: device"):
        measured_rows(path)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(AcceleratorError, match="cannot read measured table .*gone.csv"):
        measured_rows(tmp_path / "gone.csv")
