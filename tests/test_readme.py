"""The README's commands and Python example run as they stand."""

import re
import shlex
import sys

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app


def readme_blocks(root, language):
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def in_a_copy(request, tmp_path, monkeypatch):
    """Work in a folder that has examples and measured rows, and receives what commands write."""
    for name in ("examples", "hwmodels"):
        (tmp_path / name).symlink_to(request.config.rootpath / name)
    monkeypatch.chdir(tmp_path)
    return request.config.rootpath


@pytest.mark.pictures
def test_every_command_of_the_readme_runs(in_a_copy):
    lines = [line for block in readme_blocks(in_a_copy, "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("loraq-sim ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)[1:]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{command}\n{done.output}"
        assert done.stdout


def test_the_python_example_runs(in_a_copy, capsys):
    (example,) = readme_blocks(in_a_copy, "python")
    namespace = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["row"]["status"] == "ok"
    assert namespace["out"].dtype == "int8"
    assert namespace["cost"].latency_s > 0


def test_the_make_targets_of_the_readme_exist(in_a_copy):
    makefile = (in_a_copy / "Makefile").read_text()
    targets = {
        line.split()[1]
        for block in readme_blocks(in_a_copy, "bash")
        for line in block.splitlines()
        if line.startswith("make ")
    }
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "sweep --hw aie2 --layer-dump examples/tiny_pixart.pt" in makefile


def numbers_by_split(text):
    """Bits per weight, output error in % and SQNR in dB of each row of a printed table."""
    rows = [line.split() for line in text.splitlines() if line.startswith(" W")]
    return {row[0]: tuple(map(float, row[1:4])) for row in rows}


def test_the_table_in_the_readme_is_what_the_demo_prints(in_a_copy, monkeypatch):
    # As on a terminal of 80 columns.
    monkeypatch.setattr("loraq_sim.cli.output.is_terminal", lambda stream: stream is sys.stdout)
    monkeypatch.setenv("COLUMNS", "80")
    (shown,) = [block for block in readme_blocks(in_a_copy, "text") if "Pareto front" in block]
    words = "sweep --hw aie2 --layer-dump examples/tiny_pixart.pt --out runs/demo --quiet"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0
    printed_lines = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    table = printed_lines.split("\n\nNot on the front")[0]
    assert shown.splitlines()[:6] == table.splitlines()[:6]
    if shown.startswith(table + "\n...\n"):
        return
    # Stored bytes are exact. Factorizations round differently in other BLAS builds and processors,
    # which alternation can amplify, and a front may gain or lose a split: no digit is then known.
    printed = numbers_by_split(done.stdout)
    expected = numbers_by_split(shown)
    assert len(expected) >= 4
    for split, (bits, error, sqnr) in expected.items():
        assert printed[split][0] == bits
        assert printed[split][1] == pytest.approx(error, rel=0.02)
        assert printed[split][2] == pytest.approx(sqnr, abs=0.2)
