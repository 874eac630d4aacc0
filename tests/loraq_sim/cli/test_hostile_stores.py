"""Stores from strangers, given to every command that reads one: a line, never a traceback."""

import json
import os
import random
import shutil
import signal
import sqlite3
import threading
import time

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.errors import StoreError
from loraq_sim.results.rows import COLUMN_NAMES, COLUMNS
from loraq_sim.results.store import ResultStore
from loraq_sim.results.store_file import ROW_CHECKSUM, _row_checksum, explained
from loraq_sim.results.store_snapshot import restrict

FACTS = {
    **{"started": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "jobs": 1, "command": ["sweep"]},
    **{"plan": {"dump": "d.pt", "accelerators": ["aie2"]}, "versions": {"numpy": "2"}},
    **{"accelerator_digests": {"aie2": "0" * 64}, "dump_digest": "1" * 64, "shard": ""},
}


def row(layer, split, error, **changes):
    return {
        **{"layer": layer, "kind": "linear", "group": layer, "split": split, "method": "rtn"},
        **{"m": 4, "n": 8, "k": 16, "tokens": 2, "calls_per_step": 1, "preset": "fast"},
        **{"accelerator": "aie2", "seed": 0, "rank": 0, "weight_bytes": 64},
        **{"bits_per_weight": 4.0, "weight_error": error, "output_error": error},
        **{"sqnr_db": 20.0, "cosine": 0.9, "max_abs_error": 1.0, "overflow_count": 0},
        **{"latency_s": 1e-3 * error, "energy_j": 1e-3, "dram_bytes": 100, "cycles": 10},
        **{"status": "ok", "message": "", "seconds": 0.1, "dump": "d.pt", "family": "int"},
        **{"group_size": 64, "bound": "memory", "utilization": 0.5, "acc_bits": 32},
        **{"safe_acc_bits": 20},
        **changes,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "results.sqlite"
    with ResultStore.open(path, create=True) as store:
        rows = {
            f"{layer}-{split}": row(layer, split, error)
            for layer in "abc"
            for split, error in (("W4A4", 0.2), ("W8A8", 0.1), ("W4A8", 0.15))
        }
        store.begin_run(FACTS, list(rows))
        store.add_all(rows)
    return path


COLUMNS_OF_OLD = ", ".join(f'old."{name}"' for name in ("case_id", *COLUMN_NAMES, "extra"))
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"

# Name: statements after which the file is no store that a release wrote.
SCHEMAS = {
    "endless view": f"ALTER TABLE rows RENAME TO old; CREATE VIEW rows AS {ENDLESS} "
    f"SELECT {COLUMNS_OF_OLD}, old.checksum FROM old, c;",
    "huge view": "ALTER TABLE runs RENAME TO old; CREATE VIEW runs AS "
    "SELECT run, hex(zeroblob(400000000)) AS provenance FROM old;",
    "view of planned": "ALTER TABLE planned RENAME TO old; CREATE VIEW planned AS "
    "SELECT * FROM old UNION ALL SELECT * FROM old;",
    "deleting trigger": "CREATE TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM rows; END;",
    "endless trigger": "CREATE TRIGGER t AFTER INSERT ON runs BEGIN INSERT INTO runs(provenance) "
    f"{ENDLESS} SELECT 'x' FROM c; END;",
    "generated column": "ALTER TABLE rows ADD COLUMN boom TEXT GENERATED ALWAYS AS "
    "(hex(zeroblob(100000000))) VIRTUAL;",
    "default": "ALTER TABLE rows ADD COLUMN boom TEXT DEFAULT 'x';",
    "index": "CREATE INDEX evil ON rows(abs(rank));",
    "partial index": "CREATE INDEX evil ON rows(rank) WHERE length(layer) > 3;",
    "no planned": "DROP TABLE planned;",
    "no runs": "DROP TABLE runs;",
    "no rows": "ALTER TABLE rows RENAME TO old;",
    "checked": "DROP TABLE planned; CREATE TABLE planned (case_id TEXT PRIMARY KEY, "
    "run INTEGER NOT NULL, position INTEGER NOT NULL CHECK (abs(position) >= 0));",
    "virtual": "DROP TABLE planned; CREATE VIRTUAL TABLE planned USING fts5(case_id, run);",
    "another table": "CREATE TABLE more (x);",
}

# Name: a column and what stands in it, under a right checksum.
CELLS = {
    "deep options": ("options", "[" * 100_000 + "]" * 100_000),
    "no JSON options": ("options", "{datapath}"),
    "list options": ("options", "[1]"),
    "odd asked": ("options", '{"asked": [1]}'),
    "odd asked rank": ("options", '{"asked": {"rank": {}}}'),
    "odd asked split": ("options", '{"asked": {"split": null}}'),
    "odd datapath": ("options", '{"datapath": 3}'),
    "huge options": ("options", '{"smooth": ' + "9" * 5000 + "}"),
    "long integer": ("options", '{"smooth": ' + "9" * 4000 + "}"),
    "deep extra": ("extra", "[" * 100_000 + "]" * 100_000),
    "extra is a column": ("extra", '{"layer": {"x": 1}}'),
    "extra is the case": ("extra", '{"case_id": 3}'),
    "huge extra": ("extra", '{"x": ' + "9" * 5000 + "}"),
    "long extra": ("extra", '{"x": ' + "9" * 4000 + "}"),
    "text m": ("m", "many"),
    "blob layer": ("layer", b"\xff\x00"),
    "blob m": ("m", b"\x00" * 100),
    "no layer": ("layer", None),
    "no split": ("split", None),
    "no accelerator": ("accelerator", None),
    "no status": ("status", None),
    "odd status": ("status", "\x1b[2J"),
    "no dump": ("dump", None),
    "no error": ("output_error", None),
    "no weight error": ("weight_error", None),
    "no latency": ("latency_s", None),
    "infinite latency": ("latency_s", float("inf")),
    "infinite error": ("output_error", float("inf")),
    "vast error": ("output_error", 1e308),
    "vast weight error": ("weight_error", 1e308),
    "vast latency": ("latency_s", 1e308),
    "vast output": ("output_rms", 1e308),
    "negative error": ("output_error", -1.0),
    "zero latency": ("latency_s", 0.0),
    "negative latency": ("latency_s", -1e300),
    "huge bytes": ("weight_bytes", 2**62),
    "huge m": ("m", 2**62),
    "negative m": ("m", -(2**62)),
    "zero n": ("n", 0),
    "negative n": ("n", -5),
    "no k": ("k", None),
    "huge calls": ("calls_per_step", 2**62),
    "negative calls": ("calls_per_step", -1),
    "zero calls": ("calls_per_step", 0),
    "vast sums": ("safe_acc_bits", 2**40),
    "fraction": ("rank", 0.5),
    "odd accelerator": ("accelerator", "/dev/zero.yaml"),
    "odd split": ("split", "W" * 5000),
    "odd family": ("family", "\x1b"),
    "odd group": ("group_size", -1),
    "negative rank": ("rank", -3),
    "long layer": ("layer", "x" * 100_000),
    "lines": ("layer", "a\nb\nc"),
}

# Name: the provenance of the run.
RUNS = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "list": "[]",
    "number": "3",
    "no JSON": "{",
    "huge": '{"seconds": ' + "9" * 5000 + "}",
    "long": '{"seconds": ' + "9" * 4000 + "}",
    "odd plan": '{"plan": 3}',
    "odd plan parts": '{"plan": {"accelerators": {"a": 1}, "dump": [1], "splits": 3}}',
    "odd accelerators": '{"plan": {"accelerators": ["/dev/zero", "\\u001b", 3]}}',
    "odd digests": '{"accelerator_digests": [1, 2]}',
    "odd digest": '{"accelerator_digests": {"aie2": {"x": 1}}}',
    "odd versions": '{"versions": 7}',
    "odd command": '{"command": {"a": 1}}',
    "odd notes": '{"notes": "abc"}',
    "odd merged": '{"merged": "x"}',
    "odd merged parts": '{"merged": [1]}',
    "odd started": '{"started": {"a": 1}}',
    "odd counts": '{"n_ok": "many"}',
    "odd seconds": '{"seconds": true}',
    "nulls": json.dumps(dict.fromkeys(FACTS)),
}

COMMANDS = (
    ("pareto", "{store}"),
    ("pareto", "{store}", "--by", "layer", "--format", "csv"),
    ("pareto", "{store}", "--format", "json"),
    ("report", "{store}", "--page-only", "--out", "{folder}/r.html", "--force"),
    ("compare", "{store}", "{base}"),
    ("compare", "{base}", "{store}"),
    ("export", "{store}", "--csv", "{folder}/e.csv", "--parquet", "{folder}/e.parquet", "--force"),
    ("merge", "{folder}/m", "{store}", "{base}", "--force"),
    ("allocate", "{store}", "--budget", "output_error=50%"),
    ("allocate", "{store}", "--budget", "latency_s=1ms", "--out", "{folder}/a", "--force"),
)


def run_all(store, base, folder, commands=COMMANDS):
    """Exit codes and last lines of every command; fails where one ends in anything else."""
    found = []
    for words in commands:
        words = [word.format(store=store, base=base, folder=folder) for word in words]
        started = time.process_time()
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            f"{words}: {result.exception!r}"
        )
        assert result.exit_code in (0, 1, 2, 3), (words, result.output)
        assert time.process_time() - started < 20, words
        if result.exit_code == 2:
            lines = result.stderr.strip().splitlines()
            assert lines[-1].startswith("error: "), result.stderr
            assert len(lines[-1]) < 1500
        found.append((result.exit_code, result.output))
    return found


def changed(base, folder, statements="", *changes):
    path = folder / "results.sqlite"
    shutil.copy(base, path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.create_function("row_checksum", -1, _row_checksum)
    try:
        connection.executescript(statements)
        for statement, values in changes:
            connection.execute(statement, values)
    finally:
        connection.close()
    return path


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_schema_would_run_is_not_run(base, tmp_path, name):
    try:
        store = changed(base, tmp_path, SCHEMAS[name])
    except sqlite3.OperationalError as error:
        pytest.skip(f"this SQLite has no such thing: {error}")
    before = store.read_bytes()
    commands = (*COMMANDS, ("sweep", "--hw", "aie2", "--layer-dump", "examples/minilm.pt",
                            "--layers", "*.2.*query", "--split", "W4A4", "--tokens", "4",
                            "--no-wait", "--quiet", "--out", str(tmp_path)))  # fmt: skip
    for code, output in run_all(store, base, tmp_path, commands):
        assert code == 2
        assert "is not a store that loraq-sim wrote: " in output
    assert store.read_bytes() == before


def test_what_a_damaged_schema_says_is_printable(base, tmp_path):
    statements = """
        PRAGMA writable_schema = ON;
        UPDATE sqlite_master SET type = 'in' || char(11) || 'ex' WHERE type = 'index';
        PRAGMA writable_schema = OFF;
    """
    store = changed(base, tmp_path, statements)
    for code, output in run_all(store, base, tmp_path, COMMANDS[:1]):
        assert code == 2
        assert "it holds the in\\x0bex" in output
        assert "\x0b" not in output


def sealed(base, folder, cells):
    """A copy of `base` whose first row has these cells and a right checksum."""
    one = "(SELECT MIN(rowid) FROM rows)"
    changes = [
        (f'UPDATE rows SET "{column}" = ? WHERE rowid = {one}', [value]) for column, value in cells
    ]
    changes.append((f"UPDATE rows SET checksum = {ROW_CHECKSUM}", []))
    return changed(base, folder, "", *changes)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_no_release_wrote_is_a_line_or_is_left_out(base, tmp_path, name):
    run_all(sealed(base, tmp_path, [CELLS[name]]), base, tmp_path)


@pytest.mark.parametrize(
    "columns", [("output_error", "weight_error"), ("latency_s", "energy_j"), ("output_rms",)]
)
def test_sums_of_vast_numbers_are_a_line_or_are_left_out(base, tmp_path, columns):
    """Every row has the number: squares, sums and ratios of them are beyond float64."""
    changes = [(f'UPDATE rows SET "{column}" = 1e308', []) for column in columns]
    store = changed(
        base, tmp_path, "", *changes, (f"UPDATE rows SET checksum = {ROW_CHECKSUM}", [])
    )
    run_all(store, base, tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_odd_provenance_is_a_line_or_is_shown(base, tmp_path, name):
    store = changed(base, tmp_path, "", ("UPDATE runs SET provenance = ?", [RUNS[name]]))
    run_all(store, base, tmp_path)


def test_an_odd_order_of_cases_is_a_line(base, tmp_path):
    for value in ("x", b"\x00", 2**62):
        changes = [("UPDATE planned SET position = ? WHERE rowid = 1", [value])]
        run_all(changed(base, tmp_path, "", *changes), base, tmp_path)


def test_a_huge_cell_is_not_read(base, tmp_path):
    text = "UPDATE runs SET provenance = '{\"a\": \"' || hex(zeroblob(50000000)) || '\"}'"
    store = changed(base, tmp_path, text)
    with (
        pytest.raises(StoreError, match="larger than the 32 MiB a store may hold"),
        ResultStore.open(store) as opened,
    ):
        opened.provenance()


@pytest.mark.parametrize("seed", range(4))
def test_random_cells_under_right_checksums(base, tmp_path, seed):
    """Combinations nobody thought of: several odd values in one row."""
    rng = random.Random(seed)
    texts = [
        "",
        "\x1b",
        "W4A4",
        "-",
        "{}",
        "null",
        "9" * 30,
        "a" * 300,
        "=1",
        "nan",
        "ok",
        "failed",
    ]
    numbers = [0, -1, 1, 2**62, -(2**62), 1e308, -1e308, 1e100, 5e-324, float("inf"), 0.5, 3]
    for _ in range(3):
        cells = []
        for column in rng.sample(COLUMNS, 6):
            choice = texts if column.sql_type == "TEXT" else numbers
            cells.append((column.name, rng.choice([*choice, None])))
        try:
            run_all(sealed(base, tmp_path, cells), base, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{cells}: {error}") from error


def test_ctrl_c_ends_a_statement_within_two_seconds(tmp_path, monkeypatch):
    connection = sqlite3.connect(":memory:")
    restrict(connection)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt), explained(tmp_path, "read"):
            connection.execute(f"{ENDLESS} SELECT COUNT(*) FROM c").fetchone()
    finally:
        signal.signal(signal.SIGINT, before)
        connection.close()
    assert time.monotonic() - started < 2.3
