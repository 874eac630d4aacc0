"""Every reader of a file that may come from a stranger, and what is done with what it gives.

What was read is used as the product uses it: a reader that hands out broken objects is found too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz_mutations import MUTATIONS
from fuzz_seeds import SEEDS

__all__ = ["READERS", "Reader"]

# Functions import what they read with: a module is instrumented only if nothing loaded it before.


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One reader: its file name, what reads and uses the file, and its share of all cases.

    `traced` are the modules whose branches guide the fuzzer, and `traced_class` (module:class) and
    `traced_method` one method of a library too large to be traced as a whole.
    """

    name: str
    file: str
    read: Callable[[Path], None]
    share: float
    traced: tuple[str, ...]
    traced_class: str = ""
    traced_method: str = ""
    max_bytes: int = 16384

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What a reader may raise."""
        from hwmodels import AcceleratorError
        from loraq_sim.errors import LoraqError

        return LoraqError, AcceleratorError

    @property
    def seeds(self) -> Callable[[Path], list[bytes]]:
        """Makes the seed files in a scratch folder."""
        return SEEDS[self.name]

    @property
    def mutate(self) -> Callable:
        """Structure-aware mutation: (bytes, random.Random) to bytes."""
        return MUTATIONS[self.name]


def read_dump(path: Path) -> None:
    """Describe the dump and load its layers."""
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.dumps.steps import summarize
    from loraq_sim.errors import LoraqError

    dump = read_layer_dump(path)
    json.dumps([dump.meta, dump.skipped]).encode()
    for row in summarize(dump):
        json.dumps(row, allow_nan=False).encode()
        if not row["message"].isprintable() or (row["status"] == "ok") == bool(row["message"]):
            raise AssertionError(f"row of {row['layer']!r}: {row['message']!r:.200}")
    for name in list(dump)[:8]:
        try:
            layer = dump[name]
        except LoraqError:
            continue
        info = dump.info(name)
        assert layer.weight.shape == (info.n, info.k)
        assert layer.weight.dtype == np.float32
        assert np.isfinite(layer.weight).all()
        layer.digest()


def read_accelerator(path: Path) -> None:
    """Load the file and cost a layer on the machine it describes."""
    import hwmodels

    hw = hwmodels.load_accelerator(path)
    hw.digest()
    for branch in ({}, {"branch": "W8A8", "rank": 8}):
        work = hwmodels.GemmWorkload(m=64, n=128, k=96, main="W4A4", **branch)
        cost = hwmodels.estimate_cost(work, hw)
        assert 0 < cost.latency_s < float("inf"), f"latency {cost.latency_s}"
        assert 0 <= cost.energy_j < float("inf"), f"energy {cost.energy_j}"


def read_plan(path: Path) -> None:
    """Compose the sweep of a plan file; its dump is one of ours, whatever it asks for."""
    from loraq_sim.sweeps.plan import compose
    from loraq_sim.sweeps.plan_file import plan_from_values, read_plan_values, set_values

    values = read_plan_values(path)
    values = set_values(values, ["tokens=4", f"dump={path.parent / 'layers.npz'}"])
    compose(plan_from_values(values)).describe()


def read_measured(path: Path) -> None:
    """Predict every measured row, as ``hw validate`` does."""
    import hwmodels
    from hwmodels.validation import branch_overheads, measured_rows, summarize, validate

    rows = measured_rows(path)
    for name in ("aie2", "a100"):
        results = validate(hwmodels.load_accelerator(name), rows)
        json.dumps([summarize(results), branch_overheads(results)], allow_nan=False)


def read_store(path: Path) -> None:
    """Read all of a result store, and now and then write to it."""
    from loraq_sim.results.store import ResultStore

    with ResultStore.open(path) as store:
        rows = store.rows()
        store.provenance()
        store.planned()
        store.done(["case0"])
        store.frame()
    json.dumps(rows).encode()
    if len(rows) % 2:
        with ResultStore.open(path, create=True) as store:
            store.add("case9", {"layer": "attn", "status": "ok"})
            store.set_pareto(["case0"])


def read_quantized(path: Path) -> None:
    """Load every layer of a quantized model and rebuild its weight."""
    from loraq_sim.quantized_model import read_quantized_model

    model = read_quantized_model(path)
    json.dumps(model.meta).encode()
    for name in list(model)[:8]:
        solution = model[name]
        assert solution.reconstruct().shape == solution.main.shape
        assert solution.nbytes > 0
        f"{solution.weight_error:.3f} {solution.seconds:.1f} {solution.seed:d}"


def read_config(path: Path) -> None:
    """Read the checkpoint beside a config, and what it says of rows."""
    read_dump(path.parent / "model.safetensors.index.json")


def read_published(path: Path) -> None:
    """Load every layer of a nunchaku file and rebuild its weight."""
    from loraq_sim.nunchaku import read_nunchaku

    solutions, biases = read_nunchaku(path)
    for name, solution in list(solutions.items())[:8]:
        assert solution.reconstruct().shape == solution.main.shape
        assert biases[name].shape == (solution.main.shape[0],)


def read_adapter(path: Path) -> None:
    """Merge an adapter into a layer, at a strength that it needs say nothing of, and load it."""
    from safetensors.numpy import save_file

    from loraq_sim.dumps import read_layer_dump

    base = path.parent / "base.safetensors"
    if not base.exists():
        save_file({"a.b.weight": np.ones((4, 6), np.float32)}, base)
    layer = read_layer_dump(base, lora=f"{path}=0.5")["a.b"]
    assert layer.weight.shape == (4, 6)
    assert np.isfinite(layer.weight).all()


_DUMPS = ("loraq_sim.dumps", "loraq_sim.layers")
# Cases of 240 that each reader of models gets; the shares add up to one.
_MODELS = 20 / 240

READERS = {
    reader.name: reader
    for reader in (
        Reader(name="torch", file="dump.pt", read=read_dump, share=_MODELS,
               traced=(*_DUMPS, "pickletools", "zipfile"), traced_method="load",
               traced_class="torch._weights_only_unpickler:Unpickler"),
        Reader(name="safetensors", file="dump.safetensors", read=read_dump, share=_MODELS,
               traced=(*_DUMPS, "json")),
        Reader(name="npz", file="dump.npz", read=read_dump, share=_MODELS,
               traced=(*_DUMPS, "zipfile", "numpy.lib.format", "numpy.lib._format_impl")),
        Reader(name="gguf", file="dump.gguf", read=read_dump, share=_MODELS, traced=_DUMPS),
        Reader(name="index", file="model.safetensors.index.json", read=read_dump, share=_MODELS,
               traced=(*_DUMPS, "json")),
        Reader(name="config", file="config.json", read=read_config, share=_MODELS,
               traced=(*_DUMPS, "json")),
        Reader(name="onnx", file="dump.onnx", read=read_dump, share=_MODELS, traced=_DUMPS),
        Reader(name="nunchaku", file="model.safetensors", read=read_published, share=_MODELS,
               traced=("loraq_sim.nunchaku", "json"), max_bytes=65536),
        Reader(name="adapter", file="adapter.safetensors", read=read_adapter, share=_MODELS,
               traced=(*_DUMPS, "json")),
        Reader(name="accelerator", file="chip.yaml", read=read_accelerator, share=4 / 240,
               traced=("hwmodels", "ruamel.yaml")),
        Reader(name="plan", file="plan.toml", read=read_plan, share=15 / 240,
               traced=("loraq_sim.sweeps", "loraq_sim.settings", "loraq_sim.split",
                       "loraq_sim.machine", "tomllib")),
        Reader(name="measured", file="measured.csv", read=read_measured, share=15 / 240,
               traced=("hwmodels", "csv")),
        Reader(name="store", file="store.sqlite", read=read_store, share=15 / 240,
               traced=("loraq_sim.results.store", "loraq_sim.results.store_file"), max_bytes=65536),
        Reader(name="quantized", file="model.safetensors", read=read_quantized, share=11 / 240,
               traced=("loraq_sim.quantized_model", "safetensors",
                       "json")),
    )
}  # fmt: skip
"""All readers by name; the shares add up to one."""
