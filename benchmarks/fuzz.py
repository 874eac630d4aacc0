"""Fuzz every reader of files from strangers, and note what was run and found.

    python benchmarks/fuzz.py --cases 240000 --seed 0     # all readers; writes benchmarks/fuzz.md
    python benchmarks/fuzz.py --reader npz --cases 5000   # one of them; writes nothing

Each reader runs in a process of its own. With atheris installed (``pip install atheris``) its
branch coverage guides the mutations, else they start from the seed files every time. Files that
show a defect stay in ``runs/fuzz``, and the exit code is then 1.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOUND = ROOT / "runs" / "fuzz"
NOTE = ROOT / "benchmarks" / "fuzz.md"
HISTORY = ROOT / "benchmarks" / "fuzz_found.md"


def main() -> int:
    """Parse the options, run the readers, print and write the note."""
    options = _options()
    if options.worker:
        return _work(options)
    from fuzz_readers import READERS

    names = [options.reader] if options.reader else list(READERS)
    shutil.rmtree(FOUND, ignore_errors=True)
    FOUND.mkdir(parents=True)
    results = []
    for name in names:
        share = 1.0 if options.reader else READERS[name].share
        results.append(_run_reader(name, round(share * options.cases), options))
        print(_line(results[-1]), flush=True)
    for result in results:
        for key, found in result["defects"].items():
            print(f"{result['reader']}: {found['count']} x {key}: {found['example']}")
            print(f"    {found['file']}")
    if not options.reader:
        NOTE.write_text(_note(results, options))
    return 1 if any(result["defects"] for result in results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=240_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", default="")
    parser.add_argument("--engine", choices=["auto", "atheris", "random"], default="auto")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine == "auto":
        options.engine = "atheris" if util.find_spec("atheris") else "random"
    return options


def _work(options: argparse.Namespace) -> int:
    report = FOUND / f"{options.worker}.json"
    if options.engine == "atheris":
        from fuzz_worker import fuzz_guided

        fuzz_guided(options.worker, options.cases, options.seed, report)
    from fuzz_worker import fuzz_unguided

    fuzz_unguided(options.worker, options.cases, options.seed, report)
    return 0


def _run_reader(name: str, n_cases: int, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--worker", name, "--cases", str(n_cases)]
    command += ["--seed", str(options.seed), "--engine", options.engine]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    log = FOUND / f"{name}.log"
    with log.open("wb") as file:
        ended = subprocess.run(
            command, stdout=file, stderr=file, env=os.environ | threads, check=False
        )
    text = log.read_text(errors="replace")
    report = FOUND / f"{name}.json"
    result = json.loads(report.read_text()) if report.exists() else {"cases": 0, "defects": {}}
    if ended.returncode or result["cases"] < n_cases:
        last = text.strip().splitlines()[-1:] or [""]
        found = {"count": 1, "example": f"exit {ended.returncode}: {last[0][:200]}"}
        result["defects"]["process ended"] = found | {"file": log.name}
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    first, *_, final = [*coverage[:1], *coverage[:1], *coverage[-1:]] or [("", "", "")] * 2
    peak = re.findall(r"peak_rss_mb:\s+(\d+)", text)
    return result | {
        "reader": name, "branches": final[0], "features": final[1], "corpus": final[2],
        "seed_branches": first[0], "peak_mib": peak[-1] if peak else "",
    }  # fmt: skip


def _line(result: dict) -> str:
    return (
        f"{result['reader']:12} {result['cases']:7} cases, {result.get('read', 0)} read, "
        f"{result.get('refused', 0)} refused, {len(result['defects'])} defects, "
        f"{result.get('seconds', 0.0):.0f} s, branches {result['seed_branches'] or '-'} -> "
        f"{result['branches'] or '-'}"
    )


def _note(results: list[dict], options: argparse.Namespace) -> str:
    engine = "mutations of the seed files"
    if options.engine == "atheris":
        engine = f"atheris {metadata.version('atheris')}, guided by branch coverage"
    n_cases = sum(result["cases"] for result in results)
    n_defects = sum(len(result["defects"]) for result in results)
    lines = [
        "# Fuzzing of the readers",
        "",
        f"`python benchmarks/fuzz.py --cases {options.cases} --seed {options.seed}`: {engine}; "
        f"{n_cases} cases, {n_defects} defects left. {platform.machine()}, Python "
        f"{platform.python_version()}.",
        "",
        "| reader | cases | read | refused | defects | branches of the seeds | branches reached | "
        "inputs kept | peak MiB | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        cells = [
            result["reader"], result["cases"], result.get("read", 0), result.get("refused", 0),
            len(result["defects"]), result["seed_branches"], result["branches"],
            result["corpus"].partition("/")[0], result["peak_mib"],
            f"{result.get('seconds', 0.0):.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    lines += ["", *_WHAT.strip().splitlines(), ""]
    if HISTORY.exists():
        lines += [HISTORY.read_text().strip(), ""]
    return "\n".join(lines)


_WHAT = """
Every case is a file that the product's own writers made, with its structure changed: zip directory
and members, pickle opcodes, `.npy` and safetensors headers and the JSON inside them, YAML, TOML and
CSV lines, SQLite statements and pages; beside that plain byte changes. A case passes if the reader
gives an object that can be used (layers load and are finite, a machine can be costed, a sweep
composed, rows exported, weights rebuilt) or one of its own errors with one printable line. Anything
else is a defect: another exception, a warning, a crash, 5 s of CPU time, 256 MiB more memory, a
file opened outside the scratch folder, a process started, an import by a pickle, or a mark left by
the pickles among the seeds that try to run code (Python's audit events tell).
"""


if __name__ == "__main__":
    sys.exit(main())
