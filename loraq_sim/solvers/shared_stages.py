"""What solves of one weight have in common, kept between them.

The stages of a solve that come before its branch is rounded depend on the weight, the main format,
the rank, the preset and the seed only: branch formats of one rank share them, and equal problems
everything. A result is the same bytes with and without sharing.
"""

import hashlib
from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np

__all__ = ["SharedStages", "array_key"]

_Result = TypeVar("_Result")


class SharedStages:
    """Results of stages by what they depend on; hand the same one to several calls of `solve`."""

    def __init__(self) -> None:
        self._results: dict[Hashable, object] = {}

    def recall(self, key: Hashable, compute: Callable[[], _Result]) -> _Result:
        """The result kept under `key`, computed where there is none. Not to be modified."""
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]


def array_key(values: np.ndarray) -> bytes:
    """Digest of `values`, so that stages of different weights are not mixed up."""
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()
