"""``loraq-sim doctor``: whether this installation works, in a few seconds."""

import importlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import typer

import hwmodels
from loraq_sim.cli.options import OutFormat, OutputFormat
from loraq_sim.cli.output import one_line_failures, print_tables, say
from loraq_sim.errors import counted
from loraq_sim.kernels.processor import (
    PATH_VARIABLE,
    choose_path,
    found_features,
    is_jit_off,
    refused_paths,
)
from loraq_sim.reporting.tables import result_table
from loraq_sim.version import __version__

__all__ = ["EXAMPLES", "doctor_command"]

EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim doctor\n\nloraq-sim doctor --format json"

_BROKEN = 1
_LEAST_FREE_BYTES = 2**20
# (distribution, module): torch takes seconds to import, so its metadata must do.
_NEEDED: tuple[tuple[str, str | None], ...] = (
    *(("numpy", "numpy"), ("numba", "numba"), ("scipy", "scipy"), ("torch", None)),
    *(("pandas", "pandas"), ("safetensors", "safetensors"), ("ml-dtypes", "ml_dtypes")),
)
# What each extra of the package adds, as distributions.
_EXTRAS = {
    "report": ("jinja2", "plotly"),
    "cluster": ("dask", "distributed", "dask-jobqueue"),
    "diffusion": ("diffusers",),
    "parquet": ("pyarrow",),
    "docs": ("sphinx", "furo", "myst-parser"),
}


@one_line_failures
def doctor_command(output: OutFormat = OutputFormat.TABLE) -> None:
    """Check versions, processor, kernels, accelerator files, cache and writable folders.

    Exits with 1 if something is broken.
    """

    started = time.perf_counter()
    rows = list(_checks())
    rows.append(_row("time", "ok", f"{time.perf_counter() - started:.1f} s"))
    table = result_table(rows, title="Installation")
    print_tables([table], output)
    broken = [row for row in rows if row["state"] == "broken"]
    if broken:
        names = ", ".join(row["check"] for row in broken)
        say(f"error: {len(broken)} of {len(rows)} checks failed: {names}", err=True)
        raise typer.Exit(_BROKEN)


def _checks() -> Iterator[dict[str, str]]:
    from loraq_sim.sweeps.digests import cache_folder, default_solution_folder

    yield _row("loraq-sim", "ok", f"{__version__}, Python {platform.python_version()}")
    for distribution, module in _NEEDED:
        yield _checked(distribution, partial(_package, distribution, module))
    for extra, distributions in _EXTRAS.items():
        yield _extra(extra, distributions)
    yield _checked("processor", _processor)
    yield _checked("kernels", _kernels)
    yield _kernel_cache()
    yield _checked("accelerators", _accelerators)
    yield _cache("cache folder", cache_folder())
    yield _cache("solution cache", default_solution_folder())
    yield _checked("working folder", lambda: _writable(Path.cwd()))
    yield _checked("temporary folder", lambda: _writable(Path(tempfile.gettempdir())))
    yield _checked("result store", _store)


def _row(check: str, state: str, detail: str) -> dict[str, str]:
    return {"check": check, "state": state, "detail": detail}


def _extra(name: str, distributions: tuple[str, ...]) -> dict[str, str]:
    found, missing = [], []
    for distribution in distributions:
        try:
            found.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            missing.append(distribution)
    if missing:
        return _row(f"extra {name}", "missing", f"optional, without {', '.join(missing)}")
    return _row(f"extra {name}", "ok", ", ".join(found))


def _checked(name: str, check: Callable[[], str]) -> dict[str, str]:
    try:
        return _row(name, "ok", check())
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _row(name, "broken", text[:300])


def _package(distribution: str, module: str | None) -> str:
    found = version(distribution)
    if module is not None:
        importlib.import_module(module)
    return found


def _processor() -> str:

    forced = f" (forced by {PATH_VARIABLE})" if os.environ.get(PATH_VARIABLE) else ""
    if is_jit_off():
        forced = " (plain Python, very slow: NUMBA_DISABLE_JIT is set)"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = " ".join(found_features()) or "no vector features known"
    return f"{platform.machine()}, {cpus} CPUs, {features}: {choose_path()} kernels{forced}"


def _kernels() -> str:
    """Run a small saturating GEMM with the kernels and with plain Python integers."""

    from loraq_sim.emulator.gemm import emulate_gemm
    from loraq_sim.emulator.mac_array import MacArray
    from loraq_sim.emulator.reference import reference_gemm

    rng = np.random.default_rng(0)
    a = rng.integers(-8, 8, (3, 40), dtype=np.int8)
    w = rng.integers(-8, 8, (5, 40), dtype=np.int8)
    arrays = (
        MacArray(acc_bits=32),
        MacArray(acc_bits=10, overflow="saturate", products_per_add=4),
        MacArray(acc_bits=9, overflow="wrap"),
    )
    for array in arrays:
        found = emulate_gemm(a, w, array)
        expected = np.asarray(reference_gemm(a, w, array))
        if found.tolist() != expected.tolist():
            raise RuntimeError(f"{array} differs from plain integers")
    done = f"{len(arrays)} small GEMMs equal plain Python integers"
    refused = [f"{path} kernels do not compile ({why})" for path, why in refused_paths().items()]
    return "; ".join([done, *refused, *([f"{choose_path()} run instead"] if refused else [])])


def _kernel_cache() -> dict[str, str]:
    """Where compiled code is kept, and of how many functions. After `_kernels`, which runs some."""
    from loraq_sim.kernels.jit import kept_in, why_not_kept

    if (why := why_not_kept()) is not None:
        detail = f"optional; compiled code is not kept ({why}): every start compiles again"
        return _row("kernel cache", "missing", f"{detail}; set NUMBA_CACHE_DIR")
    folder = kept_in()
    if folder is None:
        return _row("kernel cache", "ok", "nothing is compiled")
    # Numba keeps an index file for each function, whose name is its file, its name and its line.
    names = {path.name.rsplit("-", 1)[0] for path in folder.glob("*.nbi")}
    return _row("kernel cache", "ok", f"{folder}: {counted(len(names), 'function')} compiled")


def _accelerators() -> str:

    names = hwmodels.list_accelerators()
    for name in names:
        hwmodels.load_accelerator(name)
    return f"{len(names)} descriptions load"


def _cache(name: str, folder: Path) -> dict[str, str]:
    """A folder that is done without where it cannot be written, unless somebody asked for it."""
    from loraq_sim.sweeps.digests import CACHE_VARIABLE

    row = _checked(name, lambda: _writable(folder))
    if row["state"] == "broken" and not os.environ.get(CACHE_VARIABLE):
        reason = row["detail"].partition(": ")[2]
        detail = f"optional; {reason}: solutions are not kept, sweeps solve again"
        return _row(name, "missing", f"{detail}; set {CACHE_VARIABLE}")
    return row


def _writable(folder: Path) -> str:
    """Whether files can be made in `folder`, or it can be made; asks the system, makes nothing."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is not a folder")
    # A read-only file system says no to root too.
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{place} cannot be written")
    free = shutil.disk_usage(place).free
    if free < _LEAST_FREE_BYTES:
        raise OSError(f"{place} has {free / 2**20:.1f} MiB left")
    return f"{folder}, {free / 2**30:.1f} GiB free"


def _store() -> str:
    from loraq_sim.results.store import ResultStore

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.sqlite"
        with ResultStore.open(path, create=True) as store:
            store.add("case", {"layer": "a", "status": "ok"})
        with ResultStore.open(path) as store:
            count = len(store.rows())
    if count != 1:
        raise RuntimeError(f"1 row written, {count} read")
    return "written and read"
