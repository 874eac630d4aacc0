"""Every notebook is committed with the outputs of its source, draws, and ends with an answer.

The cheapest is run here and compared with what is committed; all of them in `make test-slow`.
"""

import importlib.util
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "executed_notebooks", ROOT / "docs" / "extensions" / "executed_notebooks.py"
)
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)

SOURCES = notebooks.sources()
CHEAPEST = "design_your_own_accelerator"
MOST_KIB = 400
MOST_CELLS = 16


@pytest.fixture
def kernel_folders(tmp_path, monkeypatch):
    """Histories, connection files and profiles of the kernel go where the test may write."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def committed(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])
def test_a_notebook_is_committed_with_the_outputs_of_its_source(source):
    """After a change of the source: `make notebooks`."""
    assert notebooks.is_fresh(source), f"run make notebooks: {source.name} has changed"
    notebook = committed(source)
    now = jupytext.read(source)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in now.cells]
    outputs = outputs_of(notebook)
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result"}
    assert any("image/png" in output.data for output in outputs)
    answer = notebook.cells[-1].outputs[-1].data["text/markdown"]
    assert len(answer.split()) >= 30
    assert "{" not in answer
    assert len(notebook.cells) <= MOST_CELLS
    assert source.with_suffix(".ipynb").stat().st_size < MOST_KIB * 1024


@pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])
def test_nothing_of_the_place_where_it_ran_is_committed(source):
    notebook = committed(source)
    assert all(not cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) == {"loraq_sim", "kernelspec", "language_info"}
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert "/tmp" not in text
    assert "solved in" not in text


RUN = [
    pytest.param(path, marks=() if path.stem == CHEAPEST else pytest.mark.slow, id=path.stem)
    for path in SOURCES
]


# Warnings of the client's own libraries are not ours to mend.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("source", RUN)
def test_a_run_says_what_is_committed(source, kernel_folders):
    found = notebooks.executed(source)
    assert notebooks.differences(notebooks.told(committed(source)), notebooks.told(found)) == []


@pytest.mark.parametrize(
    ("before", "after", "n_found"),
    [
        (["3.00 ms, 12.1 % of 4,608"], ["3.01 ms, 12.1 % of 4,608"], 0),
        (["3.00 ms"], ["3.20 ms"], 1),
        (["Build W4A8"], ["Build W8A8"], 1),
        (["Build W4A8 on aie2"], ["Build W4A8 on aie2p"], 1),
        (["a", "b"], ["a"], 1),
        (["1 and 2"], ["1"], 1),
    ],
)
def test_figures_that_changed_are_found(before, after, n_found):
    assert len(notebooks.differences(before, after)) == n_found


@pytest.mark.filterwarnings("default")
def test_a_failing_cell_fails_the_notebook_and_is_one_line_to_a_user(tmp_path, kernel_folders):
    path = tmp_path / "broken.py"
    cell = "import loraq_sim as lq\n\nlq.open_study('nowhere')\n"
    path.write_text(f"# %% [markdown]\n# Broken.\n\n# %%\n{cell}", encoding="utf-8")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="StoreError") as caught:
        notebooks.executed(path)
    shown = [line for line in caught.value.traceback.rpartition("---\n")[2].splitlines() if line]
    assert len(shown) <= 2
    assert "in line 3 of the cell: lq.open_study('nowhere')" in shown[-1]


def test_the_notebooks_are_listed_in_the_documentation():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert len(SOURCES) >= 6
    assert [path.stem for path in SOURCES if f"notebooks/{path.stem}.ipynb" not in page] == []


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
    # The library itself, not its command in another process.
    assert not [line for line in lines if "subprocess" in line]
