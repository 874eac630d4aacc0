"""Kernels whose code cannot be kept, cannot be compiled, or is not to be: slower, but right."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.kernels import processor
from loraq_sim.kernels.processor import LOOPS, PATH_VARIABLE
from loraq_sim.kernels.tiles import TileKernel

MACS = (
    lq.MacArray(acc_bits=32),
    lq.MacArray(acc_bits=12, overflow="saturate", products_per_add=4),
    lq.MacArray(acc_bits=12, overflow="wrap", accumulators=2),
    lq.MacArray(acc_bits=14, overflow="saturate", products_per_add=8, tree_bits=10),
    lq.MacArray(acc_bits=40, overflow="saturate"),
)
EVERYTHING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_jit import outcome
print(outcome())
"""
# One small kernel: compiling takes seconds, and no cache is shared here.
ONE_KERNEL = """
import numpy as np
import loraq_sim as lq
print(lq.srs(np.array([[5, -7, 300]]), 1).tolist())
"""
ROUNDED = "[[2, -4, 127]]"


def outcome():
    """Bits of GEMMs over all kinds of arrays, and values of quantized matrices, as text."""
    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (5, 40), dtype=np.int8)
    w = rng.integers(-8, 8, (6, 40), dtype=np.int8)
    sums = []
    for mac in MACS:
        report = lq.emulate_gemm_report(a, w, mac, init=3)
        counts = [getattr(report, name) for name in ("overflow_count", "tree_overflow_count")]
        sums += [lq.emulate_gemm(a, w, mac).tolist(), *counts, report.safe_acc_bits]
        sums += [report.acc.tolist(), report.outputs_affected, report.first_overflow_k]
    x = rng.normal(size=(4, 32)).astype(np.float32)
    for text in ("int4/g16", "int8/row", "mxfp4"):
        sums.append(np.asarray(lq.quantize(x, lq.parse_format(text)).dequantize()).tolist())
    return repr(sums)


def run(program, **environment):
    """Stdout and stderr of a program in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "LORAQ_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip(), done.stderr.strip()


NOWHERE = """
import numba.core.caching
def refuse(self):
    raise PermissionError(13, "Permission denied")
numba.core.caching._CacheLocator.ensure_cache_path = refuse
"""
SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
"""


def test_without_a_folder_for_compiled_code_it_is_slower_and_says_so_once():
    out, err = run(NOWHERE + ONE_KERNEL)
    assert out == ROUNDED
    assert err.count("\n") == 0
    assert "compiled code cannot be kept" in err
    assert "NUMBA_CACHE_DIR" in err


def test_a_full_disk_or_a_spoilt_file_costs_a_line_and_no_bits(tmp_path):
    out, err = run(SMALL_FILES + ONE_KERNEL, NUMBA_CACHE_DIR=str(tmp_path))
    assert out == ROUNDED
    assert err.count("\n") == 0
    assert "compiled code cannot be kept (File too large)" in err
    assert run(ONE_KERNEL, NUMBA_CACHE_DIR=str(tmp_path)) == (ROUNDED, "")
    files = list(tmp_path.rglob("*.nbc"))
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    out, err = run(ONE_KERNEL, NUMBA_CACHE_DIR=str(tmp_path))
    assert out == ROUNDED
    assert err.count("\n") == 0


@pytest.mark.parametrize("forced", ["", "portable"])
def test_without_a_compiler_plain_loops_give_the_same_bits(forced):
    assert run(EVERYTHING, NUMBA_DISABLE_JIT="1", LORAQ_SIM_KERNELS=forced) == (outcome(), "")


def test_plain_loops_can_be_asked_for(monkeypatch):
    expected = outcome()
    monkeypatch.setenv(PATH_VARIABLE, LOOPS)
    assert outcome() == expected
    codes = np.ones((4, 64), np.int8)
    assert lq.emulate_gemm_report(codes, codes, lq.MacArray(acc_bits=12)).route == "lanes"


@pytest.fixture
def broken_paths(monkeypatch):
    """Let the tiles of some paths not compile, in this test."""
    broken = set()
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setattr(processor, "_refused", {})
    processor._fastest_path.cache_clear()
    compiled = TileKernel.compiled.func

    def compile_or_fail(self):
        path = self.shape.instructions.path
        if path in broken:
            cause = RuntimeError("Intrinsic has incorrect argument type!\n<16 x i32>")
            raise processor.KernelUnavailable(path, cause)
        return compiled(self)

    monkeypatch.setattr(TileKernel, "compiled", property(compile_or_fail))
    yield broken
    processor._fastest_path.cache_clear()


def test_where_tiles_do_not_compile_the_next_path_gives_the_same_bits(broken_paths, caplog):
    first = processor.choose_path()
    expected = outcome()
    broken_paths.add(first)
    assert outcome() == expected
    assert processor.choose_path() != first
    (record,) = caplog.records
    assert f"the {first} kernels do not compile here: Intrinsic has" in record.getMessage()
    broken_paths.update(processor.PATHS)
    assert outcome() == expected
    assert processor.choose_path() == LOOPS


def test_a_forced_path_that_does_not_compile_is_one_line(broken_paths, monkeypatch):
    broken_paths.add("portable")
    monkeypatch.setenv(PATH_VARIABLE, "portable")
    with pytest.raises(lq.InputError, match="LORAQ_SIM_KERNELS=portable: these kernels do not"):
        outcome()


def test_an_unknown_path_is_one_line_at_first_use_and_none_at_import():
    out, err = run(EVERYTHING, LORAQ_SIM_KERNELS="foo")
    assert out == ""
    valid = "LORAQ_SIM_KERNELS must be one of avx512, avx2, portable, loops, got 'foo'"
    assert err.splitlines()[-1] == f"loraq_sim.errors.InputError: {valid}"
    assert "outcome" in err.splitlines()[2]


def test_processes_that_start_together_compile_once(tmp_path):
    program = """
from pathlib import Path
from time import sleep
from loraq_sim.kernels.jit import njit
import once, sys
(here := Path(sys.argv[1], "ready" + sys.argv[2])).touch()
while not all(Path(sys.argv[1], f"ready{i}").exists() for i in range(2)):
    sleep(0.001)
assert once.twice(4) == 8
print(sum(once.twice.stats.cache_misses.values()), sum(once.twice.stats.cache_hits.values()))
"""
    (tmp_path / "once.py").write_text(
        "from loraq_sim.kernels.jit import njit\n\n\n"
        "@njit(cache=True)\ndef twice(x):\n    return x + x\n"
    )
    given = {"NUMBA_CACHE_DIR": str(tmp_path / "kept"), "PYTHONPATH": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(i)],
            env=os.environ | given,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    found = [process.communicate()[0].split() for process in started]
    # One compiled; the other waited for its code, and nobody holds the lock any more.
    assert sorted(found) == [["0", "1"], ["1", "0"]]
    locks = list(tmp_path.rglob("*.lock"))
    assert len(locks) == 1
    with locks[0].open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
