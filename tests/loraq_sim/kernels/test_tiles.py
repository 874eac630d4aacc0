"""Tiles compile once: a second process finds them on disk, and changed emitters compile anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraq_sim.kernels import jit, processor, run_blocks, tiles

PROGRAM = """
import numpy as np
from loraq_sim.emulator.gemm import emulate_gemm
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.kernels import jit, run_blocks, tiles
from loraq_sim.kernels.processor import choose_path

jit._fingerprint = lambda file: {stamp!r}
codes = np.full((3, 8), -128, np.int8)
emulate_gemm(codes, codes, MacArray(acc_bits=16, overflow="saturate", products_per_add=4))
ran = [k.compiled for k in tiles.tile_kernels(choose_path()).values() if "compiled" in vars(k)]
packing = run_blocks.run_blocks.stats
print(len(ran), sum(k.cache_hits for k in ran), sum(packing.cache_hits.values()))
"""


def run(folder, stamp, path):
    given = {"NUMBA_CACHE_DIR": str(folder), processor.PATH_VARIABLE: path}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(stamp=stamp)],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in result.stdout.split()]


@pytest.mark.parametrize("path", [processor.choose_path(), "portable"])
def test_a_second_process_finds_the_kernels_on_disk_unless_an_emitter_changed(tmp_path, path):
    assert run(tmp_path, "first", path) == [1, 0, 0]
    assert run(tmp_path, "first", path) == [1, 1, 1]
    assert run(tmp_path, "changed", path) == [1, 0, 1]


def test_what_is_kept_depends_on_every_file_that_puts_code_or_constants_into_it():
    folder = Path(tiles.__file__).parent
    tile = {"tile.py", "vector_ir.py", "processor.py", "scaled_tile.py", "pack_panels.py"}
    assert tile <= {file.name for file in jit._sources(folder / "tiles.py")}
    # The order of arguments is in another file than what is compiled by it.
    assert folder / "processor.py" in jit._sources(folder / "run_blocks.py")
    kept = run_blocks.run_blocks._cache._cache_file._source_stamp
    assert kept[-1] == jit._fingerprint(folder / "run_blocks.py")
    assert jit._fingerprint(folder / "run_blocks.py") != jit._fingerprint(folder / "processor.py")


@pytest.mark.parametrize(
    ("cpu", "features", "path"),
    [
        ("x86-64-v3", "", "avx2"),
        ("generic", "", "portable"),
        ("znver5", "+avx512f,+avx512bw,+avx512vl,+avx512vnni", "avx512"),
        ("cortex-a72", "+neon", "portable"),
    ],
)
def test_the_path_follows_the_processor_that_numba_compiles_for(monkeypatch, cpu, features, path):
    from numba import config

    monkeypatch.delenv(processor.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(config, "CPU_NAME", cpu)
    monkeypatch.setattr(config, "CPU_FEATURES", features)
    processor._features.cache_clear()
    processor._fastest_path.cache_clear()
    try:
        assert processor.choose_path() == path
    finally:
        processor._features.cache_clear()
        processor._fastest_path.cache_clear()
