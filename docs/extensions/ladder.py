"""The ladder of rooms as a Markdown table, made of `docs/ladder.toml`.

python docs/extensions/ladder.py    # renews the table in CONTRIBUTING.md
"""

import re
import tomllib
from pathlib import Path

__all__ = ["ladder_table", "with_ladder"]

_ROOT = Path(__file__).resolve().parents[2]
_PLACE = re.compile(r"(?<=<!-- ladder -->\n).*?(?=\n<!-- end of ladder -->)", re.DOTALL)


def ladder_table() -> str:
    """One line per room, the highest floor first."""
    ladder = tomllib.loads((_ROOT / "docs" / "ladder.toml").read_text(encoding="utf-8"))
    top = len(ladder["floor"]) - 1
    lines = ["| Floor | Room of `loraq_sim` | What it decides |", "|---|---|---|"]
    for down, rooms in enumerate(ladder["floor"]):
        for room, holds in rooms.items():
            name = f"{room}/" if (_ROOT / "loraq_sim" / room).is_dir() else f"{room}.py"
            lines.append(f"| {top - down} | `{name}` | {holds} |")
    return "\n".join(lines)


def with_ladder(text: str) -> str:
    """`text` with the ladder between its two marks renewed."""
    return _PLACE.sub(lambda _: ladder_table(), text)


if __name__ == "__main__":
    path = _ROOT / "CONTRIBUTING.md"
    path.write_text(with_ladder(path.read_text(encoding="utf-8")), encoding="utf-8")
