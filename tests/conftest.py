import functools
import os
import shutil
import subprocess
import time

import pytest

# Two workers on two cores: threads of BLAS and torch beyond the first wait for each other, and
# spin while they do. Before NumPy is imported, which reads it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{_library}_NUM_THREADS", "1")


# After the number of threads, which NumPy reads once.
import typer.testing  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# The tree of commands is the same for every call, and building it takes longer than most commands.
typer.testing._get_command = functools.cache(typer.testing._get_command)


_SAVEFIG = Figure.savefig

# Folders of tests that need most of the compiled kernels: two workers would compile them twice.
COMPILING = {"emulator", "kernels"}
# Files of many seconds, which come first: the last ones run while the other worker has none left.
LONG = ("test_build", "test_readme", "test_notebooks", "test_large_stores", "test_one_verdict")


def pytest_configure(config):
    """Keep the order of files; xdist would end with those of few tests, however long they take."""
    config.option.loadscopereorder = False


# Before xdist, which reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep tests that share what takes long to make on one worker, so that it is made once.

    Takes ``--dist loadgroup``. It spends 2 ms on every group that it hands out, so that a file is
    one group; files are short enough that two workers end together.
    """
    for item in items:
        if "verilator_library" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("verilator"))
        elif COMPILING & set(item.path.parts):
            item.add_marker(pytest.mark.xdist_group("kernels"))
        else:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Write pictures as one pixel, but where a test looks at them.

    Every sweep and report composes its pictures, in tests of anything else too; turning them into
    pixels and letters takes longer than the rest of either.
    """
    is_looked_at = item.get_closest_marker("pictures") is not None
    Figure.savefig = _SAVEFIG if is_looked_at else _save_one_pixel


def _save_one_pixel(_figure, file, **settings):
    _SAVEFIG(Figure(figsize=(0.01, 0.01), dpi=100), file, **settings | {"dpi": 100})


@pytest.fixture(autouse=True, scope="session")
def all_machine_controls():
    """The controls of a report's what-if; reports of tests get one of two values instead.

    Every report prices its cases on some forty machines, in tests of anything else too, which
    takes longer than the rest of it.
    """
    from loraq_sim.reporting import points

    known = points.CONTROLS
    points.CONTROLS = (("columns", "units.columns", (1.0, 2.0)),)
    yield known
    points.CONTROLS = known


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory):
    """Keep the user's caches out of the tests, and the tests out of the user's caches."""
    os.environ["LORAQ_SIM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["LORAQ_SIM_CACHE"]


@pytest.fixture(scope="session")
def verilator_library(tmp_path_factory):
    """A folder to copy as ``obj_dir``, with which a build compiles its own files only.

    It holds the compiled library of Verilator, which takes four of the six seconds of a build and
    is the same in all. Dated in the future: make compiles again what is older than its makefile.
    """
    for program in ("verilator", "g++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install {program})")
    folder = tmp_path_factory.mktemp("verilator")
    (folder / "empty.sv").write_text("module empty; initial #1 $finish; endmodule\n")
    command = ["verilator", "--binary", "--timing", "-Wno-lint", "empty.sv"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    library = folder / "library"
    library.mkdir()
    tomorrow = time.time() + 86_400
    for path in (folder / "obj_dir").glob("verilated*.o"):
        shutil.copy(path, library)
        os.utime(library / path.name, (tomorrow, tomorrow))
    return library
