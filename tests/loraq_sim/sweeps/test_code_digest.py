import sys

import pytest

from loraq_sim.sweeps.digests import code_digests

module = sys.modules["loraq_sim.sweeps.digests"]

SOURCES = {
    "loraq_sim/__init__.py": "",
    "loraq_sim/evaluate.py": "import hwmodels\nfrom loraq_sim.emulator import gemm\n"
    "def f():\n    from loraq_sim.solvers import (\n        rtn,\n    )\n",
    "loraq_sim/split.py": "",
    "loraq_sim/emulator/__init__.py": "",
    "loraq_sim/emulator/gemm.py": "def f():\n    from loraq_sim.kernels import tiles_a\n",
    "loraq_sim/kernels/__init__.py": "",
    "loraq_sim/kernels/tiles_a.py": "",
    "loraq_sim/kernels/unused.py": "",
    "loraq_sim/solvers/__init__.py": "from loraq_sim.solvers.baselines import r\n",
    "loraq_sim/solvers/baselines.py": "import loraq_sim.kernels.rounding\n",
    "loraq_sim/kernels/rounding.py": "",
    "loraq_sim/cli/sweep.py": "from loraq_sim.evaluate import f\n",
    "hwmodels/__init__.py": "",
    "hwmodels/cost.py": "",
}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A small source tree in place of the installed packages."""
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    class Spec:
        def __init__(self, package):
            self.origin = str(tmp_path / package / "__init__.py")

    monkeypatch.setattr(module, "find_spec", Spec)
    code_digests.cache_clear()
    yield tmp_path
    code_digests.cache_clear()


@pytest.mark.parametrize(
    ("name", "subsystems"),
    [
        ("hwmodels/cost.py", {"cost"}),
        ("loraq_sim/emulator/gemm.py", {"emulator"}),
        ("loraq_sim/kernels/tiles_a.py", {"emulator"}),
        ("loraq_sim/solvers/baselines.py", {"solver", "emulator"}),
        ("loraq_sim/kernels/rounding.py", {"solver", "emulator"}),
        ("loraq_sim/kernels/unused.py", set()),
        ("loraq_sim/cli/sweep.py", set()),
    ],
)
def test_an_edit_changes_the_subsystems_that_import_the_file(sources, name, subsystems):
    before = code_digests()
    with (sources / name).open("a") as file:
        file.write("x = 2\n")
    code_digests.cache_clear()
    after = code_digests()
    assert {key for key in before if before[key] != after[key]} == subsystems


def test_line_ends_do_not_count(sources):
    before = code_digests()
    (sources / "loraq_sim/solvers/baselines.py").write_bytes(
        b"import loraq_sim.kernels.rounding\r\n"
    )
    code_digests.cache_clear()
    assert code_digests() == before


def test_the_real_packages_are_followed_into_solvers_kernels_and_costs():
    found = {name: path for package in module._PACKAGES for name, path in module._modules(package)}
    solver = module._reached(module._ENTRIES["solver"], found, {})
    emulator = module._reached(module._ENTRIES["emulator"], found, {})
    assert {"loraq_sim.solvers.solve", "loraq_sim.quantizers.quantize"} <= solver
    assert "loraq_sim.kernels.quantize" in solver
    assert "loraq_sim.emulator.gemm" not in solver
    assert {"loraq_sim.emulator.gemm", "loraq_sim.kernels.tiles"} <= emulator
    assert "hwmodels.cost" in module._reached(module._ENTRIES["cost"], found, {})
    for name in (
        "loraq_sim.cli",
        "loraq_sim.sweeps",
        "loraq_sim.results.store",
        "loraq_sim.reporting",
    ):
        assert not [found for found in solver | emulator if found.startswith(name)]
