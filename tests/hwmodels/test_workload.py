"""Workloads: rules, and stored bytes against a count of whole rows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import AcceleratorError, GemmWorkload, activation_bytes, tensor_bytes


def _bytes_by_packing(rows, columns, bits, group, scale_bits):
    """Write each row's codes bit by bit, then its scales, and count what was written."""
    if bits == 16:
        return rows * columns * 2
    row_bits = "".join("1" * bits for _ in range(columns))
    row_bytes = len([row_bits[i : i + 8] for i in range(0, len(row_bits), 8)])
    starts = range(0, columns, columns if group is None else group)
    return rows * row_bytes + rows * len(starts) * (scale_bits // 8)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
    group=st.sampled_from([None, 1, 16, 32, 64]),
    scale_bits=st.sampled_from([0, 8, 16, 32]),
)
def test_tensor_bytes_equal_what_a_packer_writes(rows, columns, bits, group, scale_bits):
    expected = _bytes_by_packing(rows, columns, bits, group, scale_bits)
    assert tensor_bytes(rows, columns, bits, group=group, scale_bits=scale_bits) == expected


def test_weight_bytes_add_the_main_weight_and_both_factors():
    work = GemmWorkload(m=7, n=100, k=130, main="W4A8", branch="W6A6", rank=5)
    assert work.weight_bytes() == {
        "main": 100 * 65 + 100 * 3 * 2,
        "right": 5 * 98 + 5 * 3 * 2,  # 130 columns of 6 bits are 97.5 bytes, padded to 98
        "left": 100 * 4 + 100 * 1 * 2,
    }


def test_sixteen_bit_factors_have_no_scales():
    work = GemmWorkload(m=7, n=100, k=130, main="W4A4", branch="W16A16", rank=5)
    assert work.weight_bytes()["right"] == 5 * 130 * 2
    assert work.weight_bytes()["left"] == 100 * 5 * 2


def test_activation_bytes_use_the_activation_width():
    assert activation_bytes(GemmWorkload(m=3, n=8, k=64, main="W4A8")) == 3 * 64 + 3 * 2


def test_branch_macs_count_both_factors():
    assert GemmWorkload(m=3, n=5, k=7, branch="W8A8", rank=2).macs_branch == 3 * 2 * (5 + 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"m": 0}, r"m=0 must be a whole number of at least 1"),
        ({"n": -4}, r"n=-4 must be a whole number"),
        ({"k": 2.5}, r"k=2.5 must be a whole number"),
        ({"k": True}, r"k=True must be a whole number"),
        ({"m": 2**31}, r"below 2\*\*31"),
        ({"m": "64"}, r"m='64' must be a whole number"),
        ({"rank": -1}, r"rank=-1 must be a whole number of at least 0"),
        ({"group": 0}, r"group=0 must be a whole number of at least 1"),
        ({"main": "W4"}, r"precision 'W4' must be WxAy"),
        ({"main": "W9A8"}, r"precision 'W9A8' must be WxAy"),
        ({"main": 4}, r"precision 4 must be WxAy"),
        ({"branch": "int8", "rank": 4}, r"precision 'int8' must be WxAy"),
        ({"rank": 8}, r"rank=8 without a branch precision; give branch such as 'W8A8'"),
        ({"rank": 65, "branch": "W8A8"}, r"rank=65 must be at most min\(n, k\) = 64"),
        ({"rank": 65, "branch": "W8A8", "k": 99}, r"rank=65 must be at most min\(n, k\) = 64"),
        ({"rank": 65, "branch": "W8A8", "n": 99}, r"rank=65 must be at most min\(n, k\) = 64"),
        ({"out_bits": 12}, r"out_bits=12 must be one of 8, 16, 32"),
        ({"scale_bits": 4}, r"scale_bits=4 must be one of 0, 8, 16, 32"),
        ({"p_bits": 12}, r"p_bits=12 must be one of None, 2, 3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_values_name_value_rule_and_fix(fields, message):
    with pytest.raises(AcceleratorError, match=message):
        GemmWorkload(**{"m": 64, "n": 64, "k": 64} | fields)


def test_numpy_integers_are_whole_numbers():
    numpy = pytest.importorskip("numpy")
    assert GemmWorkload(m=numpy.int64(3), n=4, k=5).m == 3
