import pytest

from loraq_sim.errors import InputError
from loraq_sim.results.rows import COLUMN_NAMES, COLUMNS, IDENTITY, failed_row

# design.md 3.3, written out: users' scripts rely on these names.
PROMISED = """
layer kind m n k split method preset accelerator rank weight_bytes bits_per_weight weight_error
output_error sqnr_db max_abs_error overflow_count safe_acc_bits latency_s cycles energy_j dram_bytes
utilization bound status message seconds seed pareto
"""


def test_promised_columns_are_there_in_the_promised_order():
    promised = PROMISED.split()
    assert [name for name in COLUMN_NAMES if name in promised] == promised


def test_every_column_has_a_type_a_unit_and_a_meaning():
    assert len(set(COLUMN_NAMES)) == len(COLUMNS)
    for column in COLUMNS:
        assert column.sql_type in ("TEXT", "INTEGER", "REAL"), column
        assert column.meaning, column
    assert {c.unit for c in COLUMNS if c.name.endswith("_s")} == {"s"}


def test_identity_names_columns_only():
    assert set(IDENTITY) <= set(COLUMN_NAMES)


def test_failed_row_keeps_what_is_known_and_leaves_the_rest_empty():
    row = failed_row("weights hold NaN", {"layer": "a", "split": "W4A4", "n": 8})
    assert list(row) == list(COLUMN_NAMES)
    assert (row["status"], row["message"]) == ("failed", "weights hold NaN")
    assert (row["layer"], row["n"], row["output_error"]) == ("a", 8, None)


def test_failed_row_refuses_what_is_no_column():
    with pytest.raises(InputError, match="'latncy_s' is not a column.*did you mean 'latency_s'"):
        failed_row("", {"latncy_s": 1.0})
