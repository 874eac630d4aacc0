"""The one error this package raises on purpose, and how an unknown name is reported."""

import difflib
from collections.abc import Iterable

__all__ = ["AcceleratorError", "nearest"]


class AcceleratorError(ValueError):
    """An accelerator file, its name, or a workload breaks a stated rule."""


def nearest(value: object, valid: Iterable[str]) -> str:
    """Advice for a wrong name: the closest valid names, then all of them.

    >>> nearest("capacity_byte", ["capacity_bytes", "reserved_bytes"])
    "did you mean 'capacity_bytes'? Known: capacity_bytes, reserved_bytes"
    """
    names = list(valid)
    near = difflib.get_close_matches(str(value)[:100].lower(), names, n=1, cutoff=0.55)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names)}"
