import math

import pytest

from loraq_sim.errors import InputError
from loraq_sim.results.merge import compare_rows, parse_limit
from loraq_sim.results.rows import COLUMN_NAMES


def row(layer="a", **values):
    return dict.fromkeys(COLUMN_NAMES) | {"layer": layer, "status": "ok"} | values


def test_rows_are_matched_by_identity_whatever_their_order_and_case():
    before = [row("a", output_error=0.5, case_id="x"), row("b", output_error=0.1)]
    after = [row("b", output_error=0.2, seconds=3.0), row("a", output_error=0.5, case_id="y")]
    found = compare_rows(before, after)
    ((change),) = found.changes
    assert (change.row["layer"], change.column, change.before, change.after) == (
        *("b", "output_error", 0.1, 0.2),
    )
    assert change.relative == pytest.approx(1.0)
    assert (found.n_matched, found.only_before, found.only_after) == (2, (), ())


def test_rows_of_one_side_are_listed():
    found = compare_rows([row("a"), row("b")], [row("b"), row("b", seed=1)])
    assert [r["layer"] for r in found.only_before] == ["a"]
    assert [r["seed"] for r in found.only_after] == [1]


@pytest.mark.parametrize(
    ("limit", "before", "after", "broken"),
    [
        ("output_error>+2%", 0.100, 0.103, True),
        ("output_error>+2%", 0.100, 0.101, False),
        ("output_error>+2%", 0.100, 0.050, False),
        ("output_error>2%", 0.100, 0.103, True),
        ("output_error>+0%", 0.1, math.nextafter(0.1, 1), True),
        ("output_error>+0%", 0.1, 0.1, False),
        ("output_error>+2%", 0.0, 1e-9, True),
        ("output_error>+2%", 0.1, None, True),
        ("output_error>+2%", 0.1, math.nan, True),
        ("output_error>+2%", None, 0.1, False),
        ("output_error>+2%", None, None, False),
        ("sqnr_db<-0.5", 20.0, 19.4, True),
        ("sqnr_db<-0.5", 20.0, 19.6, False),
        ("sqnr_db<-0.5", 20.0, 25.0, False),
        ("sqnr_db<0", 20.0, 19.999, True),
        ("sqnr_db<-1%", math.inf, math.inf, False),
        ("sqnr_db < -1 %", 20.0, 19.7, True),
        ("cycles>+10", 100, 111, True),
        ("cycles>+10", 100, 110, False),
    ],
)
def test_limits(limit, before, after, broken):
    limit = parse_limit(limit)
    found = compare_rows([row(**{limit.column: before})], [row(**{limit.column: after})], [limit])
    assert bool(found.regressions) is broken


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_error", "must look like"),
        ("output_error>much", "must look like"),
        ("output_eror>+2%", "unknown column 'output_eror'; did you mean 'output_error'"),
        ("layer>+2%", "unknown column 'layer'"),
        ("output_error>-2%", "write '>\\+' for growth"),
    ],
)
def test_bad_limits_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_limit(text)
