"""File systems without locks, and without memory that processes share."""

import errno
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from loraq_sim.errors import StoreError
from loraq_sim.results import store_snapshot as writer_lock
from loraq_sim.results.store import ResultStore
from loraq_sim.results.store_snapshot import WriterLock

ROW = {"layer": "a", "split": "W4A4", "status": "ok", "output_error": 0.5}

NO_FLOCK = "#include <errno.h>\nint flock(int fd, int op) { errno = %s; return -1; }\n"
# Mappings of a file whose name ends in -shm fail, as on file systems that cannot share memory.
NO_SHARED_MEMORY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static int is_index(int fd, int flags) {
  char link[64], name[4096];
  if (fd < 0 || !(flags & MAP_SHARED)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, name, sizeof name - 1);
  return n >= 4 && !memcmp(name + n - 4, "-shm", 4);
}
#define FAKE(NAME) void *NAME(void *a, size_t l, int p, int f, int fd, off_t o) { \\
  static void *(*real)(void *, size_t, int, int, int, off_t); \\
  if (!real) real = dlsym(RTLD_NEXT, #NAME); \\
  if (is_index(fd, f)) { errno = ENODEV; return MAP_FAILED; } \\
  return real(a, l, p, f, fd, o); }
FAKE(mmap)
FAKE(mmap64)
"""

WRITE = """
import sys
from loraq_sim.results.store import ResultStore
with ResultStore.open(sys.argv[1], create=True) as store:
    store.add(sys.argv[2], {"layer": sys.argv[2], "split": "W4A4", "status": "ok"})
    print(len(store.rows()), store._connection.execute("PRAGMA journal_mode").fetchone()[0])
"""


@pytest.fixture
def without(tmp_path):
    """Environment in which a C source takes the place of a system call."""

    def build(source):
        if shutil.which("gcc") is None or sys.platform != "linux":
            pytest.skip("gcc makes the file system of this test")
        (tmp_path / "fake.c").write_text(source)
        library = tmp_path / "fake.so"
        command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "fake.c"), "-ldl"]
        subprocess.run(command, check=True)
        return dict(os.environ, LD_PRELOAD=str(library))

    return build


def write(path, case, environment):
    command = [sys.executable, "-c", WRITE, str(path), case]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_store_is_written_where_there_is_no_flock(tmp_path, without, code):
    environment = without(NO_FLOCK % code)
    path = tmp_path / "results.sqlite"
    for number in (1, 2):
        done = write(path, f"case{number}", environment)
        assert (done.returncode, done.stdout.split()[:1]) == (0, [str(number)]), done.stderr
    assert sorted(p.name for p in tmp_path.glob("results*")) == ["results.sqlite"]
    # Who writes is known without flock too.
    with ResultStore.open(path, create=True):
        own = path.with_name("results.sqlite.lock-owner")
        own.write_text(writer_lock._this_process())
        refused = write(path, "case3", environment)
        own.unlink()
    assert f"is being written by process {os.getpid()};" in refused.stderr


def test_a_store_is_written_where_no_memory_is_shared(tmp_path, without):
    environment = without(NO_SHARED_MEMORY)
    new, old = tmp_path / "new.sqlite", tmp_path / "old.sqlite"
    with ResultStore.open(old, create=True) as store:
        store.add("case0", ROW)
        # Killed here, with its log: the copy below is what it leaves behind.
        for end in ("", "-wal", "-shm"):
            shutil.copy(f"{old}{end}", tmp_path / f"killed.sqlite{end}")
    for path, rows in ((new, 1), (old, 2), (tmp_path / "killed.sqlite", 2)):
        done = write(path, "case1", environment)
        assert (done.returncode, done.stdout.split()) == (0, [str(rows), "delete"]), done.stderr
        with ResultStore.open(path) as store:
            assert len(store.rows([f"case{n}" for n in (0, 1)])) == rows
        assert not Path(f"{path}-wal").exists()
    assert write(tmp_path / "usual.sqlite", "c", os.environ).stdout.split() == ["1", "wal"]


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(writer_lock, "_lock_exclusively", refuse)


def test_two_writers_exclude_each_other_without_locks(tmp_path, no_locks):
    target = tmp_path / "s.sqlite"
    first = WriterLock(target)
    told = []
    with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()}; wait"):
        WriterLock(target, wait_s=0.3, on_wait=told.append)
    assert told == [f"{target} is being written by process {os.getpid()}"]
    first.release()
    WriterLock(target).release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, no_locks):
    target = tmp_path / "s.sqlite"
    own = tmp_path / "s.sqlite.lock-owner"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = {"host": platform.node(), "started": ""}
    for holder in (
        here | {"process": ended.pid},
        # Its number is used again, by a process that began at another time.
        here | {"process": os.getpid(), "started": "1"},
    ):
        own.write_text(json.dumps(holder))
        WriterLock(target).release()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"host": "else\\u001b[2J", "process": 7, "started": "1"}',
            r"process 7 on 'else\\x1b\[2J'",
        ),
        ("", "another process"),
        ("[" * 5000, "another process"),
        ('{"host": 3, "process": 1e999, "started": []}', "another process"),
    ],
)
def test_a_lock_of_elsewhere_is_named_with_what_to_do(tmp_path, no_locks, content, message):
    own = tmp_path / "s.sqlite.lock-owner"
    own.write_text(content)
    with pytest.raises(StoreError, match=rf"{message} .*remove \S+lock-owner\)") as caught:
        WriterLock(tmp_path / "s.sqlite")
    assert str(caught.value).isprintable()
    assert own.exists()


def test_a_pipe_in_place_of_a_lock_does_not_hang(tmp_path, no_locks):
    os.mkfifo(tmp_path / "s.sqlite.lock-owner")
    with pytest.raises(StoreError, match="another process"):
        WriterLock(tmp_path / "s.sqlite")


def test_a_disk_that_refuses_is_no_lack_of_shared_memory(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise error

    monkeypatch.setattr("loraq_sim.results.store_snapshot.sqlite3.connect", refuse)
    with pytest.raises(StoreError, match="the disk refuses"):
        ResultStore.open(tmp_path / "s.sqlite", create=True)
