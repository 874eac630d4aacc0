"""Where results come from: versions, machine, command, and digests of everything read."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraq_sim.sweep.plan import ComposedSweep

__all__ = ["collect_provenance", "utc_now"]

_PACKAGES = ("loraq-sim", "numpy", "numba", "scipy", "torch", "ml-dtypes", "safetensors", "pandas")


def collect_provenance(sweep: "ComposedSweep", *, jobs: int, scheduler: str = "") -> dict[str, Any]:
    """Facts about a sweep that is about to start, as values JSON can hold."""
    return {
        "started": utc_now(),
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "jobs": jobs,
        **({"scheduler": scheduler} if scheduler else {}),
        "command": list(sys.argv),
        "seed": sweep.plan.seed,
        **sweep.describe(),
    }


def utc_now() -> str:
    """Time of day in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
