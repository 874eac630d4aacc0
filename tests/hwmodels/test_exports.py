"""The package's surface: what it exports, and what importing it must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hwmodels


@pytest.mark.parametrize("name", hwmodels.__all__)
def test_every_export_resolves(name):
    assert getattr(hwmodels, name) is not None


def test_a_type_checker_sees_every_export_in_its_home():
    tree = ast.parse(Path(hwmodels.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"hwmodels.{home}" for name, home in hwmodels._HOMES.items()}
    assert sorted(seen) == hwmodels.__all__


def test_unknown_attribute_says_which():
    with pytest.raises(AttributeError, match="has no attribute 'estimate_costs'"):
        hwmodels.estimate_costs  # noqa: B018


def test_import_loads_neither_the_heavy_libraries_nor_loraq_sim():
    code = (
        "import sys, hwmodels\n"
        "hwmodels.GemmWorkload(m=1, n=1, k=1)\n"
        "heavy = {'pydantic', 'numpy', 'ruamel', 'torch', 'loraq_sim'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_estimating_a_cost_never_imports_loraq_sim():
    code = (
        "import sys, hwmodels as h\n"
        "h.estimate_cost(h.GemmWorkload(m=8, n=8, k=8), h.load_accelerator('aie2'))\n"
        "sys.exit('loraq_sim' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
