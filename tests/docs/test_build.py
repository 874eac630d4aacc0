"""The documentation builds without a warning, is complete, and needs no network to be read."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("sphinx", "furo", "myst_parser", "ziamath")
REMOTE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["'](https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages."""
    missing = [name for name in NEEDED if find_spec(name.split(".")[0]) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; they come with the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", folder / "doctrees", ROOT / "docs", folder / "html"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def pages_of(site):
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


def test_every_page_is_built(site):
    written = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    missing = [page for page in written if not (site / page.with_suffix(".html")).is_file()]
    assert len(written) >= 20
    assert missing == []


def test_no_marker_is_left_in_a_page(site):
    left = [
        name for name, text in pages_of(site).items() if "&lt;!-- " in text or "<!-- gen" in text
    ]
    assert left == []


def test_the_list_of_pages_is_the_navigation(site):
    first = (site / "index.html").read_text()
    written = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    missing = [p for p in written if f'href="{p.with_suffix(".html")}"' not in first]
    assert [str(page) for page in missing if page.name != "README.md"] == []
    assert "An architect" in first


def test_pages_of_benchmarks_come_in_whole(site):
    page = (site / "validation.html").read_text()
    assert page.count("<table") > 10


def test_every_command_and_column_is_described(site):
    import typer

    from loraq_sim.cli.app import app
    from loraq_sim.results.rows import COLUMN_NAMES

    reference = pages_of(site)
    commands = typer.main.get_command(app).commands
    page = reference["reference/commands.html"]
    assert [name for name in commands if f">{name}" not in page] == []
    page = reference["reference/row_columns.html"]
    assert [name for name in COLUMN_NAMES if f">{name}<" not in page] == []


def test_pages_load_nothing_from_the_network(site):
    loading = {name: REMOTE.findall(text) for name, text in pages_of(site).items()}
    assert [name for name, found in loading.items() if found] == []


def test_formulas_are_drawn(site):
    page = (site / "concepts" / "arithmetic.html").read_text()
    assert page.count("<svg") > 30 or page.count(":svg") > 30
    assert "aria-label" in page


def test_formulas_have_the_size_of_formulas(site):
    # A delimiter that the renderer does not know can stretch over a whole screen.
    heights = {
        name: [float(h) for h in re.findall(r'<(?:\w+:)?svg[^>]*height="([\d.]+)em"', text)]
        for name, text in pages_of(site).items()
    }
    assert sum(map(len, heights.values())) > 100
    assert {name: max(h) for name, h in heights.items() if h and max(h) > 8} == {}


def test_outputs_look_like_outputs(site):
    page = (site / "tutorial.html").read_text()
    assert "Pareto front of output error" in page
    assert 'class="output' in page
    assert "tutorial-front.png" in page
