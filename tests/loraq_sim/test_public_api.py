"""The names users' scripts call, and what an import costs."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hwmodels
import loraq_sim
from loraq_sim.study import SweepSettings
from loraq_sim.sweeps.plan_file import PLAN_KEYS

FIXED = {
    loraq_sim: (
        *("read_layer_dump", "parse_format", "quantize", "solve", "MacArray", "emulate_gemm"),
        *("srs", "parse_split", "evaluate_layer", "pareto_front", "Layer"),
        *("sweep", "Datapath", "run_layer"),
    ),
    hwmodels: ("load_accelerator", "GemmWorkload", "estimate_cost", "list_accelerators"),
}


@pytest.mark.parametrize("package", FIXED, ids=lambda package: package.__name__)
def test_every_exported_name_exists_and_the_fixed_ones_are_exported(package):
    assert set(FIXED[package]) <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_cycles_of_a_systolic_array_have_an_import_path_of_their_own():
    systolic = importlib.import_module("hwmodels.kernel_cycles")
    # Weight stationary, one fold: load 4 rows, then 3 steps through 4 + 4 - 2 elements.
    assert systolic.systolic_cycles(3, 4, 4, rows=4, columns=4) == 4 + 3 + 4 + 4 - 2 - 1


def test_the_front_door_is_small_and_an_editor_sees_all_of_it():
    assert len(loraq_sim.__all__) <= 35
    tree = ast.parse(Path(loraq_sim.__file__).read_text(encoding="utf-8"))
    conditions = [node for node in tree.body if isinstance(node, ast.If)]
    (checking,) = (node for node in conditions if isinstance(node.test, ast.Name))
    seen = {alias.name: node.module for node in checking.body for alias in node.names}
    assert seen == loraq_sim._HOMES
    assert sorted(loraq_sim.__all__) == sorted(["__version__", *seen])


def test_a_name_that_left_the_front_door_still_loads_and_says_where_it_lives():
    assert not set(loraq_sim._FORMER) & set(loraq_sim.__all__)
    for name, home in loraq_sim._FORMER.items():
        with pytest.warns(DeprecationWarning, match=f"from {home} import {name}$"):
            value = loraq_sim.__getattr__(name)
        assert value is getattr(importlib.import_module(home), name)


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


def test_sweep_is_typed_with_every_key_of_a_plan():
    named = {"dump", "out", "hw", "splits", "tokens"}
    assert set(SweepSettings.__annotations__) == PLAN_KEYS.keys() - named


def options_by_place(function):
    """Options after the first two arguments that do not have to be named."""
    parameters = list(inspect.signature(function).parameters.values())
    placed = [p for p in parameters if p.name != "self" and p.kind is not p.KEYWORD_ONLY]
    return [p.name for p in placed[2:] if p.default is not p.empty]


def test_the_scan_for_options_by_place_finds_one():
    assert options_by_place(lambda x, fmt, rule=None: None) == ["rule"]
    assert options_by_place(lambda x, fmt="int4", *, rule=None: None) == []


@pytest.mark.parametrize("package", FIXED, ids=lambda package: package.__name__)
def test_options_after_the_first_two_arguments_are_named(package):
    for name in package.__all__:
        value = getattr(package, name)
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        if is_error or not callable(value):
            continue
        assert options_by_place(value) == [], name
        own = vars(value) if inspect.isclass(value) else {}
        for method, member in own.items():
            is_method = isinstance(member, classmethod) or inspect.isfunction(member)
            if not method.startswith("_") and is_method:
                assert options_by_place(getattr(value, method)) == [], f"{name}.{method}"


def test_an_option_given_by_place_still_counts_and_says_its_name():
    weight = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    named = loraq_sim.quantize(weight, "int4/g16", rule="mse")
    with pytest.warns(
        DeprecationWarning, match=r"quantize\(\) takes its options by name: write rule="
    ):
        placed = loraq_sim.quantize(weight, "int4/g16", "mse")
    np.testing.assert_array_equal(placed.codes, named.codes)
    with pytest.warns(DeprecationWarning, match="write main=, branch=, rank="):
        solution = loraq_sim.solve(weight, "svdquant", "int4/g16", "int8/g16", 2)
    assert (solution.rank, str(solution.left.format)) == (2, "int8/g16/fp16")
    with (
        pytest.raises(TypeError, match="multiple values for"),
        pytest.warns(DeprecationWarning, match="write rule="),
    ):
        loraq_sim.quantize(weight, "int4/g16", "mse", rule="absmax")
    with pytest.raises(TypeError, match="positional argument"):
        loraq_sim.quantize(weight, "int4/g16", "mse", None, None, None)
