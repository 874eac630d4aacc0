"""What Jupyter shows of an object: a title, facts and tables as HTML, every text escaped."""

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["bar_text", "html_card"]

_BAR_CHARACTERS = 20
_MOST_ROWS = 60


def html_card(
    title: str, facts: Mapping[str, object], *tables: Sequence[Mapping[str, object]]
) -> str:
    """HTML of a title, facts by name (None is left out) and tables given as rows.

    Tables longer than 60 rows are cut; a line says by how many.
    """
    import pandas as pd

    look = {"index": False, "border": 0}
    known = [(name, str(value)) for name, value in facts.items() if value is not None]
    shown = []
    with pd.option_context("display.max_colwidth", None):
        if known:
            shown.append(pd.DataFrame(known).to_html(header=False, **look))
        for rows in tables:
            texts = [{name: str(cell) for name, cell in row.items()} for row in rows[:_MOST_ROWS]]
            if texts:
                shown.append(pd.DataFrame(texts).to_html(**look))
            if len(rows) > _MOST_ROWS:
                shown.append(f"<p>{len(rows) - _MOST_ROWS:,} more rows are not shown</p>")
    return f"<strong>{escape(title)}</strong>{''.join(shown)}"


def bar_text(share: float) -> str:
    """A bar of up to 20 characters; shares outside 0 to 1 are cut."""
    return "\N{FULL BLOCK}" * round(_BAR_CHARACTERS * min(1.0, max(0.0, share)))
