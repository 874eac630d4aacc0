import logging
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps import write_layer_dump
from loraq_sim.layers import Layer
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import SweepPlan

FAKE = "fake_evaluation:evaluate"


@pytest.fixture
def fake(monkeypatch):
    """Reference of the fake evaluation; worker processes find it on the path they inherit."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return FAKE


@pytest.fixture
def make_dump(tmp_path):
    """Write a dump of one 8x16 layer per ``name=kind`` and return its path."""

    def make(marker="", **kinds):
        rng = np.random.default_rng(0)
        layers = [
            Layer(
                name=name,
                weight=rng.normal(size=(8, 16)).astype(np.float32),
                activations=rng.normal(size=(2, 16)).astype(np.float32),
                kind=kind,
                group=str(marker),
                rows_per_call=2,
            )
            for name, kind in kinds.items()
        ]
        path = tmp_path / "layers.safetensors"
        write_layer_dump(path, layers, overwrite=True)
        return path

    return make


@pytest.fixture
def make_plan():
    """A plan of three splits without a branch, on aie2."""

    def make(dump, **changes):
        settings = {"accelerators": ("aie2",), "splits": ("W4A4", "W4A8", "W8A8")}
        return SweepPlan(dump=str(dump), **(settings | changes))

    return make


@pytest.fixture
def store(tmp_path):
    with ResultStore.open(tmp_path / "results.sqlite", create=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes of Dask with nannies that start a new one for each that dies."""
    dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        # A worker that dies twice within this time is not started again.
        settings = {"distributed.deploy.lost-worker-timeout": "1h"}
        with (
            dask.config.set(settings),
            distributed.LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                dashboard_address=":0",
                silence_logs=logging.CRITICAL,
            ) as started,
        ):
            yield started


@pytest.fixture
def client(cluster):
    import distributed

    with distributed.Client(cluster.scheduler_address, set_as_default=False) as connected:
        yield connected
