"""Why a split loses, read from measurements that its row holds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loraq_sim.results.choice import Candidate

__all__ = ["diagnoses"]


def diagnoses(
    candidates: Sequence[Candidate],
    rows: Sequence[Mapping[str, Any]],
    error: str,
    chosen: int | None,
) -> Iterator[str]:
    """One sentence for each known reason, the plainest case of it named."""
    yield from ()
