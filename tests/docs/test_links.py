"""Links that leave the documentation, checked where there is a network."""

import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def network():
    try:
        urllib.request.urlopen("https://arxiv.org", timeout=10).close()
    except (urllib.error.URLError, OSError):
        pytest.skip("no network")


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_external_links_answer(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "linkcheck", "-d", tmp_path / "doctrees"]
    done = subprocess.run(
        [*command, ROOT / "docs", tmp_path / "links"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    report = (tmp_path / "links" / "output.txt").read_text()
    # Sites that refuse programs answer 403 to good links.
    broken = [line for line in report.splitlines() if "[broken]" in line and "403" not in line]
    assert broken == [], done.stderr


def test_files_named_in_the_readme_and_in_contributing_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / target).exists(), f"{name} links to {target}"


# What stands for any name, or is made by a command that the text shows.
PLACEHOLDER = re.compile(r"[<>*…{}]")


def missing_files(text, folders):
    """Names in backticks of files below `folders` of the repository that are not there."""
    named = re.findall(r"`([\w.-]+/[^`\s]*)`", text)
    return [
        name
        for name in dict.fromkeys(named)
        if name.split("/")[0] in folders
        and not PLACEHOLDER.search(name)
        and not (ROOT / name.split("::")[0]).exists()
    ]


def test_the_scan_for_missing_files_finds_one_and_lets_names_of_any_file_pass():
    text = (
        "See `loraq_sim/solvers/lqer.py`, `tests/<path>/test_x.py`, `a/b` and `loraq_sim/files.py`."
    )
    assert missing_files(text, {"loraq_sim", "tests"}) == ["loraq_sim/solvers/lqer.py"]


def test_files_named_in_guides_and_pages_exist():
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
    assert {"CONTRIBUTING.md", "README.md", "design.md"} <= {page.name for page in pages}
    folders = {"loraq_sim", "hwmodels", "tests", "docs", "benchmarks", "examples", "notebooks"}
    # The changelog tells of files as they were.
    texts = {p.name: p.read_text(encoding="utf-8") for p in pages if p.name != "CHANGELOG.md"}
    found = {name: missing_files(text, folders) for name, text in texts.items()}
    assert {name: files for name, files in found.items() if files} == {}
