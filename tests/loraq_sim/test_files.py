import errno
import os
import threading
from pathlib import Path

import pytest

from loraq_sim.errors import DumpError, InputError
from loraq_sim.files import make_folder, refuse_existing, replaced_file, write_file, write_together


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    with replaced_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), RecursionError("deep")])
def test_any_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replaced_file(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file\nbacktrace"), "PytorchStreamWriter"),
    ],
)
def test_a_refusing_disk_is_one_line(tmp_path, error, reason):
    path = tmp_path / "a.bin"
    match = f"a.bin: cannot be written: {reason}"
    with pytest.raises(DumpError, match=match) as caught, replaced_file(path, error=DumpError):
        raise error
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_file_that_cannot_be_read_meanwhile_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), replaced_file(tmp_path / "a.bin"):
        (tmp_path / "source").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_a_long_name_fits(tmp_path):
    real = tmp_path / ("n" * 255)
    real.write_bytes(b"old")
    (tmp_path / "link").symlink_to(real)
    write_file(tmp_path / "link", "new\n")
    assert (tmp_path / "link").is_symlink()
    assert real.read_bytes() == b"new\n"


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refuse_existing(pipe, overwrite=False)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, b"through")
    reader.join()
    assert got == [b"through"]
    assert pipe.is_fifo()


def test_what_is_there_is_refused_a_broken_link_too(tmp_path):
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    refuse_existing(tmp_path / "a", overwrite=False)
    refuse_existing(tmp_path / "b", overwrite=True)
    with pytest.raises(DumpError, match="b is there already; choose another name, or --force"):
        refuse_existing(tmp_path / "a", tmp_path / "b", overwrite=False, error=DumpError)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/in: cannot make this folder .Not a directory"):
        make_folder(tmp_path / "file" / "in")


def fill_disk(monkeypatch, after):
    """Let writes to temporary files fail once `after` of them are open."""
    opened, count = Path.open, []

    def full(self, *args, **options):
        if self.suffix == ".tmp":
            count.append(self)
            if len(count) > after:
                self.touch()
                return opened(Path("/dev/full"), "wb")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", full)


needs_dev_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="this system has no /dev/full, whose every write fails"
)


@needs_dev_full
@pytest.mark.parametrize("after", [0, 1, 2])
def test_files_that_belong_together_appear_together(tmp_path, monkeypatch, after):
    (tmp_path / "a").write_text("old")
    contents = {tmp_path / "a": "1", tmp_path / "b": b"2", tmp_path / "c": "3"}
    with monkeypatch.context() as patch:
        fill_disk(patch, after)
        with pytest.raises(InputError, match="cannot be written: No space left on device"):
            write_together(contents)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
    write_together(contents)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "1", "b": "2", "c": "3"}
