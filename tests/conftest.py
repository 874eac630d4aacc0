import os

import pytest

# Two workers on two cores: threads of BLAS and torch beyond the first wait for each other, and
# spin while they do. Before NumPy is imported, which reads it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{_library}_NUM_THREADS", "1")


# Before xdist, which reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep the tests of a file that share a fixture on one worker, so that it is made once.

    Takes ``--dist loadgroup``, which hands out everything else test by test: two workers end
    together.
    """
    for item in items:
        fixtures = getattr(item, "_fixtureinfo", None)
        definitions = () if fixtures is None else fixtures.name2fixturedefs.values()
        if any(found.scope == "module" for given in definitions for found in given):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory):
    """Keep the user's caches out of the tests, and the tests out of the user's caches."""
    os.environ["LORAQ_SIM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["LORAQ_SIM_CACHE"]
