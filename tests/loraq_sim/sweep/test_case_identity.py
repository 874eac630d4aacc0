from pathlib import Path

import pytest

import loraq_sim
from loraq_sim.sweep import case_identity
from loraq_sim.sweep.case_identity import code_digest


def test_names_do_not_depend_on_the_order_of_facts():
    name = case_identity.case_identity(a=1, b={"x": 1, "y": 2})
    assert name == case_identity.case_identity(b={"y": 2, "x": 1}, a=1)
    assert name != case_identity.case_identity(a=1, b={"x": 1, "y": 3})
    assert len(name) == 64


@pytest.fixture
def copied_sources(tmp_path, monkeypatch):
    """A small source tree in place of the installed packages."""
    for package in ("loraq_sim", "hwmodels"):
        (tmp_path / package / "kernels").mkdir(parents=True)
        (tmp_path / package / "sweep").mkdir()
        for name in ("__init__.py", "store.py", "metrics.py", "kernels/a.py", "sweep/run.py"):
            (tmp_path / package / name).write_text("x = 1\n")

    class Spec:
        def __init__(self, package):
            self.origin = str(tmp_path / package / "__init__.py")

    monkeypatch.setattr(case_identity, "find_spec", Spec)
    code_digest.cache_clear()
    yield tmp_path
    code_digest.cache_clear()


@pytest.mark.parametrize("changed", ["metrics.py", "kernels/a.py"])
@pytest.mark.parametrize("package", ["loraq_sim", "hwmodels"])
def test_code_that_decides_results_counts(copied_sources, package, changed):
    before = code_digest()
    (copied_sources / package / changed).write_text("x = 2\n")
    code_digest.cache_clear()
    assert code_digest() != before


@pytest.mark.parametrize("changed", ["store.py", "sweep/run.py"])
def test_code_that_only_moves_rows_does_not_count(copied_sources, changed):
    before = code_digest()
    (copied_sources / "loraq_sim" / changed).write_text("x = 2\r\n")
    (copied_sources / "loraq_sim" / "metrics.py").write_bytes(b"x = 1\r\n")
    code_digest.cache_clear()
    assert code_digest() == before


def test_every_file_said_to_have_no_effect_exists():
    root = Path(loraq_sim.__file__).parent
    for name in case_identity._WITHOUT_EFFECT:
        assert (root / name).exists(), f"{name} is gone; take it off the list"
