import csv
import gc
import hashlib
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.errors import StoreError
from loraq_sim.results import store_file
from loraq_sim.results.rows import COLUMN_NAMES, COLUMNS
from loraq_sim.results.store import SCHEMA_VERSION, ResultStore


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


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(("weight_bytes", "output_error", "message", "acc_bits", "kind")),
        st.integers(-(2**63), 2**63 - 1)
        | st.floats()
        | st.booleans()
        | st.text(max_size=3)
        | st.binary(max_size=3)
        | st.sampled_from((-0.0, 2.0, 1e300, "1", "1.5e3", "0x10", "\0", b"\xff", np.float32(0.1))),
    )
)
def test_a_row_is_whole_whatever_sqlite_makes_of_its_values(tmp_path_factory, values):
    """SQLite turns texts into numbers and back; the checksum is over what it keeps."""
    path = tmp_path_factory.mktemp("store") / "s.sqlite"
    fill(path, [result() | values])
    with ResultStore.open(path) as store:
        assert store.done(["case0"]) == {"case0"}


def test_adding_a_row_looks_at_no_other(path):
    """So that a sweep of 100,000 cases does not take the square of that."""
    fill(path, [result(layer=f"l{n}") for n in range(3)])
    with ResultStore.open(path, create=True) as store:
        statements = []
        store._connection.set_trace_callback(statements.append)
        store.add("case9", result(layer="l9"))
        plans = [
            line
            for text in statements
            if text.startswith(("SELECT", "UPDATE"))
            for *_, line in store._connection.execute(f"EXPLAIN QUERY PLAN {text}")
        ]
    assert not any(line.startswith("SCAN") for line in plans), plans


def test_a_row_read_can_be_added_as_it_is(path, tmp_path):
    fill(path, [result(), result(layer="b", note="x", pareto=True)])
    with ResultStore.open(path) as store, ResultStore.open(tmp_path / "o", create=True) as other:
        other.add_all({row["case_id"]: row for row in store.rows()})
        assert other.rows() == store.rows()


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
    with ResultStore.open(path) as store, pytest.raises(StoreError, match="cannot be written: "):
        store.export_csv(tmp_path / "missing" / "rows.csv")


def test_a_change_of_columns_needs_a_new_schema_version():
    # Old stores would be misread otherwise. Raise SCHEMA_VERSION, then update both numbers here.
    columns = "".join(f"{column.name}:{column.sql_type};" for column in COLUMNS)
    digest = hashlib.sha256(columns.encode()).hexdigest()[:12]
    assert (SCHEMA_VERSION, digest) == (12, "a58fdd1e2c27")


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
        "import sys; from loraq_sim.results.store import ResultStore\n"
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
        "import sys, time; from loraq_sim.results.store import ResultStore\n"
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
        f'{sys.executable} -c "from loraq_sim.results.store import ResultStore; '
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


# ---------------------------------------------------------------- reading leaves nothing behind


def listing(folder):
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_reading_leaves_no_file_beside_the_store(path):
    fill(path, [result()])
    before = listing(path.parent)
    with ResultStore.open(path) as store:
        assert len(store.rows()) == 1
        store.provenance()
        store.planned()
        assert listing(path.parent) == before
    assert listing(path.parent) == before


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_a_killed_writers_log_is_read_and_left_as_it_is(path, tmp_path_factory, index):
    copied = tmp_path_factory.mktemp("killed") / path.name
    with ResultStore.open(path, create=True) as store:
        store.add("case0", result())
        for end in ("", "-wal") if index == "lost" else ("", "-wal", "-shm"):
            shutil.copyfile(f"{path}{end}", f"{copied}{end}")
    before = listing(copied.parent)
    assert before[f"{path.name}-wal"]
    with ResultStore.open(copied) as store:
        assert [row["case_id"] for row in store.rows()] == ["case0"]
    # The index is scratch memory of whoever has the file open.
    after = listing(copied.parent)
    assert after.keys() == before.keys()
    assert [after[f"{path.name}{end}"] for end in ("", "-wal")] == [
        before[f"{path.name}{end}"] for end in ("", "-wal")
    ]


def test_an_open_reader_sees_what_a_later_writer_adds(path):
    fill(path, [result()])
    with ResultStore.open(path) as reader:
        assert len(reader.rows()) == 1
        with ResultStore.open(path, create=True) as writer:
            writer.add("later", result("b"))
            assert len(reader.rows()) == 2
            writer.add("last", result("c"))
            assert len(reader.rows()) == 3
        assert len(reader.rows()) == 3


def test_a_reader_between_two_writers_sees_the_second(path):
    fill(path, [result()])
    with ResultStore.open(path) as reader:
        fill(path, [result(), result("b")])
        assert len(reader.rows()) == 2
        assert len(reader.planned()) == 0


def test_a_file_that_is_no_store_is_closed_again(path):
    path.write_bytes(b"SQLite format 3\0" + bytes(5000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(StoreError):
            ResultStore.open(path)
        gc.collect()


# ---------------------------------------------------------------- checksums and older stores

OLD_SCHEMA = f"""
CREATE TABLE rows (
    case_id TEXT PRIMARY KEY,
    {", ".join(f'"{column.name}" {column.sql_type}' for column in COLUMNS)},
    extra TEXT NOT NULL DEFAULT '{{}}'
);
CREATE TABLE runs (run INTEGER PRIMARY KEY AUTOINCREMENT, provenance TEXT NOT NULL);
CREATE TABLE planned (case_id TEXT PRIMARY KEY, run INTEGER NOT NULL, position INTEGER NOT NULL);
PRAGMA application_id = {0x4C6F5261};
PRAGMA user_version = 2;
"""


def fill_old(path, rows):
    """A store as releases before checksums wrote it."""
    connection = sqlite3.connect(path)
    connection.executescript(OLD_SCHEMA)
    names = ", ".join(f'"{name}"' for name in COLUMN_NAMES)
    marks = ", ".join("?" * len(COLUMN_NAMES))
    for index, row in enumerate(rows):
        connection.execute(
            f"INSERT INTO rows (case_id, {names}) VALUES (?, {marks})",
            [f"case{index}", *(row[name] for name in COLUMN_NAMES)],
        )
    connection.execute("INSERT INTO runs (provenance) VALUES ('{\"seed\": 3}')")
    connection.commit()
    connection.close()


def query(path, text, *values):
    connection = sqlite3.connect(path)
    with connection:
        found = connection.execute(text, values).fetchall()
    connection.close()
    return found


def test_an_older_store_is_read_as_it_is(path, tmp_path):
    rows = [result(), result("b", output_error=0.5)]
    fill_old(path, rows)
    before = path.read_bytes()
    with ResultStore.open(path) as store:
        found = [row | {"case_id": f"case{index}"} for index, row in enumerate(rows)]
        assert store.rows() == found
        assert store.done(["case0", "x"]) == {"case0"}
        assert store.provenance() == [{"run": 1, "seed": 3}]
        store.export_csv(tmp_path / "rows.csv")
        assert len(store.frame()) == 2
    assert path.read_bytes() == before


def test_an_older_store_is_brought_up_to_date_when_written(path):
    rows = [result(), result("b", pareto=False)]
    fill_old(path, rows)
    with ResultStore.open(path, create=True) as store:
        store.add("case2", result("c"))
        assert [row["layer"] for row in store.rows()] == ["a", "b", "c"]
        assert store.drop_damaged() == []
    assert query(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    query(path, "UPDATE rows SET output_error=0.26 WHERE case_id='case1'")
    with ResultStore.open(path) as store, pytest.raises(StoreError, match="layer 'b'"):
        store.rows()


SINCE_V3 = (
    *("clipped_count", "first_clipped", "m_source", "rotation", "smooth"),
    *("peak_activation_bytes", "working_set_bytes", "fits_in"),
)
V3_COLUMNS = [c for c in COLUMNS if c.name not in SINCE_V3]


def fill_version_3(path, rows):
    """A store as the release before clipped values were counted wrote it: with checksums."""
    schema = OLD_SCHEMA.replace("user_version = 2", "user_version = 3").replace(
        "extra TEXT NOT NULL DEFAULT '{}'",
        "extra TEXT NOT NULL DEFAULT '{}', checksum TEXT NOT NULL DEFAULT ''",
    )
    for name in SINCE_V3:
        column = next(f'"{c.name}" {c.sql_type}, ' for c in COLUMNS if c.name == name)
        schema = schema.replace(column, "")
    connection = sqlite3.connect(path)
    connection.executescript(schema)
    sealed = [("case_id", "TEXT"), ("extra", "TEXT"), *((c.name, c.sql_type) for c in V3_COLUMNS)]
    for index, row in enumerate(rows):
        values = {"case_id": f"case{index}", "extra": "{}"} | row
        plain = [values[name] for name, _ in sealed]
        blobs = [
            v.encode() if kind == "TEXT" and v is not None else v
            for v, (_, kind) in zip(plain, sealed, strict=True)
        ]
        blobs = [int(v) if isinstance(v, bool) else v for v in blobs]
        checksum = hashlib.blake2b(repr(tuple(blobs)).encode(), digest_size=8).hexdigest()
        names = ", ".join(f'"{name}"' for name, _ in sealed)
        marks = ", ".join("?" * (len(sealed) + 1))
        connection.execute(
            f"INSERT INTO rows ({names}, checksum) VALUES ({marks})", [*plain, checksum]
        )
    connection.commit()
    connection.close()


def test_smoothing_of_an_older_store_is_in_its_column(path):
    options = '{"fused": false, "smooth": 0.3}'
    fill_version_3(path, [result(options=options)])
    for create in (False, True):
        with ResultStore.open(path, create=create) as store:
            (row,) = store.rows()
        assert (row["smooth"], row["options"]) == (0.3, '{"fused": false}')


def test_a_store_without_the_newest_columns_is_read_and_brought_up_to_date(path):
    rows = [result(), result("b", output_error=0.5), result("c")]
    fill_version_3(path, rows)
    query(path, "UPDATE rows SET output_error=0.7 WHERE layer='b'")
    before = path.read_bytes()
    with ResultStore.open(path) as store:
        assert store.done(["case0", "case1", "case2"]) == {"case0", "case2"}
        (found,) = store.rows(["case0"])
        assert found == rows[0] | {"case_id": "case0"}
        assert found["clipped_count"] is None
        with pytest.raises(StoreError, match="layer 'b'"):
            store.rows()
    assert path.read_bytes() == before
    with ResultStore.open(path, create=True) as store:
        # What was damaged before the update is not taken for whole by it.
        assert store.drop_damaged() == ["layer 'b', split 'W4A4'"]
        store.add("case3", result("d", clipped_count=3, first_clipped="y row 2"))
        assert [row["clipped_count"] for row in store.rows()] == [None, None, 3]
    assert query(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]


def test_a_row_whose_output_is_not_finite_is_kept_and_done(path):
    fill(path, [result(status="overflow", output_error=math.inf, clipped_count=32)])
    with ResultStore.open(path) as store:
        (row,) = store.rows()
        assert (row["status"], row["output_error"]) == ("overflow", math.inf)
        assert store.done([row["case_id"]]) == {row["case_id"]}
        assert store.frame()["output_error"].tolist() == [math.inf]


def test_an_unfinished_update_of_an_older_store_is_undone(path, monkeypatch):
    fill_old(path, [result()])
    broken = {2: (*store_file._MIGRATIONS[2], "no SQL")}
    monkeypatch.setattr(store_file, "_MIGRATIONS", broken)
    with pytest.raises(StoreError, match="syntax error"):
        ResultStore.open(path, create=True)
    monkeypatch.undo()
    with ResultStore.open(path) as store:
        assert len(store.rows()) == 1
    assert query(path, "PRAGMA user_version") == [(2,)]


def test_every_flipped_bit_of_a_row_is_noticed(path):
    """One bit at a time in the bytes of the row itself; the rest of its page SQLite checks."""
    with ResultStore.open(path, create=True) as store:
        store.add("c" * 64, result(layer="only", output_error=0.1, sqnr_db=20.0, note="x"))
        (expected,) = store.rows()
    content = path.read_bytes()
    start, end = content.index(b"c" * 64), content.index(b'{"note": "x"}') + 13
    dice = np.random.default_rng(0)
    for place in dice.choice(np.arange(start * 8, end * 8), 150, replace=False):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match="damaged"), ResultStore.open(path) as store:
            store.rows()
    path.write_bytes(content)
    with ResultStore.open(path) as store:
        assert store.rows() == [expected]


@pytest.fixture
def damaged(path):
    """Three rows, of which the second has changed on the disk."""
    fill(path, [result("a"), result("b"), result("c")])
    query(path, "UPDATE rows SET sqnr_db=99.0 WHERE layer='b'")
    return path


def test_a_damaged_row_is_named_and_not_read(damaged):
    with ResultStore.open(damaged) as store:
        with pytest.raises(StoreError, match=r"1 row is damaged.*layer 'b', split 'W4A4'; run"):
            store.rows()
        with pytest.raises(StoreError, match="damaged"):
            store.frame()
        # The others are as good as before.
        assert [row["layer"] for row in store.rows(["case0", "case2"])] == ["a", "c"]


def test_a_damaged_row_counts_as_not_done_and_is_replaced(damaged):
    with ResultStore.open(damaged, create=True) as store:
        assert store.done(["case0", "case1", "case2"]) == {"case0", "case2"}
        assert store.drop_damaged() == ["layer 'b', split 'W4A4'"]
        assert store.drop_damaged() == []
        store.add("case1", result("b"))
        assert [row["sqnr_db"] for row in store.rows()] == [None] * 3


def test_a_label_that_is_not_known_leaves_the_column_as_it_is(tmp_path):
    with ResultStore.open(tmp_path / "r.sqlite", create=True) as store:
        store.add("one", {"layer": "a", "status": "ok", "dump": "old.pt", "group": "q"})
        store.relabel({"one": {"dump": "new.pt", "group": None}})
        (row,) = store.rows()
    assert (row["dump"], row["group"]) == ("new.pt", "q")


def test_marks_and_labels_never_make_a_damaged_row_good(damaged):
    with ResultStore.open(damaged, create=True) as store:
        store.set_pareto(["case1"])
        store.relabel({"case1": {"dump": "x.pt", "group": "g"}, "case0": {"dump": "x.pt"}})
        assert store.done(["case0", "case1"]) == {"case0"}
        (row,) = store.rows(["case0"])
        assert (row["dump"], row["pareto"]) == ("x.pt", False)
