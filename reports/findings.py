"""One sentence that a figure's title can state, read off the rows that are on the front.

The split named is the knee among those with the narrowest weights: the front point farthest below
the straight line from the cheapest to the most accurate one, with cost on a linear and error on a
logarithmic scale, both stretched to 0..1 (Satopaa et al., "Finding a Kneedle in a Haystack",
ICDCS Workshops 2011).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loraq_sim.results.columns import column_for
from reports.split_names import main_weight_bits

__all__ = [
    "best_trade",
    "comparison",
    "front_rows",
    "headline_rows",
    "knee",
    "name_of",
    "pareto_finding",
    "pareto_title",
]

Row = Mapping[str, Any]


def name_of(row: Row) -> str:
    """What a row is called in a picture: its ``label`` where it has one, else its split."""
    return str(row.get("label") or row["split"])


def front_rows(rows: Sequence[Row], x: str, y: str) -> list[Row]:
    """Rows marked ``pareto``, cheapest first."""
    return sorted((row for row in rows if row.get("pareto") == 1), key=lambda r: (r[x], -r[y]))


def knee(front: Sequence[Row], x: str, y: str) -> Row | None:
    """Front row with the best trade, None of an empty front.

    With two rows the more accurate one is taken, since the cheaper one is the reference.

    Parameters
    ----------
    front : sequence of rows
        Sorted by `x`; every row holds finite `x` and positive `y`.
    """
    if not front or (front[0][x], front[0][y]) == (front[-1][x], front[-1][y]):
        return front[0] if front else None
    first, last = front[0], front[-1]
    span_x = (last[x] - first[x]) or 1.0
    span_y = math.log(first[y] / last[y]) or 1.0

    def below_chord(row: Row) -> float:
        return 1 - (row[x] - first[x]) / span_x - math.log(row[y] / last[y]) / span_y

    return max(front[1:], key=below_chord)


def headline_rows(rows: Sequence[Row], x: str, y: str) -> list[Row]:
    """Front rows that a headline may speak of: those with main weights as narrow as the cheapest's.

    A front of 4-bit splits often ends in an 8-bit reference. It is drawn, but it answers another
    question than which 4-bit split to build. Where the cheapest row is alone in its width, all
    front rows count.
    """
    front = front_rows(rows, x, y)
    narrow = [row for row in front if _bits(row) == _bits(front[0])]
    return narrow if len(narrow) > 1 else front


def best_trade(rows: Sequence[Row], x: str, y: str) -> str | None:
    """Name of the row at the knee of the headline rows, None without a front."""
    best = knee(headline_rows(rows, x, y), x, y)
    return None if best is None else name_of(best)


def _bits(row: Row) -> int | None:
    return main_weight_bits(str(row["split"]))


def pareto_finding(rows: Sequence[Row], costs: Sequence[str], y: str) -> str:
    """What the best trade on the front gains and costs against the cheapest front row.

    The front is that of the first of `costs`; the price is told in all of them.

    Parameters
    ----------
    rows : sequence of rows
        Of one accelerator, with finite costs and positive `y`, and ``split`` and ``pareto``.
    """
    x = costs[0]
    front = headline_rows(rows, x, y)
    cost, error = column_for(x).heading, column_for(y).heading
    if not front:
        return f"No split on the front of {error} against {cost}"
    base, best = front[0], knee(front, x, y)
    if len(rows) == 1:
        return f"{name_of(base)} is the only split evaluated"
    if all((row[x], row[y]) == (base[x], base[y]) for row in rows):
        return f"All {len(rows)} splits have the same {error} and {cost}"
    if best[y] == base[y] or best[x] == base[x]:
        return f"{name_of(base)} has the least {error} and the least {cost} of {len(rows)} splits"
    return f"{name_of(best)} {comparison(best, base, costs, y)}"


def comparison(row: Row, base: Row, costs: Sequence[str], y: str) -> str:
    """What `row`, which has less error, gains and costs against `base`: a sentence without subject.

    Costs that one of the two does not hold, or that are zero in `base`, are not spoken of.

    >>> row, base = {"split": "W8A8", "e": 0.1, "t_s": 3.0}, {"split": "W4A4", "e": 0.2, "t_s": 2.0}
    >>> comparison(row, base, ["t_s"], "e")
    'halves the e of W4A4 for +50 % t'
    """
    gain = _gain(row[y] / base[y], column_for(y).heading, name_of(base))
    prices = [
        _price(row[key] / base[key], column_for(key).heading)
        for key in costs
        if base.get(key) and row.get(key) is not None
    ]
    return f"{gain} {' and '.join(prices)}".replace(" and for ", " and ").rstrip()


def pareto_title(groups: Mapping[str, Sequence[Row]], costs: Sequence[str], y: str) -> str:
    """Finding over one or several panels (accelerator name to its rows)."""
    if len(groups) == 1:
        return pareto_finding(next(iter(groups.values())), costs, y)
    picks = {}
    for name, rows in groups.items():
        split = best_trade(rows, costs[0], y)
        if split is not None:
            picks.setdefault(split, []).append(name)
    if len(picks) == 1 and len(groups) > 1:
        return f"{next(iter(picks))} is the best trade on {_listing(list(groups))}"
    parts = [f"{split} on {_listing(names)}" for split, names in picks.items()]
    return f"Best trade: {', '.join(parts)}" if parts else "No split could be evaluated"


def _listing(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _gain(ratio: float, error: str, base: str) -> str:
    short = error.removeprefix("output ")
    if 0.475 <= ratio <= 0.525:
        return f"halves the {short} of {base}"
    if ratio < 0.4:
        return f"has {1 / ratio:.1f}× less {short} than {base}"
    return f"cuts the {short} of {base} by {100 * (1 - ratio):.0f} %"


def _price(ratio: float, cost: str) -> str:
    if 0.995 < ratio < 1.005:
        return f"at the same {cost}"
    if ratio < 1:
        return f"with {100 * (1 - ratio):.0f} % less {cost}"
    if ratio < 2:
        return f"for +{100 * (ratio - 1):.0f} % {cost}"
    return f"for {ratio:.1f}× the {cost}"
