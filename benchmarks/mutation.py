"""Mutation campaign: change the meaning of one line; see whether the tests that should, notice.

    python benchmarks/mutation.py                      # all mutants; writes mutation.md
    python benchmarks/mutation.py --room solvers       # those of one room; writes nothing
    python benchmarks/mutation.py --check              # is the text of every mutant still there?

The mutants are a table, `mutants.toml`: file, old text, new text, what it means, and the tests that
should notice. They are applied to a copy of the source, one at a time; each is run against its own
tests in a process of its own, forked from one that has loaded the libraries. A mutant whose old
text is gone, or is there more than once, is reported as such and counts as a failure of the
campaign, as do tests that fail without any mutant. Exit code 1 says that something of that, or a
survivor without a reason in the table, was found.

Results are kept in runs/mutation; `--keep` takes over those whose source file, tests and mutant are
as they were.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "mutants.toml"
NOTE = ROOT / "benchmarks" / "mutation.md"
FOLDER = ROOT / "runs" / "mutation"
COPIED = ("loraq_sim", "hwmodels", "tests", "examples", "benchmarks", "docs", "notebooks")
LIBRARIES = ("numpy", "scipy.linalg", "pandas", "numba", "torch", "pydantic", "pytest")
# A mutant that needs this many times as long as the tests without it, and a minute, hangs.
HANGS = 8
GRACE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change: `what` it means, `old` text of `file` becomes `new`; `tests` should notice.

    `excuse` says why it may survive, `is_equivalent` that nothing a user sees depends on it.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    excuse: str = ""
    is_equivalent: bool = False

    @property
    def room(self) -> str:
        """The folder of `loraq_sim`, or the file beside the folders, or hwmodels."""
        package, *inner = Path(self.file).parts
        return package if package == "hwmodels" else inner[0].removesuffix(".py")

    def problem(self, root: Path) -> str:
        """What is wrong with the entry against the source as it is; empty if nothing."""
        try:
            text = (root / self.file).read_text("utf-8")
        except OSError:
            return f"{self.file} is gone"
        found = text.count(self.old)
        if found != 1:
            return f"{self.file}: the old text of {self.what!r} is there {found} times"
        try:
            changed = ast.dump(ast.parse(text.replace(self.old, self.new)))
        except SyntaxError as error:
            return f"{self.file}: {self.what!r} is no Python: {error}"
        return "" if changed != ast.dump(ast.parse(text)) else f"{self.what!r} changes nothing"


def read_table(path: Path = TABLE) -> list[Mutant]:
    """Mutants of the table, in its order."""
    content = tomllib.loads(path.read_text("utf-8"))
    mutants = []
    for group in content["file"]:
        for entry in group["mutant"]:
            named = entry.get("tests", group.get("tests"))
            equivalent = entry.get("equivalent", "")
            mutants.append(
                Mutant(
                    file=group["path"],
                    what=entry["what"],
                    old=entry["old"],
                    new=entry["new"],
                    tests=tuple(named),
                    excuse=equivalent or entry.get("survives", ""),
                    is_equivalent=bool(equivalent),
                )
            )
    return mutants


def main() -> int:
    """Parse the options, run the mutants, print and write the note."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", default="", help="mutants of one room only")
    parser.add_argument("--only", default="", help="mutants whose file or meaning has this text")
    parser.add_argument("--keep", action="store_true", help="take over results that still hold")
    parser.add_argument("--check", action="store_true", help="only look for the old texts")
    options = parser.parse_args()
    mutants = [
        mutant
        for mutant in read_table()
        if options.room in ("", mutant.room) and options.only in f"{mutant.file} {mutant.what}"
    ]
    problems = [problem for mutant in mutants if (problem := mutant.problem(ROOT))]
    for problem in problems:
        print(problem)
    print(f"{len(mutants)} mutants, {len(problems)} that no longer fit the source")
    if options.check:
        return 1 if problems else 0
    campaign = Campaign(keep=options.keep)
    results = [campaign.run(mutant) for mutant in mutants if not mutant.problem(campaign.copy)]
    unexplained = [
        result for result in results if result["outcome"] == "survived" and not result["excuse"]
    ]
    if not (options.room or options.only):
        NOTE.write_text(note(results, problems), "utf-8")
    return 1 if problems or unexplained else 0


class Campaign:
    """A copy of the source, and the results found there."""

    def __init__(self, *, keep: bool) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.copy = FOLDER / "copy"
        self._book = FOLDER / "results.json"
        self._known = json.loads(self._book.read_text()) if self._book.exists() else {}
        self._keep = keep
        self._seconds: dict[str, float] = {}
        _renew(self.copy)
        self._digest_of_source = _digest(
            file for name in COPIED[:2] for file in sorted((self.copy / name).rglob("*.py"))
        )
        for library in LIBRARIES:
            importlib.import_module(library)
        if "loraq_sim" in sys.modules:
            raise SystemExit("a library or plugin loaded loraq_sim; mutants would not be seen")

    def run(self, mutant: Mutant) -> dict:
        """Outcome of one mutant: killed (by which test), survived or hangs, and its seconds."""
        key = self._key(mutant)
        found = self._known.get(key) if self._keep else None
        if found is None:
            allowed = GRACE_S + HANGS * sum(self._seconds_without(test) for test in mutant.tests)
            path = self.copy / mutant.file
            text, times = path.read_text("utf-8"), path.stat()
            path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
            try:
                found = self._tested(mutant.tests, allowed, is_compiled="kernels" in mutant.file)
            finally:
                path.write_text(text, "utf-8")
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            self._store(key, found)
        result = {
            "room": mutant.room,
            "file": mutant.file,
            "what": mutant.what,
            "excuse": mutant.excuse,
            "is_equivalent": mutant.is_equivalent,
            **found,
        }
        by = found["by"].rpartition("/")[2]
        print(f"{found['outcome']:9}{mutant.file}: {mutant.what}{' | ' * bool(by)}{by}", flush=True)
        return result

    def _seconds_without(self, test: str) -> float:
        """Seconds of one test without a mutant, which has to pass."""
        if test not in self._seconds:
            key = hashlib.sha256(f"{test} {self._digest_of_source} {self._content(test)}".encode())
            found = self._known.get(key.hexdigest())
            if found is None:
                found = self._tested((test,), 1800.0)
                if found["outcome"] != "survived":
                    raise SystemExit(f"{test} fails without a mutant: {found['by']}")
                self._store(key.hexdigest(), found)
            self._seconds[test] = found["seconds"]
        return self._seconds[test]

    def _tested(self, tests: tuple[str, ...], allowed: float, *, is_compiled: bool = False) -> dict:
        log, started = FOLDER / "log.txt", time.monotonic()
        child = os.fork()
        if not child:
            os._exit(_run_tests(self.copy, tests, log, is_compiled))
        outcome = None
        while outcome is None:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                outcome = {0: "survived", 1: "killed"}.get(os.waitstatus_to_exitcode(status))
                outcome = outcome or "broken"
            elif time.monotonic() - started > allowed:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                outcome = "hangs"
            else:
                time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        lines = log.read_text("utf-8", "replace").splitlines()
        words = [line.split() for line in lines if line.startswith(("FAILED ", "ERROR "))]
        by = words[0][1] if words and len(words[0]) > 1 else ""
        seconds = round(time.monotonic() - started, 1)
        return {"outcome": outcome, "by": by, "seconds": seconds}

    def _key(self, mutant: Mutant) -> str:
        parts = [mutant.old, mutant.new, (self.copy / mutant.file).read_text("utf-8")]
        parts += [f"{test} {self._content(test)}" for test in mutant.tests]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _content(self, test: str) -> str:
        path = self.copy / test.partition("::")[0]
        return _digest([path] if path.is_file() else sorted(path.rglob("*.py")))

    def _store(self, key: str, found: dict) -> None:
        self._known[key] = found
        self._book.write_text(json.dumps(self._known))


def _renew(copy: Path) -> None:
    """A fresh copy of the source; compiled kernels come along, so that they need not be again."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy / path.name)


def _run_tests(copy: Path, tests: tuple[str, ...], log: Path, is_compiled: bool) -> int:
    """In a process of its own: exit code of pytest on `tests` against the copy."""
    os.setsid()
    sheet = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(sheet, stream)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    if is_compiled:
        # Numba does not see that a function another one calls has changed.
        shutil.rmtree(FOLDER / "numba", ignore_errors=True)
        importlib.import_module("numba").config.CACHE_DIR = str(FOLDER / "numba")
        os.environ["NUMBA_CACHE_DIR"] = str(FOLDER / "numba")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    code = 0
    try:
        # One after the other: the first often notices, and the others need not be imported.
        for test in tests:
            code = code or int(importlib.import_module("pytest").main([*options, test]))
    except BaseException as error:
        print("ERROR", repr(error))
        code = 3
    # What a mutant broke while it was imported is noticed, too.
    return 1 if code in (2, 4) else code


def _digest(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def note(results: list[dict], problems: list[str]) -> str:
    """The page: counts of each room, what survived and why, equivalent mutants and their proofs."""
    counted = [result for result in results if not result["is_equivalent"]]
    survivors = [result for result in counted if result["outcome"] == "survived"]
    lines = [
        "# Mutation campaign",
        "",
        f"`python benchmarks/mutation.py`, {datetime.now(UTC):%Y-%m-%d}: "
        f"{len(counted) - len(survivors)} of {len(counted)} mutants "
        f"({_percent(counted, survivors)}) are noticed by tests of behavior; "
        f"{len(results) - len(counted)} more are equivalent. Each is one line changed in its "
        "meaning (`benchmarks/mutants.toml`) and run against the tests of that thought alone.",
        "",
        "| Room | Mutants | Noticed | Share |",
        "|---|---:|---:|---:|",
    ]
    for room in sorted({result["room"] for result in counted}):
        inside = [result for result in counted if result["room"] == room]
        alive = [result for result in inside if result["outcome"] == "survived"]
        noticed = len(inside) - len(alive)
        lines.append(f"| `{room}` | {len(inside)} | {noticed} | {_percent(inside, alive)} |")
    seconds = sum(result["seconds"] for result in results)
    lines += ["", f"Time of all: {seconds / 60:.0f} minutes of one process.", ""]
    lines += _section("Survivors", survivors)
    lines += _section("Equivalent", [result for result in results if result["is_equivalent"]])
    if problems:
        lines += ["## No longer in the source", "", *(f"- {text}" for text in problems), ""]
    return "\n".join(lines)


def _percent(inside: list[dict], alive: list[dict]) -> str:
    return f"{100 * (1 - len(alive) / max(1, len(inside))):.1f} %"


def _section(title: str, results: list[dict]) -> list[str]:
    if not results:
        return [f"## {title}", "", "None.", ""]
    found = [
        f"- `{result['file']}`, {result['what']}: {result['excuse'] or 'no test yet'}"
        for result in results
    ]
    return [f"## {title}", "", *found, ""]


if __name__ == "__main__":
    sys.exit(main())
