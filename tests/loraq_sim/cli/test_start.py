"""The two ways to start the program."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(sys.executable).with_name("loraq-sim"))


@pytest.mark.parametrize("start", [[SCRIPT], [sys.executable, "-m", "loraq_sim"]])
def test_the_script_and_the_module_say_the_same(start, tmp_path):
    def run(*words):
        return subprocess.run(
            [*start, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    listed = run("hw", "list")
    assert (listed.returncode, "aie2" in listed.stdout, listed.stderr) == (0, True, "")
    wrong = run("hw", "show", "--no-such-option")
    assert wrong.returncode == 2
    assert "Usage: loraq-sim hw show" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
