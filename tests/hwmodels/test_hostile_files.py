"""Files and paths a stranger could hand over: each test hung, crashed or ran wild once."""

import os

import pytest

from hwmodels import AcceleratorError, load_accelerator
from hwmodels.loader import SHIPPED
from hwmodels.overrides import with_overrides
from hwmodels.validation import MEASURED_CSV, measured_rows, validate

GOOD = (SHIPPED / "aie2.yaml").read_text(encoding="utf-8")
HEADER, *ROWS = MEASURED_CSV.read_text(encoding="utf-8").splitlines()
READERS = {"accelerator": load_accelerator, "measured": measured_rows}


def _refused(read, path):
    with pytest.raises(AcceleratorError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_pipes_devices_and_impossible_names_do_not_hang(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "is not a regular file" in _refused(read, tmp_path / "pipe.yaml")
    assert "is a directory" in _refused(read, tmp_path)
    _refused(read, tmp_path / "loop.yaml")
    _refused(read, tmp_path / "a\0b.yaml")
    _refused(read, tmp_path / ("x" * 300))


def test_a_device_without_end_is_refused():
    assert "is not a regular file" in _refused(measured_rows, "/dev/zero")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows: 4", "rows: 0x" + "f" * 5000, "is no size of a machine"),
        ("rows: 4", "rows: " + "9" * 5000, "is not a number"),
        ("rows: 4", f"rows: {2**63}", "is no size of a machine"),
        ("rows: 4", 'rows: "\\UFFFFFFFF"', "not valid YAML: (Overflow|Value)Error"),
        ("clock_hz: 1.0e9", "clock_hz: 1e400", "should be a finite number"),
        ("title: ", 'title: "\\e[31m" #', "control character"),
        ("title: ", 'title: "\\ud800" #', "control character|not valid YAML"),
        ("rows: 4", "rows: " + "[" * 500, "nested too deeply"),
        ("rows: 4", "rows: " + "{a: " * 500, "nested too deeply"),
        ("rows: 4", "rows: [&x 1, &x 1, *x]", "aliases"),
        ("name: aie2", "x" * 5000 + ": 1\nname: aie2", "unknown key|not valid YAML"),
        ("name: aie2", "\x1b[31m: 1\nname: aie2", "not valid YAML"),
    ],
)
def test_hostile_values_end_in_one_line(old, new, message, tmp_path):
    path = tmp_path / "chip.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    import re

    assert re.search(message, _refused(load_accelerator, path))


def test_brackets_in_thousands_are_refused_at_once(tmp_path):
    # The YAML reader takes time in the square of their number: minutes for these.
    path = tmp_path / "chip.yaml"
    path.write_text("a: " + "[" * 60_000)
    assert "nested too deeply" in _refused(load_accelerator, path)


def test_a_byte_order_mark_and_windows_newlines_are_read(tmp_path):
    path = tmp_path / "chip.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_accelerator(path).digest() == load_accelerator("aie2").digest()


def test_an_index_that_is_no_ascii_number_is_an_unknown_key():
    hw = load_accelerator("aie2")
    for key in ("modes[²].macs_per_cycle", f"modes[{'9' * 5000}].macs_per_cycle"):
        with pytest.raises(AcceleratorError, match="unknown key"):
            with_overrides(hw, {key: 1})


def _table(tmp_path, **changes):
    names = HEADER.split(",")
    row = dict.fromkeys(names, "") | {
        "device": "aie2", "kernel": "plain", "a_format": "int8", "w_format": "int8",
        "out_format": "int8", "M": "512", "K": "512", "N": "512", "time_ms": "1",
    }  # fmt: skip
    row |= changes
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\n{','.join(row[name] for name in names)}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"M": "9" * 5000}, {"M": "²"}, {"M": "1" + "0" * 20}, {"time_ms": "inf"},
        {"time_ms": "1e400"}, {"time_ms": "nan"}, {"time_ms": "1e-320"},
        {"time_ms": "1e300"}, {"a_format": "x" * 5000},
        {"out_format": "x" * 5000}, {"kernel": "\x1b[31m"},
    ],
    ids=lambda changes: "-".join(changes),
)  # fmt: skip
def test_hostile_rows_end_in_one_line(changes, tmp_path):
    _refused(measured_rows, _table(tmp_path, **changes))


def test_a_row_cut_short_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\naie2\n")
    assert "rows.csv:2" in _refused(measured_rows, path)


@pytest.mark.parametrize("tile", ["6²4x64x64", "0x0x0", f"{'9' * 5000}x1x1", "64x64"])
def test_a_tile_that_is_none_is_searched_instead(tile, tmp_path):
    hw = load_accelerator("aie2")
    (searched,) = validate(hw, measured_rows(_table(tmp_path, tile_mkn="")))
    (found,) = validate(hw, measured_rows(_table(tmp_path, tile_mkn=tile)))
    assert found["predicted_ms"] == searched["predicted_ms"]


def test_a_rank_of_thousands_of_digits_is_no_branch(tmp_path):
    (row,) = measured_rows(_table(tmp_path, kernel=f"rank {'9' * 5000} int8 branch"))
    assert row["device"] == "aie2"
