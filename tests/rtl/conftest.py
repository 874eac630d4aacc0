"""The simulator drivers beside this file as fixtures; tests skip where theirs is missing."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest


def load_driver(name):
    """Import a driver of this folder, which is no package, under its own name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        # The other drivers import this one.
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def simulator():
    """Skips the test where the simulator is not installed."""
    if shutil.which("iverilog") is None:
        pytest.skip("Icarus Verilog is not installed (Debian: apt-get install iverilog)")


@pytest.fixture(scope="session")
def icarus_module():
    """The driver module, importable without the simulator."""
    return load_driver("icarus")


@pytest.fixture(scope="session")
def icarus(simulator, icarus_module):
    """The driver module, only where the simulator is installed."""
    return icarus_module


@pytest.fixture
def in_verilator(icarus_module, verilator_library, monkeypatch):
    """Lets every driver build with Verilator; skips where it or its compiler is missing."""
    monkeypatch.setattr(icarus_module, "SIMULATOR", "verilator")
    monkeypatch.setattr(icarus_module, "LIBRARY", verilator_library)


@pytest.fixture(scope="session")
def requantize_rtl(icarus_module):
    """The driver of ups.sv, srs.sv and multiplier.sv."""
    return load_driver("requantize_rtl")


@pytest.fixture(scope="session")
def two_level_rtl(icarus_module):
    """The driver of two_level.sv."""
    return load_driver("two_level_rtl")
