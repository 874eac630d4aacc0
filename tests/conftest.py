import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory):
    """Keep the user's caches out of the tests, and the tests out of the user's caches."""
    os.environ["LORAQ_SIM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["LORAQ_SIM_CACHE"]
