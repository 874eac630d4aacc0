"""Units and digits that people read."""

import math

import pytest

from loraq_sim.results.columns import (
    choose_unit,
    format_count,
    format_number,
    format_numbers,
    is_missing,
)


@pytest.mark.parametrize(
    ("values", "quantity", "symbol"),
    [
        ([0.0412, 0.0589], "time", "ms"),
        ([41.2e-6], "time", "us"),
        ([1.0, 2.0], "time", "s"),
        ([0.001], "time", "ms"),
        ([3e-12], "time", "ns"),
        ([2.5e-6], "energy", "uJ"),
        ([2.5e-3], "energy", "mJ"),
        ([1024.0], "bytes", "KiB"),
        ([1023.0], "bytes", "B"),
        ([64e6], "bytes", "MiB"),
        ([0.19], "percent", "%"),
    ],
)
def test_unit_makes_the_typical_value_at_least_one(values, quantity, symbol):
    assert choose_unit(values, quantity).symbol == symbol


def test_unit_follows_the_median_and_skips_what_is_missing():
    values = [None, float("nan"), 0.0, 2e-3, 3e-3, 4.0]
    assert choose_unit(values, "time").symbol == "ms"


@pytest.mark.parametrize("values", [[], [None], [0.0]])
def test_unit_without_any_size_is_the_base_unit(values):
    assert choose_unit(values, "time").symbol == "s"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (1234567.0, "1,234,567"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (1.2e-7, "1.2e-07"),
        (-3.14159, "-3.14"),
        (math.inf, "inf"),
    ],
)
def test_number_has_three_significant_digits_and_keeps_whole_ones(value, text):
    assert format_number(value) == text


def test_column_of_close_numbers_gets_equal_decimals():
    assert format_numbers([41.2, 9.5, None, 120.04]) == ["41.20", "9.50", "-", "120.04"]


def test_column_over_four_decades_is_written_number_by_number():
    assert format_numbers([0.0123, 45678.9]) == ["0.0123", "45,679"]


def test_count_is_whole_with_separators():
    assert [format_count(v) for v in (64.0, 1_500_000, 2.5)] == ["64", "1,500,000", "2.50"]


def test_missing_values_are_none_and_nan_only():
    assert is_missing(None)
    assert is_missing(float("nan"))
    assert not is_missing(0.0)
    assert not is_missing("")
    assert not is_missing(math.inf)
