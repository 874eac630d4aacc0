"""Which file is meant where a command takes a result store."""

from pathlib import Path

__all__ = ["store_file"]


def store_file(path: Path) -> Path:
    """The store in a folder that a sweep wrote, or the file itself."""
    return path / "results.sqlite" if path.is_dir() else path
