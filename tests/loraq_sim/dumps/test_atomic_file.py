import errno

import pytest

from loraq_sim.dumps.atomic_file import replaced_file
from loraq_sim.errors import DumpError


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    with replaced_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
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
    match = f"cannot be written: {reason}"
    with pytest.raises(DumpError, match=match) as caught, replaced_file(path):
        raise error
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
