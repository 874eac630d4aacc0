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
