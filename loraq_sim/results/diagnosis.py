"""Why a split loses, read from what its total says of its roundings.

Rounding P between the factors of a branch is a reason where a P of 16 bits, whose error is measured
beside that of the split, would take away a fifth of the error or more. Of the answer it is said
what causes at least half of its squared error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.results.choice import Candidate
from loraq_sim.results.units import is_missing
from loraq_sim.results.wording import value_text

__all__ = ["diagnoses"]

_MOST_OF_IT = 0.5
# A cure that takes less than a fifth of the error is none.
_WORTH_IT = 0.8

Row = Mapping[str, Any]


def diagnoses(
    candidates: Sequence[Candidate], rows: Sequence[Row], error: str, chosen: int | None
) -> list[str]:
    """A sentence for the split that rounding P hurts most, and one for what limits the answer."""
    if error != "output_error":
        return []
    cases = list(zip(candidates, rows, strict=True))
    found = []
    losing = [
        (candidate, row)
        for index, (candidate, row) in enumerate(cases)
        if index != chosen and _is_hurt_by_p(candidate, row)
    ]
    if losing:
        found.append(_p_sentence(*max(losing, key=lambda case: case[1]["p_error_share"]), cases))
    if chosen is not None:
        found += _what_limits(*cases[chosen])
    return found


def _is_hurt_by_p(candidate: Candidate, row: Row) -> bool:
    share, wide = row.get("p_error_share"), row.get("wide_p_error")
    if is_missing(share) or is_missing(wide) or not math.isfinite(candidate.error):
        return False
    return share > 0 and wide <= _WORTH_IT * candidate.error


def _p_sentence(candidate: Candidate, row: Row, cases: Sequence[tuple[Candidate, Row]]) -> str:
    text = f"{candidate.label} loses because P rounded to {_bits_text(row.get('p_format'))} causes "
    text += f"{_share_text(row['p_error_share'])} of its squared error; a 16-bit P gives "
    text += value_text("output_error", row["wide_p_error"])
    main = candidate.split.partition("+")[0]
    plain = [c for c, _ in cases if c.split == main and c.error <= candidate.error]
    if plain:
        told = value_text("output_error", plain[0].error)
        text += f", and {main} without a branch {told}"
    return f"{text}."


def _what_limits(candidate: Candidate, row: Row) -> list[str]:
    for name, what in (
        ("p_error_share", f"rounding P to {_bits_text(row.get('p_format'))}"),
        ("activation_error_share", "rounding the activations of its main branch"),
    ):
        share = row.get(name)
        if not is_missing(share) and share >= _MOST_OF_IT:
            return [f"{_share_text(share)} of the squared error of {candidate.label} is {what}."]
    return []


def _share_text(share: float) -> str:
    return f"{100 * min(share, 1.0):.0f} %"


def _bits_text(fmt: Any) -> str:
    try:
        return f"{parse_format(fmt).element.bits} bits"
    except (InputError, TypeError, ValueError, AttributeError):
        return "its format"
