"""`benchmarks/mutation.py`: what survives, hangs or no longer fits the source is told as such."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

TABLE = """
[[file]]
path = "loraq_sim/sums.py"
tests = ["tests/test_sums.py"]

[[file.mutant]]
what = "a difference"
old = "a + b"
new = "a - b"

[[file.mutant]]
what = "a sum of sizes"
old = "return a + b"
new = "return abs(a) + abs(b)"
survives = "no test adds negative numbers"

[[file.mutant]]
what = "a count without an end"
old = "i += 1"
new = "i += 0"

[[file.mutant]]
what = "the order of a sum"
old = "a + b"
new = "b + a"
equivalent = "sums of integers commute"

[[file.mutant]]
what = "a product"
old = "a * b"
new = "a / b"
"""
SOURCE = """
import time


def add(a, b):
    return a + b


def count(n):
    i = 0
    while i < n:
        time.sleep(0.001)
        i += 1
    return i
"""
TEST = """
from loraq_sim.sums import add, count


def test_sums():
    assert add(2, 3) == 5
    assert count(2) == 2
"""


@pytest.fixture
def project(tmp_path):
    files = {
        "loraq_sim/__init__.py": "",
        "loraq_sim/sums.py": SOURCE,
        "tests/test_sums.py": TEST,
        "benchmarks/mutants.toml": TABLE,
        "benchmarks/mutation.py": (BENCHMARKS / "mutation.py").read_text("utf-8"),
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def run(project, *words):
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import mutation\n"
        "mutation.LIBRARIES, mutation.GRACE_S = ('pytest',), 3\n"
        f"sys.argv[1:] = {list(words)!r}; sys.exit(mutation.main())\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def test_what_tests_do_not_notice_is_told_with_its_reason(project):
    done = run(project)
    assert done.returncode == 1, done.stdout + done.stderr  # the product is gone
    lines = done.stdout.splitlines()
    assert lines[0] == "loraq_sim/sums.py: the old text of 'a product' is there 0 times"
    outcomes = {line.split(": ")[1].split(" |")[0]: line.split()[0] for line in lines[2:]}
    assert outcomes == {
        "a difference": "killed",
        "a sum of sizes": "survived",
        "a count without an end": "hangs",
        "the order of a sum": "survived",
    }
    note = (project / "benchmarks" / "mutation.md").read_text("utf-8")
    assert "2 of 3 mutants (66.7 %)" in note
    assert "a sum of sizes: no test adds negative numbers" in note
    assert "the order of a sum: sums of integers commute" in note
    assert "the old text of 'a product' is there 0 times" in note
    assert (project / "loraq_sim" / "sums.py").read_text("utf-8") == SOURCE
    (project / "tests" / "test_sums.py").write_text(TEST.replace("== 5", "== 6"), "utf-8")
    failing = run(project, "--only", "difference")
    assert failing.returncode == 1
    assert "tests/test_sums.py fails without a mutant: " in failing.stderr


def test_every_mutant_of_the_table_changes_one_file_and_names_its_tests():
    spec = importlib.util.spec_from_file_location("mutation", BENCHMARKS / "mutation.py")
    mutation = importlib.util.module_from_spec(spec)
    sys.modules["mutation"] = mutation
    spec.loader.exec_module(mutation)
    mutants = mutation.read_table()
    assert len(mutants) >= 150
    names = [(mutant.file, mutant.what) for mutant in mutants]
    assert len(set(names)) == len(names)
    for mutant in mutants:
        assert mutant.tests, mutant.what
        assert mutant.old != mutant.new, mutant.what
