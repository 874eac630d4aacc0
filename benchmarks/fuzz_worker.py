"""Fuzz one reader in this process and keep count; defects are kept as files and do not stop it.

With atheris (libFuzzer for Python) branches of the reader guide which inputs are changed further.
Without it the same mutations run from the seed files alone.
"""

import hashlib
import json
import os
import pkgutil
import re
import shutil
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from random import Random

from fuzz_guard import Defect, Guard
from fuzz_readers import READERS, Reader

__all__ = ["Cases", "fuzz_guided", "fuzz_unguided", "scratch_folder"]

HANG_S = 60


class Cases:
    """Runs cases of one reader, and counts what came of them."""

    def __init__(self, reader: Reader, guard: Guard, scratch: Path, report: Path | None) -> None:
        self.counts = {"cases": 0, "read": 0, "refused": 0, "defects": {}, "seconds": 0.0}
        self.last = 0
        self._reader, self._guard, self._scratch, self._report = reader, guard, scratch, report
        self._mark = scratch / "code-was-run"
        self._started = time.perf_counter()

    def warm_up(self, seeds: list[bytes]) -> None:
        """Read the seeds unwatched: what they import is read from disk only once."""
        for data in seeds:
            path = self._scratch / self._reader.file
            path.write_bytes(data)
            with suppress(*self._reader.errors):
                self._reader.read(path)
        self._mark.unlink(missing_ok=True)

    def run(self, data: bytes) -> None:
        """One case; a defect is counted by its message, its first file kept beside the report."""
        path = self._scratch / self._reader.file
        path.write_bytes(data)
        self.counts["cases"] += 1
        try:
            outcome = self._guard.check(self._reader.read, self._reader.errors, path)
            if self._mark.exists():
                self._mark.unlink()
                raise Defect("ran code from the file")
            self.counts[outcome] += 1
        except Defect as defect:
            self._keep(str(defect), data)
        if self.counts["cases"] == self.last or self.counts["cases"] % 500 == 0:
            self.write()

    def write(self) -> None:
        """Write the counts to the report."""
        self.counts["seconds"] = time.perf_counter() - self._started
        if self._report is not None:
            self._report.write_text(json.dumps(self.counts))

    def _keep(self, message: str, data: bytes) -> None:
        found = self.counts["defects"]
        # What differs from case to case of one defect stands behind the colon.
        key = re.sub(r"\d{2,}", "N", message.partition(": ")[0])
        if key not in found and self._report is not None:
            name = f"{self._reader.name}-{hashlib.sha256(data).hexdigest()[:12]}"
            (self._report.parent / name).write_bytes(data)
            found[key] = {"count": 0, "example": message, "file": name}
        found.setdefault(key, {"count": 0, "example": message, "file": None})["count"] += 1


def scratch_folder() -> Path:
    """A new folder, in memory where the system has such a place."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="loraq-fuzz-", dir=memory))
    # Digests and solutions are cached there, not with the user's.
    os.environ["LORAQ_SIM_CACHE"] = str(folder / "cache")
    return folder


def fuzz_unguided(name: str, n_cases: int, seed: int, report: Path | None, guard=None) -> dict:
    """Run seeds, then `n_cases` mutations of them; return the counts."""
    reader = READERS[name]
    scratch = scratch_folder()
    try:
        seeds = reader.seeds(scratch)
        guard = guard or Guard()
        guard.scratch = scratch
        cases = Cases(reader, guard, scratch, report)
        cases.warm_up(seeds)
        cases.last = n_cases
        rng = Random(f"{seed} {name}")
        for index in range(n_cases):
            data = seeds[index % len(seeds)]
            for _ in range(0 if index < len(seeds) else rng.choice([1, 1, 2, 3])):
                data = reader.mutate(data, rng)
            cases.run(data[: reader.max_bytes])
        return cases.counts
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fuzz_guided(name: str, n_cases: int, seed: int, report: Path) -> None:
    """Run `n_cases` with atheris; does not return: libFuzzer ends the process."""
    import atheris

    reader = READERS[name]
    # Numba cannot compile instrumented code, so kernels are loaded before.
    import loraq_sim.kernels

    for module in pkgutil.iter_modules(loraq_sim.kernels.__path__):
        import_module(f"loraq_sim.kernels.{module.name}")
    if reader.traced_class:
        module, _, name = reader.traced_class.partition(":")
        owner = getattr(import_module(module), name)
        method = getattr(owner, reader.traced_method)
        setattr(owner, reader.traced_method, atheris.instrument_func(method))
    # Modules that are loaded already are not instrumented: this must come before the seeds.
    with atheris.instrument_imports(include=list(reader.traced)):
        for module in reader.traced:
            import_module(module)
        scratch, guard = scratch_folder(), Guard()
        guard.scratch = scratch
        cases = Cases(reader, guard, scratch, report)
        # What is imported on first use is instrumented too.
        seeds = reader.seeds(scratch)
        cases.warm_up(seeds)
    corpus = report.parent / f"{name}-corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(seeds):
        (corpus / f"seed{index:02d}").write_bytes(data)
    cases.last = n_cases

    def mutate(data: bytes, max_size: int, case_seed: int) -> bytes:
        rng = Random(case_seed)
        # libFuzzer comes to prefer files that are refused late; half start from one that is read.
        if rng.random() < 0.5:
            return reader.mutate(rng.choice(seeds), rng)[:max_size]
        if rng.random() < 0.15:
            return atheris.Mutate(data, max_size)
        return reader.mutate(data, rng)[:max_size]

    options = [
        f"-runs={n_cases}", f"-seed={seed + 1}", f"-timeout={HANG_S}", "-rss_limit_mb=4096",
        f"-max_len={reader.max_bytes}", "-len_control=0", "-mutate_depth=2", "-print_final_stats=1",
        f"-artifact_prefix={report.parent}/{name}-",
    ]  # fmt: skip
    atheris.Setup([name, *options, str(corpus)], cases.run, custom_mutator=mutate)
    atheris.Fuzz()
