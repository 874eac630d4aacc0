"""Which tiles this processor, this LLVM and this environment can run."""

import logging
import multiprocessing
import os
from collections.abc import Mapping
from functools import cache
from importlib import import_module

from loraq_sim.errors import InputError

__all__ = [
    *("LOOPS", "PATHS", "PATH_VARIABLE", "KernelUnavailable"),
    *(
        "choose_path",
        "forced_path",
        "found_features",
        "is_jit_off",
        "refuse_path",
        "refused_paths",
        "tile_kernels",
    ),
]

logger = logging.getLogger(__name__)

# Fastest first; every one gives the same bits.
PATHS = ("avx512", "avx2", "portable")
# Plain loops instead of tiles, with the same bits again: all that is left without a compiler.
LOOPS = "loops"
# Forces a path, to compare paths or to work around one.
PATH_VARIABLE = "LORAQ_SIM_KERNELS"
# Paths whose tiles do not compile here, and why.
_refused: dict[str, str] = {}
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


class KernelUnavailable(RuntimeError):
    """The tiles of a path do not compile here."""

    def __init__(self, path: str, cause: Exception) -> None:
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        self.path, self.reason = path, lines[0][:200]
        super().__init__(f"the {path} kernels do not compile here: {self.reason}")


def choose_path() -> str:
    """Return the path to run: the environment's `LORAQ_SIM_KERNELS`, or the fastest one here.

    Without a compiler (``NUMBA_DISABLE_JIT``) it is `LOOPS` whatever is asked for.

    Raises
    ------
    InputError
        If the environment names none of the paths, or one that does not compile here.
    """
    forced = forced_path()
    if is_jit_off():
        return LOOPS
    if not forced:
        return _fastest_path()
    if forced in _refused:
        raise InputError(
            f"{PATH_VARIABLE}={forced}: these kernels do not compile here ({_refused[forced]}); "
            f"unset it, or install another numba"
        )
    return forced


def forced_path() -> str | None:
    """Return the path that the environment asks for, if any; InputError if it is none."""
    forced = os.environ.get(PATH_VARIABLE) or None
    if forced is not None and forced not in (*PATHS, LOOPS):
        valid = ", ".join((*PATHS, LOOPS))
        raise InputError(f"{PATH_VARIABLE} must be one of {valid}, got {forced!r:.80}")
    return forced


def is_jit_off() -> bool:
    """Whether Numba compiles nothing (``NUMBA_DISABLE_JIT``)."""
    from numba import config

    return bool(config.DISABLE_JIT)


def refuse_path(error: KernelUnavailable) -> None:
    """Leave a path out from now on; the next one takes its place, with the same bits."""
    if error.path in _refused:
        return
    _refused[error.path] = error.reason
    _fastest_path.cache_clear()
    if multiprocessing.parent_process() is None:
        logger.warning("%s; %s run instead, slower, with the same bits", error, _fastest_path())


def refused_paths() -> Mapping[str, str]:
    """Why paths that this processor has were left out, by path."""
    return dict(_refused)


@cache
def _fastest_path() -> str:
    able = (p for p in PATHS if p not in _refused and _NEEDED.get(p, set()) <= _features())
    return next(able, LOOPS)


@cache
def tile_kernels(path: str) -> Mapping:
    """Return the kernels of a path by name (see `kernels.tile_intrinsic.TileKernel`)."""
    return import_module(f"loraq_sim.kernels.tiles_{path}").KERNELS
