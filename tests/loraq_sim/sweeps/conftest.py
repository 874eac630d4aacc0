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
