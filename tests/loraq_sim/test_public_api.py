"""The names users' scripts call, and what an import costs."""

import importlib
import json
import subprocess
import sys

import pytest

import hwmodels
import loraq_sim

FIXED = {
    loraq_sim: (
        *("read_layer_dump", "parse_format", "quantize", "solve", "MacArray", "emulate_gemm"),
        *("srs", "parse_split", "evaluate_layer", "pareto_front", "Layer"),
    ),
    hwmodels: ("load_accelerator", "GemmWorkload", "estimate_cost", "list_accelerators"),
}


@pytest.mark.parametrize("package", FIXED, ids=lambda package: package.__name__)
def test_every_exported_name_exists_and_the_fixed_ones_are_exported(package):
    assert set(FIXED[package]) <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sovle'"):
        importlib.import_module("loraq_sim").sovle  # noqa: B018


@pytest.mark.parametrize(
    "package", ["loraq_sim", "hwmodels", "loraq_sim.reporting", "loraq_sim.cli.app"]
)
def test_importing_a_package_loads_nothing_heavy(package):
    heavy = ("torch", "numba", "pandas", "matplotlib", "scipy", "pydantic", "ruamel")
    code = (
        f"import json, sys, {package}; "
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
