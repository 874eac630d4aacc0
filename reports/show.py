"""Name the published report, and open it where there is a browser to look at.

python reports/show.py
"""

import os
import sys
import webbrowser
from pathlib import Path

REPORT = Path(__file__).resolve().parent / "pixart_sigma_on_aie2"


def main() -> None:
    # The first line of its README: what was swept, and the verdict.
    title = (REPORT / "README.md").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    what, _, verdict = title.rpartition(": ")
    page = REPORT / "report.html"
    print(f"\nAt the size of a real model: {what}:\n{verdict}")
    print(f"read {os.path.relpath(page)}")
    has_display = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if has_display and sys.stdout.isatty():
        webbrowser.open(page.as_uri())


if __name__ == "__main__":
    main()
