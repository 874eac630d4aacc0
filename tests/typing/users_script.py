"""A script as a user may write it, checked as ``mypy --strict`` does by `make lint`; it never runs.

`assert_type` says what a type checker knows of the public names, so that none of them is `Any`.
Lines with ``type: ignore`` are mistakes that it must find: one that is not found is an error, too.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import hwmodels
import loraq_sim as lq
from hwmodels import Accelerator, Cost, GemmWorkload
from loraq_sim.results.verdict import Verdict


def swept(dump: Path) -> str:
    study = lq.sweep(dump, "aie2", splits=["W4A4", "W4A8"], tokens=64, presets="fast", jobs=0)
    assert_type(study, lq.Study)
    assert_type(study.missing, list[dict[str, Any]])
    assert_type(study.partial, str)
    assert_type(len(study), int)
    verdict = study.verdict()
    assert_type(verdict, Verdict)
    assert_type(verdict.ties, tuple[str, ...])
    row = study.rows[0]
    assert_type(row["latency_s"], float | None)
    assert_type(row["layer"], str)
    best = study.best(latency_s=0.003, weight_bytes="400MB")
    assert_type(best["weight_bytes"], int | None)
    found = study.allocate(latency_s="3ms")
    assert_type(found.totals, dict[str, float])
    assert_type(study.report("r.html"), Path)
    study.recipe("recipe.toml").settings(row["layer"])
    study.explain(row["layer"]).errors[0]["share"]
    study.plot_front().savefig("front.png")
    again = lq.open_study("runs/demo")
    for total in again.totals:
        assert_type(total["split"], str)
        total["latency"]  # type: ignore[typeddict-item]
    row["latency"]  # type: ignore[typeddict-item]
    lq.sweep(dump, "aie2", split=["W4A4"])  # type: ignore[call-arg]
    lq.sweep(dump, "aie2", tokens="64")  # type: ignore[arg-type]
    study.verdicts()  # type: ignore[attr-defined]
    lq.swep(dump, "aie2")  # type: ignore[attr-defined]
    hwmodels.load("aie2")  # type: ignore[attr-defined]
    return verdict.text


def solved(dump: Path) -> NDArray[np.float32]:
    layers = lq.read_layer_dump(dump)
    layer = layers["transformer_blocks.0.attn1.to_q"]
    assert_type(layer, lq.Layer)
    solution = lq.solve(layer.weight, main="int4/g64", branch="int8/g64", rank=8, preset="fast")
    assert_type(solution, lq.Solution)
    assert_type(solution.nbytes, int)
    assert_type(solution.weight_error, float)
    stored = lq.quantize(layer.weight, lq.parse_format("int4/g64"))
    assert_type(stored.nbytes, int)
    lq.solve(layer.weight, main="int4/g64", ranks=8)  # type: ignore[call-arg]
    reconstructed: NDArray[np.float32] = solution.reconstruct()
    return reconstructed


def emulated(a: NDArray[np.int8], w: NDArray[np.int8]) -> float:
    mac = lq.MacArray(acc_bits=20, overflow="saturate", products_per_add=8, accumulators=1)
    result = lq.emulate_gemm(a, w, mac)
    out = lq.srs(result, 8, out_bits=8, signed=True, rounding="conv_even")
    lq.MacArray(bits=20)  # type: ignore[call-arg]
    return float(np.abs(out).mean())


def evaluated(layer: lq.Layer) -> float:
    hw = hwmodels.load_accelerator("aie2")
    assert_type(hw, Accelerator)
    row = lq.evaluate_layer(layer, lq.parse_split("W4A4+W8A8r8"), hw, seed=0, preset="fast")
    assert_type(row["output_error"], float | None)
    return row["output_error"] or 0.0


def sketched() -> float:
    machine = hwmodels.sketch("my_npu", rows=8, columns=8, clock="1.2GHz", modes="int8,int4x8")
    work = GemmWorkload(m=64, n=128, k=128, main="W4A4", branch="W8A8", rank=8)
    cost = hwmodels.estimate_cost(work, machine)
    assert_type(cost, Cost)
    assert_type(cost.latency_s, float)
    assert_type(hwmodels.list_accelerators(), list[str])
    hwmodels.estimate_cost(work, "aie2")  # type: ignore[arg-type]
    return cost.energy_j
