"""The simulator driver beside this file as a fixture; without Icarus Verilog its tests skip."""

import importlib.util
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def icarus_module():
    """The driver module, importable without the simulator."""
    spec = importlib.util.spec_from_file_location("icarus", Path(__file__).with_name("icarus.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def icarus(icarus_module):
    """The driver module, only where the simulator is installed."""
    if shutil.which("iverilog") is None:
        pytest.skip("Icarus Verilog is not installed (Debian: apt-get install iverilog)")
    return icarus_module
