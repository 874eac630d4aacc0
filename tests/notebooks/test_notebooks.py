"""Every notebook runs from its first to its last cell, draws, and ends with a computed answer."""

import importlib
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
TIMEOUT_S = 120


@pytest.fixture
def kernel_folders(tmp_path, monkeypatch):
    """Histories, connection files and profiles of the kernel go where the test may write."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def executed(path):
    notebook = jupytext.read(path)
    where = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=where
    )
    return client.execute()


def outputs_of(cell):
    return cell.get("outputs", []) if cell.cell_type == "code" else []


def kinds_of(outputs):
    return {kind for output in outputs for kind in output.get("data", {})}


# Warnings of the client's own libraries are not ours to mend.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_a_notebook_runs_draws_and_concludes(path, kernel_folders):
    notebook = executed(path)
    outputs = [output for cell in notebook.cells for output in outputs_of(cell)]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "image/png" in kinds_of(outputs)
    last = outputs_of(notebook.cells[-1])
    (answer,) = [o["data"]["text/markdown"] for o in last if "text/markdown" in o.get("data", {})]
    assert len(answer.split()) >= 30


@pytest.mark.filterwarnings("default")
def test_a_failing_cell_fails_the_notebook(tmp_path, kernel_folders):
    path = tmp_path / "broken.py"
    path.write_text("# %% [markdown]\n# Broken.\n\n# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        executed(path)


def test_the_notebooks_are_listed_in_the_documentation():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert len(SOURCES) >= 6
    assert [path.name for path in SOURCES if f"notebooks/{path.name}" not in page] == []


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_sources_import_only_what_users_may(path):
    """The front door, what modules list as public, and the notebook's own tools."""
    lines = path.read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    for line in (line for line in imports if "loraq_sim" in line and " as lq" not in line):
        module, _, names = line.removeprefix("from ").partition(" import ")
        public = importlib.import_module(module).__all__
        assert {name.strip() for name in names.split(",")} <= set(public), line
    assert not [line for line in lines if " _" in line and "import" in line]
