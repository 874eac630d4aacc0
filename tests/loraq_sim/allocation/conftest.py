import numpy as np
import pytest

SPLITS = ("W4A4", "W4A8", "W4A4+W8A8r8", "W8A8")


def result_row(layer, split, **columns):
    return {
        "layer": layer, "kind": "k", "m": 8, "n": 4, "k": 4, "split": split, "status": "ok",
        "method": "loraq" if "+" in split else "rtn", "preset": "fast", "accelerator": "npu",
        "seed": 0, "family": "int", "group_size": 64, "dump": "d.pt", "options": "",
        "calls_per_step": 1, "output_rms": 1.0,
    } | columns  # fmt: skip


@pytest.fixture
def make_rows():
    """Random rows: (seed, number of layers) -> rows of one machine, all splits in every layer."""

    def make(seed=0, n_layers=4, **columns):
        rng = np.random.default_rng(seed)
        return [
            result_row(
                f"layer{index}",
                split,
                output_error=float(rng.uniform(0.01, 0.2)),
                weight_error=float(rng.uniform(0.01, 0.2)),
                latency_s=float(rng.uniform(1e-4, 9e-4)),
                energy_j=float(rng.uniform(1e-6, 9e-6)),
                weight_bytes=int(rng.integers(100, 900)),
                calls_per_step=1 + index % 3,
                **columns,
            )
            for index in range(n_layers)
            for split in SPLITS
        ]

    return make
