from typing import get_args, get_type_hints

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.evaluate import evaluate_layer
from loraq_sim.layers import Layer
from loraq_sim.results.rows import (
    COLUMN_NAMES,
    COLUMNS,
    EVALUATED,
    IDENTITY,
    ResultRow,
    failed_row,
)

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


def test_the_type_of_a_row_has_every_column_with_the_type_it_is_stored_in():
    stored = {"TEXT": str, "INTEGER": int, "REAL": float}
    hints = get_type_hints(ResultRow)
    assert tuple(hints) == COLUMN_NAMES
    for column in COLUMNS:
        kinds = set(get_args(hints[column.name])) or {hints[column.name]}
        kinds -= {type(None)}
        if column.name == "status":
            assert kinds == {*EVALUATED, "failed"}
        else:
            # SQLite has no truth values, and keeps a fraction in an integer column.
            other = {"pareto": bool, "cycles": float}
            assert kinds == {other.get(column.name, stored[column.sql_type])}


def test_an_evaluated_row_is_of_its_type():
    layer = Layer(name="a", weight=np.ones((8, 16), np.float32), rows_per_call=4)
    hints = get_type_hints(ResultRow)
    row = evaluate_layer(layer, "W4A4+W8A8r2", "aie2", preset="fast")
    for name, value in row.items():
        kinds = get_args(hints[name]) or (hints[name],)
        assert name == "status" or isinstance(value, kinds), (name, value, kinds)
