"""What result rows say about values beyond their float format, in one sentence for all doors."""

from collections.abc import Sequence

from loraq_sim.rows import Row

__all__ = ["clipped_note"]


def clipped_note(rows: Sequence[Row]) -> str | None:
    """How many cases have values beyond a float format, and the first; None without any.

    Parameters
    ----------
    rows : sequence of Row
        Result rows of layers.
    """
    clipped = [row for row in rows if row.get("clipped_count")]
    if not clipped:
        return None
    wild = [row for row in clipped if row.get("status") == "overflow"]
    first = (wild or clipped)[0]
    what = f"{first['layer']} in {first.get('split')} on {first.get('accelerator')}"
    found = f"{first['clipped_count']:,} values, first {first.get('first_clipped')}"
    parts = [f"{len(clipped)} of {len(rows)} cases have values beyond their float format"]
    if wild:
        parts.append(
            f"the output of {len(wild)} is not finite (status overflow, infinite error), none of "
            "which is recommended"
        )
    return f"{'; '.join(parts)}; such as {what} ({found})"
