"""Notebooks with their outputs: made from ``notebooks/*.py``, run from the first to the last cell.

    .venv/bin/python docs/extensions/executed_notebooks.py [--all] [NAME ...]

Each ``NAME.py`` in the percent format of Jupytext becomes ``NAME.ipynb`` beside it. The digest of
its source is kept in the notebook, so that one is run again only when its source has changed, or
when it is named or all are asked for. What varies from run to run is left out: times, versions,
identifiers of cells, streams of libraries.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
TIMEOUT_S = 300
KEY = "loraq_sim"
# Numbers as people write them; those with a unit or a sign stay what they are.
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
ADDRESS = re.compile(r"0x[0-9a-f]{8,}")


def sources() -> list[Path]:
    """The notebooks as text."""
    return sorted(FOLDER.glob("*.py"))


def digest_of(source: Path) -> str:
    """SHA-256 of what a notebook is made of."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def executed(source: Path) -> Any:
    """The notebook of `source` after a run in a process of its own."""
    import jupytext
    import nbclient

    notebook = jupytext.read(source)
    where = {"metadata": {"path": str(source.parent)}}
    client = nbclient.NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=where, record_timing=False
    )
    return tidied(client.execute(), source)


def tidied(notebook: Any, source: Path) -> Any:
    """`notebook` without what varies from run to run, and with the digest of its source."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
        if cell.cell_type != "code":
            continue
        cell["outputs"] = [o for o in cell["outputs"] if o.output_type != "stream"]
        for output in cell["outputs"]:
            output["metadata"] = {}
            output.pop("transient", None)
    notebook["metadata"] = {
        KEY: {"source": source.name, "sha256": digest_of(source)},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook["nbformat_minor"] = 5
    return notebook


def write(notebook: Any, path: Path) -> None:
    """Write a notebook as Jupyter does."""
    import nbformat

    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook, version=4) + "\n", encoding="utf-8")


def is_fresh(source: Path) -> bool:
    """Whether the notebook beside `source` was made of it."""
    import nbformat

    path = source.with_suffix(".ipynb")
    if not path.exists():
        return False
    known = nbformat.read(path, as_version=4).metadata.get(KEY, {})
    return bool(known.get("sha256") == digest_of(source))


def told(notebook: Any) -> list[str]:
    """What a notebook says: the text of every output, pictures aside, in order."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = data.get("text/markdown") or data.get("text/plain") or ""
            texts.append(ADDRESS.sub("", "".join(text)))
    return texts


def differences(before: list[str], after: list[str], *, within: float = 0.02) -> list[str]:
    """Outputs whose words differ, or whose numbers do by more than a fraction."""
    found = [] if len(before) == len(after) else [f"{len(before)} outputs, now {len(after)}"]
    for old, new in zip(before, after, strict=False):
        numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (old, new)]
        words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)) for text in (old, new)]
        is_same = words[0] == words[1] and len(numbers[0]) == len(numbers[1])
        if not is_same or any(
            abs(a - b) > within * max(abs(a), abs(b)) + 1e-9 for a, b in zip(*numbers, strict=False)
        ):
            found.append(f"{old!r:.300} is now {new!r:.300}")
    return found


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks to run, whether they changed or not")
    parser.add_argument("--all", action="store_true", help="run every one")
    asked = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for source in sources():
        is_wanted = asked.all or source.stem in asked.names
        if not is_wanted and (asked.names or is_fresh(source)):
            continue
        began = time.monotonic()
        write(executed(source), source.with_suffix(".ipynb"))
        size = source.with_suffix(".ipynb").stat().st_size / 1024
        sys.stdout.write(f"{source.stem}: {time.monotonic() - began:.0f} s, {size:.0f} KiB\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
