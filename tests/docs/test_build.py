"""The documentation builds without a warning, is complete, and needs no network to be read."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hwmodels
import loraq_sim

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("sphinx", "furo", "myst_parser", "sphinxcontrib.bibtex", "ziamath")
REMOTE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["'](https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages. Building runs every command whose output is shown, so those are tested."""
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


def test_every_public_name_is_described(site):
    reference = pages_of(site)
    described = reference["reference/python.html"] + reference["reference/hwmodels.html"]
    names = [f"loraq_sim.{name}" for name in loraq_sim.__all__ if name != "__version__"]
    names += [f"hwmodels.{name}" for name in hwmodels.__all__]
    assert [name for name in names if f'id="{name}"' not in described] == []


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


def test_outputs_are_captured(site):
    page = (site / "tutorial.html").read_text()
    assert "Pareto front of output error" in page
    assert "tutorial-front.png" in page
    assert (site / "_images" / "tutorial-front.png").stat().st_size > 10_000
