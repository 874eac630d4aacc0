"""Which tiles this processor can run."""

import os
from collections.abc import Mapping
from functools import cache
from importlib import import_module

__all__ = ["PATHS", "PATH_VARIABLE", "choose_path", "found_features", "tile_kernels"]

# Fastest first; every one gives the same bits.
PATHS = ("avx512", "avx2", "portable")
# Forces a path, to compare paths or to work around one.
PATH_VARIABLE = "LORAQ_SIM_KERNELS"
_NEEDED = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}, "avx2": {"avx2"}}


@cache
def _features() -> frozenset[str]:
    """Features that Numba compiles for: the host's, or those that its environment names."""
    from llvmlite import binding
    from numba import config

    if config.CPU_NAME or config.CPU_FEATURES is not None:
        named = (config.CPU_FEATURES or "").split(",")
        extra = {"x86-64-v3": {"avx2"}, "x86-64-v4": {"avx2"}}.get(config.CPU_NAME, set())
        return frozenset({name[1:] for name in named if name[:1] == "+"} | extra)
    try:
        return frozenset(name for name, on in binding.get_host_cpu_features().items() if on)
    except RuntimeError:  # LLVM cannot tell on some processors
        return frozenset()


def found_features() -> tuple[str, ...]:
    """Return what of the features that matter to integer arithmetic this processor has."""
    wanted = {"neon", "avxvnni"}.union(*_NEEDED.values())
    return tuple(sorted(wanted & _features()))


def choose_path() -> str:
    """Return the path to run: the environment's `LORAQ_SIM_KERNELS`, or the fastest one here."""
    forced = os.environ.get(PATH_VARIABLE)
    if not forced:
        return _fastest_path()
    if forced not in PATHS:
        raise ValueError(f"{PATH_VARIABLE} must be one of {', '.join(PATHS)}, got {forced!r}")
    return forced


@cache
def _fastest_path() -> str:
    return next(path for path in PATHS if _NEEDED.get(path, set()) <= _features())


@cache
def tile_kernels(path: str) -> Mapping:
    """Return the kernels of a path by name (see `kernels.tile_intrinsic.TileKernel`)."""
    return import_module(f"loraq_sim.kernels.tiles_{path}").KERNELS
