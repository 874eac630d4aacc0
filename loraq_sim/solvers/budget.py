"""Bytes of a low-rank branch, and the rank that fits a byte budget."""

import re

from loraq_sim.errors import InputError
from loraq_sim.formats import Format, parse_format

__all__ = ["branch_bytes", "rank_for_budget"]

_BUDGET = re.compile(r"([a-z0-9_/]+)@([1-9]\d{0,6})")


def branch_bytes(n: int, k: int, rank: int, fmt: Format) -> int:
    """Stored bytes of L (n, rank) and R (rank, k) in `fmt`; 0 for rank 0."""
    if rank == 0:
        return 0
    return fmt.storage_bytes((n, rank)) + fmt.storage_bytes((rank, k))


def rank_for_budget(n: int, k: int, fmt: Format, budget: str) -> int:
    """Largest rank whose branch in `fmt` takes no more bytes than `budget`.

    Parameters
    ----------
    n, k : int
        Shape of the weight.
    fmt : Format
        Format of both factors.
    budget : str
        ``"fp16@32"``: the bytes of a rank-32 branch stored as fp16. The rank is at most min(n, k).

    Raises
    ------
    InputError
        If `budget` is malformed or too small for one rank.
    """
    match = _BUDGET.fullmatch(str(budget).strip().lower())
    if match is None:
        raise InputError(f"budget must look like 'fp16@32' (format@rank), got {budget!r}")
    allowed = branch_bytes(n, k, int(match.group(2)), parse_format(match.group(1)))
    low, high = 0, min(n, k)
    while low < high:
        middle = (low + high + 1) // 2
        if branch_bytes(n, k, middle, fmt) <= allowed:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise InputError(
            f"budget {budget!r} is {allowed} bytes for a weight of shape ({n}, {k}), less than the "
            f"{branch_bytes(n, k, 1, fmt)} bytes of a rank-1 branch in {fmt}"
        )
    return low
