import textwrap

import pytest
import torch

from loraq_sim.dumps.capture import capture_layers, load_entry
from loraq_sim.errors import DumpError

GOOD = """
    import torch

    def make():
        return torch.nn.Linear(2, 2), [(0, torch.ones(1, 2)), (1, torch.ones(1, 2))]

    def fails():
        raise RuntimeError("no\\nweights")

    def wrong():
        return torch.nn.Linear(2, 2)

    value = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_entry_model.py").write_text(textwrap.dedent(GOOD))
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("entry", ["my_entry_model:make", "my_entry_model.py:make"])
def test_a_function_in_a_module_or_a_file_gives_model_and_calls(folder, entry):
    found = load_entry(entry)
    assert isinstance(found.model, torch.nn.Linear)
    assert (found.n_calls, found.name) == (2, entry)
    assert len(capture_layers(found)) == 1


def test_the_seed_fixes_the_weights(folder):
    weights = [load_entry("my_entry_model:make", seed=seed).model.weight for seed in (0, 0, 1)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert (weights[0] != weights[2]).all()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("my_entry_model", "expected module:function, file.py:function or a folder"),
        ("my_entry_model:", "expected module:function"),
        ("my_entry_model:mak", "unknown function 'mak'; did you mean 'make'"),
        ("my_entry_model:value", "unknown function 'value'"),
        ("my_entry_model:fails", "the function failed: RuntimeError: no$"),
        ("my_entry_model:wrong", "must return \\(model, calls\\)"),
        ("nowhere_at_all:make", "nowhere_at_all cannot be imported: ModuleNotFoundError"),
        ("missing.py:make", "no file missing.py; check the path"),
        ("broken.py:make", "broken.py cannot be imported: ModuleNotFoundError"),
        ("leaves.py:make", "leaves.py cannot be imported: SystemExit"),
    ],
)
def test_what_is_no_entry_point_is_told(folder, entry, message):
    with pytest.raises(DumpError, match=message):
        load_entry(entry)
