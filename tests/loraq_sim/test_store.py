import csv
import hashlib
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.errors import StoreError
from loraq_sim.rows import COLUMN_NAMES, COLUMNS
from loraq_sim.store import SCHEMA_VERSION, ResultStore


def result(layer="a", split="W4A4", **values):
    row = dict.fromkeys(COLUMN_NAMES)
    known = {"layer": layer, "split": split, "status": "ok", "message": "", "seed": 0}
    return row | known | {"output_error": 0.25, "cycles": 7} | values


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.sqlite"


def fill(path, rows):
    with ResultStore.open(path, create=True) as store:
        for index, row in enumerate(rows):
            store.add(f"case{index}", row)


def test_rows_come_back_as_they_went_in(path):
    row = result(group="g", utilization=0.5, pareto=True, output_rms=math.inf)
    fill(path, [row])
    with ResultStore.open(path) as store:
        (found,) = store.rows()
    assert found == row | {"case_id": "case0"}
    assert list(found) == [*COLUMN_NAMES, "case_id"]


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "message": st.text(st.characters(exclude_categories=["Cs"])) | st.none(),
            "output_error": st.floats(allow_nan=False) | st.none(),
            "weight_bytes": st.integers(-(2**63), 2**63 - 1) | st.none(),
            "pareto": st.booleans() | st.none(),
            "remark": st.text(st.characters(exclude_categories=["Cs"])),
        }
    )
)
def test_any_row_survives_the_round_trip(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("store") / "s.sqlite"
    fill(path, [result() | values])
    with ResultStore.open(path) as store:
        assert store.rows() == [result() | values | {"case_id": "case0"}]


def test_nan_is_stored_as_missing(path):
    fill(path, [result(sqnr_db=math.nan, output_error=np.float32("nan"), note=math.nan)])
    with ResultStore.open(path) as store:
        (row,) = store.rows()
    assert (row["sqnr_db"], row["output_error"], row["note"]) == (None, None, None)


def test_numpy_scalars_become_python_numbers(path):
    fill(path, [result(n=np.int64(8), output_error=np.float32(0.5), pareto=np.bool_(True))])
    with ResultStore.open(path) as store:
        (row,) = store.rows()
    assert (row["n"], row["output_error"], row["pareto"]) == (8, 0.5, True)
    assert [type(row[name]) for name in ("n", "output_error", "pareto")] == [int, float, bool]


def test_unknown_columns_are_kept_after_the_known_ones(path):
    fill(path, [result(), result("b", smoothing=0.5)])
    with ResultStore.open(path) as store:
        assert store.rows()[1]["smoothing"] == 0.5
        frame = store.frame()
    assert list(frame.columns) == [*COLUMN_NAMES, "smoothing", "case_id"]
    assert frame["smoothing"].tolist()[1] == 0.5


def test_the_frame_has_numbers_where_numbers_belong(path):
    fill(path, [result(pareto=True), result("b", output_error=None, n=5)])
    with ResultStore.open(path) as store:
        frame = store.frame()
    assert frame["output_error"].dtype == np.float64
    assert frame["cycles"].dtype == np.int64
    assert frame["energy_j"].dtype == np.float64
    assert frame["pareto"].tolist() == [True, False]
    assert frame["output_error"].isna().tolist() == [False, True]


def test_an_empty_store_gives_an_empty_frame(path):
    ResultStore.open(path, create=True).close()
    with ResultStore.open(path) as store:
        assert store.rows() == []
        assert len(store.frame()) == 0
        assert store.provenance() == []


def test_the_same_case_again_replaces_its_row(path):
    with ResultStore.open(path, create=True) as store:
        store.add("x", result(status="failed"))
        assert store.done(["x", "y"]) == set()
        store.add("x", result(output_error=0.5))
        assert store.done(["x", "y"]) == {"x"}
        assert [row["output_error"] for row in store.rows()] == [0.5]


def test_rows_follow_the_plan_whatever_order_they_finished_in(path):
    with ResultStore.open(path, create=True) as store:
        store.begin_run({}, ["c0", "c1", "c2"])
        for name in ("c2", "c0", "c1"):
            store.add(name, result(name))
        assert [row["layer"] for row in store.rows()] == ["c0", "c1", "c2"]
        assert [row["layer"] for row in store.rows(["c2", "zzz", "c0"])] == ["c2", "c0"]


def test_of_rows_that_look_alike_the_latest_sweep_decides(path):
    with ResultStore.open(path, create=True) as store:
        store.begin_run({}, ["old"])
        store.add("old", result(output_error=0.5))
        store.begin_run({}, ["new"])
        store.add("new", result(output_error=0.25))
        assert [row["case_id"] for row in store.rows()] == ["new"]
        store.begin_run({}, ["old"])
        assert [row["case_id"] for row in store.rows()] == ["old"]
        assert len(store.rows(["old", "new"])) == 2


def test_pareto_marks_are_set_among_the_named_cases(path):
    with ResultStore.open(path, create=True) as store:
        for name in ("a", "b", "c"):
            store.add(name, result(name))
        store.set_pareto(["a"], among=["a", "b"])
        assert [row["pareto"] for row in store.rows()] == [True, False, None]
        store.set_pareto(["c"])
        assert [row["pareto"] for row in store.rows()] == [False, False, True]


def test_provenance_lists_every_run(path):
    with ResultStore.open(path, create=True) as store:
        first = store.begin_run({"seed": 1})
        store.end_run(first, {"ended": "now"})
        store.begin_run({"seed": 2})
        assert store.provenance() == [
            {"run": 1, "seed": 1, "ended": "now"},
            {"run": 2, "seed": 2},
        ]


def test_csv_holds_the_rows(path, tmp_path):
    fill(path, [result(message='a "b", c', output_error=0.1), result("b", n=3, pareto=True)])
    with ResultStore.open(path) as store:
        store.export_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [*COLUMN_NAMES, "case_id"]
    assert (first["message"], first["output_error"], first["n"]) == ('a "b", c', "0.1", "")
    assert (second["n"], second["pareto"]) == ("3", "True")


def test_a_csv_that_cannot_be_written_leaves_the_old_one(path, tmp_path):
    fill(path, [result()])
    with ResultStore.open(path) as store, pytest.raises(StoreError, match="cannot write this file"):
        store.export_csv(tmp_path / "missing" / "rows.csv")


def test_a_change_of_columns_needs_a_new_schema_version():
    # Old stores would be misread otherwise. Raise SCHEMA_VERSION, then update both numbers here.
    columns = "".join(f"{column.name}:{column.sql_type};" for column in COLUMNS)
    digest = hashlib.sha256(columns.encode()).hexdigest()[:12]
    assert (SCHEMA_VERSION, digest) == (2, "55bda7aecd2f")


def test_a_missing_store_is_named(path):
    with pytest.raises(StoreError, match=r"results\.sqlite: no such result store"):
        ResultStore.open(path)


def test_a_folder_is_not_a_store(tmp_path):
    with pytest.raises(StoreError, match="is a folder"):
        ResultStore.open(tmp_path)
    with pytest.raises(StoreError, match="is a folder"):
        ResultStore.open(tmp_path, create=True)


@pytest.mark.parametrize("create", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(
    "content", [b"layer,split\n" * 100, b"SQLite format 3\0"], ids=["text", "head"]
)
def test_another_file_is_not_a_store_and_is_not_touched(path, content, create):
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not a loraq-sim result store"):
        ResultStore.open(path, create=create)
    assert path.read_bytes() == content
    assert not path.with_name(path.name + ".lock").exists()


@pytest.mark.parametrize("create", [False, True], ids=["read", "write"])
def test_another_database_is_not_a_store_and_is_not_touched(path, create):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a loraq-sim result store"):
        ResultStore.open(path, create=create)
    assert path.read_bytes() == before


def test_an_empty_file_becomes_a_store_only_when_writing(path):
    path.touch()
    with pytest.raises(StoreError, match="not a loraq-sim result store"):
        ResultStore.open(path)
    fill(path, [result()])
    with ResultStore.open(path) as store:
        assert len(store.rows()) == 1


def test_a_newer_schema_is_refused(path):
    fill(path, [result()])
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(StoreError, match="written by a newer release"):
        ResultStore.open(path)


@pytest.mark.parametrize("create", [False, True], ids=["read", "write"])
def test_a_truncated_store_is_reported_as_damaged(path, create):
    fill(path, [result(f"layer{i}", message="x" * 500) for i in range(50)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match="is damaged"):
        ResultStore.open(path, create=create)


def test_an_overwritten_page_is_reported_as_damaged(path):
    fill(path, [result(f"layer{i}", message="x" * 500) for i in range(50)])
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xa5" * 8192
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        ResultStore.open(path)


def test_a_store_opened_for_reading_cannot_be_written(path):
    fill(path, [result()])
    with ResultStore.open(path) as store, pytest.raises(StoreError, match="opened for reading"):
        store.add("x", result())


def test_readers_see_each_row_while_a_writer_is_at_work(path):
    with ResultStore.open(path, create=True) as writer, ResultStore.open(path) as reader:
        assert reader.rows() == []
        writer.add("x", result())
        assert len(reader.rows()) == 1


def test_a_second_writer_is_told_who_writes(path):
    told = pytest.raises(StoreError, match=f"being written by process {os.getpid()}")
    with ResultStore.open(path, create=True), told:
        ResultStore.open(path, create=True)
    ResultStore.open(path, create=True).close()


def test_a_second_process_waits_for_the_first(path):
    script = (
        "import sys; from loraq_sim.store import ResultStore\n"
        "store = ResultStore.open(sys.argv[1], create=True, wait_s=60)\n"
        "store.add('second', {'layer': 'b', 'status': 'ok'}); store.close()"
    )
    store = ResultStore.open(path, create=True)
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as process:
        store.add("first", result())
        store.close()
        assert process.wait(timeout=60) == 0
    with ResultStore.open(path) as store:
        assert [row["case_id"] for row in store.rows()] == ["first", "second"]


def test_a_killed_writer_leaves_its_rows_and_no_lock(path):
    script = (
        "import sys, time; from loraq_sim.store import ResultStore\n"
        "store = ResultStore.open(sys.argv[1], create=True)\n"
        "store.add('one', {'layer': 'a', 'status': 'ok'})\n"
        "print('added', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "added\n"
        process.send_signal(signal.SIGKILL)
    with ResultStore.open(path, create=True) as store:
        assert store.done(["one"]) == {"one"}


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_there(path):
    with ResultStore.open(path, create=True) as store:
        store.add("x", result())
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(StoreError, match="disk is full.*rows stored so far are safe"):
            store.add("y", result(message="x" * 100_000))
        assert "x" in store.done(["x"])


def test_a_value_no_store_can_hold_is_refused(path):
    with ResultStore.open(path, create=True) as store:
        with pytest.raises(StoreError, match="cannot store the row of layer 'a'"):
            store.add("x", result(cycles=2**70))
        with pytest.raises(StoreError, match="cannot store the row of layer 'a'"):
            store.add("x", result(message=["a", "list"]))
        assert store.rows() == []


def test_folders_are_made_and_refused_clearly(tmp_path):
    fill(tmp_path / "new" / "deep" / "r.sqlite", [result()])
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot make this folder"):
        ResultStore.open(tmp_path / "file" / "r.sqlite", create=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot write here"):
        ResultStore.open(folder / "r.sqlite", create=True)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount read-only")
def test_a_store_in_a_read_only_folder_can_be_read(path):
    fill(path, [result()])
    script = (
        f"mount --bind {path.parent} {path.parent} && mount -o remount,bind,ro {path.parent} && "
        f'{sys.executable} -c "from loraq_sim.store import ResultStore; '
        f"print(len(ResultStore.open('{path}').rows()))\""
    )
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.stdout == "1\n", done.stderr
