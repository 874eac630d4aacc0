"""Run the tests with the lowest versions that pyproject.toml declares.

    python tests/floors/lowest_versions.py [--venv DIR] [--from-venv DIR] [-- PYTEST ARGUMENTS]

makes a virtual environment in which every dependency of the package and of its extras `EXTRAS`,
and what the tests themselves need, has exactly its declared lower bound, and runs the tests of the
package in it. torch aside: gigabytes, so it is the one of ``--from-venv`` (``.venv``) or, where
there is none, of constraints.txt. Warnings are errors as ever, but for deprecations: old releases
use what newer ones of their own dependencies deprecate.

A floor that fails is raised to the lowest version that passes; nothing is declared untested.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("cluster", "diffusion", "parquet", "report")
TEST_TOOLS = ("hypothesis", "moocore", "pytest", "pytest-xdist")
# Documentation, notebooks and fuzzing have tools of their own, which no user of the package needs.
TESTS = ("tests/hwmodels", "tests/loraq_sim", "tests/rtl")
HOW = ("-q", "-n", "2", "--dist", "loadgroup", "-m", "not slow")
LEFT_OUT = ("tests/loraq_sim/reporting/test_page_in_browser.py",)
WARNINGS = (
    "error",
    "ignore::DeprecationWarning",
    "ignore::PendingDeprecationWarning",
    "ignore::FutureWarning",
)
_PIP = ("-m", "pip", "--disable-pip-version-check")


def main() -> int:
    """Build the environment, run the tests, return pytest's exit code."""
    options = _options()
    floors = declared_floors(ROOT / "pyproject.toml")
    python = options.venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", options.venv], check=True)
    own_torch = _link_torch(options.from_venv, options.venv)
    pins = options.venv / "floors.txt"
    lines = [f"{name}=={version}" for name, version in floors.items() if name != "torch"]
    if not own_torch:
        lines += [line for line in _constraints() if line.startswith("torch==")]
    pins.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(
        [python, *_PIP, "install", "--quiet", "-r", pins, "-c", pins, "-e", ROOT], check=True
    )
    _check_installed(python, floors)
    arguments = options.pytest or [*HOW, *TESTS]
    arguments += [f"--ignore={path}" for path in LEFT_OUT]
    ini = [f"--override-ini=filterwarnings={chr(10).join(WARNINGS)}"]
    # A cache and compiled code of other versions stay out of the way.
    environment = {"NUMBA_CACHE_DIR": str(options.venv / "numba")}
    return subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", *ini, *arguments],
        cwd=ROOT,
        env={**_environment(), **environment},
        check=False,
    ).returncode


def declared_floors(path: Path) -> dict[str, str]:
    """Lower bound of each requirement that is tested, by distribution name in lower case."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    found = dict(map(_floor, wanted))
    tools = dict(map(_floor, extras["dev"]))
    return found | {name: tools[name] for name in TEST_TOOLS}


def _floor(requirement: str) -> tuple[str, str]:
    match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement.replace(" ", ""))
    if match is None:
        raise SystemExit(f"pyproject.toml: {requirement!r} has no plain lower bound NAME>=VERSION")
    return match[1].lower(), match[2]


def _constraints() -> list[str]:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def _link_torch(source: Path, target: Path) -> bool:
    """Put the torch of one environment into another; whether there is one now."""
    (there,) = (target / "lib").glob("python3*/site-packages")
    if (there / "torch").exists():
        return True
    here = source / "lib" / there.parent.name / "site-packages"
    if not (here / "torch").is_dir():
        return False
    for pattern in ("torch", "torch-*.dist-info", "torchgen", "functorch", "nvidia", "triton*"):
        for path in here.glob(pattern):
            (there / path.name).symlink_to(path.resolve())
    return True


def _check_installed(python: Path, floors: dict[str, str]) -> None:
    listed = subprocess.run(
        [python, *_PIP, "list", "--format", "json"], check=True, capture_output=True, text=True
    )
    installed = {_plain(row["name"]): row["version"] for row in json.loads(listed.stdout)}
    for name, version in floors.items():
        found = installed.get(_plain(name))
        if name != "torch" and not _same(found, version):
            raise SystemExit(f"{name}: {found} is installed, not the floor {version}")
        sys.stderr.write(f"{name} {found}\n")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _same(found: str | None, version: str) -> bool:
    """Whether two versions are one: 2.9 and 2.9.0 are."""
    ends = [re.sub(r"(\.0)+$", "", text or "") for text in (found, version)]
    return ends[0] == ends[1]


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / "runs" / "floors", metavar="DIR")
    parser.add_argument("--from-venv", type=Path, default=ROOT / ".venv", metavar="DIR")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest (after --)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
