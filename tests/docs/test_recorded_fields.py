"""Programs read JSON outputs: a field stays what it is until the schema has a new version."""

import json

import pytest
from recorded_fields import RECORD, breaks, fields_today, record


@pytest.fixture(scope="module")
def today():
    return fields_today()


def changed(fields, output, path, told):
    """`fields` with another field in one output; None takes it away."""
    outputs = {name: dict(own) for name, own in fields["outputs"].items()}
    del outputs[output][path]
    if told is not None:
        outputs[output][path] = told
    return fields | {"outputs": outputs}


def test_no_recorded_field_is_gone_or_another_without_a_new_version(today):
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    found = [] if recorded["version"] < today["version"] else breaks(recorded, today)
    assert found == [], (
        "programs read these fields: keep them, or raise SCHEMA_VERSION in loraq_sim/cli/output.py "
        "with a line in the changelog; `make pages` then records the fields anew"
    )
    assert recorded["version"] == today["version"], "record the fields of this version: make pages"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "sweep: rows[].output_error is gone"),
        ("text", "sweep: rows[].output_error was null or number, is text"),
        ("null or number in dB", "is null or number in dB"),
        ("null or number, may be missing", "is null or number, may be missing"),
    ],
    ids=["gone", "type", "unit", "missing"],
)
def test_a_field_that_goes_or_changes_is_named(today, told, said):
    assert today["outputs"]["sweep"]["rows[].output_error"] == "null or number"
    now = changed(today, "sweep", "rows[].output_error", told)
    (found,) = breaks(today, now)
    assert said in found


def test_a_field_that_comes_breaks_nothing_and_neither_does_one_that_is_always_there_now(today):
    assert breaks(changed(today, "sweep", "rows[].output_error", None), today) == []
    path = "front[].acc_bits"
    assert today["outputs"]["sweep"][path].endswith(", may be missing")
    now = changed(today, "sweep", path, today["outputs"]["sweep"][path].split(", may")[0])
    assert breaks(today, now) == []
    without = {name: own for name, own in today["outputs"].items() if name != "pareto"}
    assert breaks(today, today | {"outputs": without}) == ["pareto: has no JSON output any more"]


def test_fields_are_recorded_unless_one_breaks(today, tmp_path):
    path = tmp_path / "fields.json"
    assert record(path) == []
    assert json.loads(path.read_text()) == today
    older = changed(today, "doctor", "rows[].state", None)
    path.write_text(json.dumps(older))
    assert record(path) == []
    assert json.loads(path.read_text()) == today
    lost = today | {"outputs": today["outputs"] | {"doctor": {"rows[].color": "text"}}}
    path.write_text(json.dumps(lost))
    assert record(path) == ["doctor: rows[].color is gone (was text)"]
    assert json.loads(path.read_text()) == lost
    path.write_text(json.dumps(lost | {"version": today["version"] - 1}))
    assert record(path) == []
    assert json.loads(path.read_text()) == today
