"""`docs/how_a_case_travels.md` names the files that a case runs through, no more and no less."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraq_sim.kernels.processor import choose_path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how_a_case_travels.md"
COMMAND = re.compile(r"^```bash\nloraq-sim (sweep .*?)\n```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:loraq_sim|hwmodels)/[\w/]+\.py)`")

# Runs a command and prints the files of the two packages that it called a function of, in order.
# What runs while a module is imported (decorators, class bodies) is not called by the command.
TRACER = """
import json, sys, threading
from pathlib import Path

import hwmodels, loraq_sim.cli.app
from loraq_sim.__main__ import main

root = Path(loraq_sim.cli.app.__file__).parents[2]
own = (f"{root}/loraq_sim/", f"{root}/hwmodels/")
called = {}

def is_importing(frame):
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(own):
            return True
        frame = frame.f_back
    return False

def profile(frame, event, _):
    name = frame.f_code.co_filename
    if event == "call" and name not in called and name.startswith(own) and not is_importing(frame):
        called[name] = frame.f_code.co_name

threading.setprofile(profile)
sys.setprofile(profile)
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
finally:
    sys.setprofile(None)
    threading.setprofile(None)
names = {str(Path(name).relative_to(root)): first for name, first in called.items()}
Path("called.json").write_text(json.dumps(names))
"""


def files_called(tmp_path):
    (command,) = COMMAND.findall(PAGE.read_text(encoding="utf-8"))
    words = command.replace("\\\n", " ").split()
    # One process: what a worker calls would not be seen.
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    done = subprocess.run(
        [sys.executable, "-c", TRACER, *words, "--jobs", "0"],
        cwd=tmp_path,
        env={**os.environ, "LORAQ_SIM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "called.json").read_text())


def test_the_page_names_every_file_that_a_case_runs_through(tmp_path):
    if choose_path() not in ("avx512", "avx2"):
        pytest.skip("the page follows the vector route of the emulator, which this machine lacks")
    called = files_called(tmp_path)
    # Compiled loops cannot be seen from Python, and the code that makes them runs only once.
    called = {name for name in called if not name.startswith("loraq_sim/kernels/")}
    named = set(NAMED.findall(PAGE.read_text(encoding="utf-8")))
    assert len(called) > 40
    assert sorted(called - named) == [], "run through, but not on the page"
    assert sorted(named - called) == [], "on the page, but not run through"
