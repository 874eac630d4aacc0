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


def completed(shell, words, monkeypatch, capsys):
    """What the program answers the completion of a shell, asked as that shell asks it."""
    from loraq_sim.cli.app import app

    monkeypatch.setenv("_LORAQ_SIM_COMPLETE", f"complete_{shell}")
    asked = {"bash": ("COMP_WORDS", words), "zsh": ("_TYPER_COMPLETE_ARGS", words)}
    asked["fish"] = asked["zsh"]
    monkeypatch.setenv(*asked[shell])
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - (not words.endswith(" "))))
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit):
        app(prog_name="loraq-sim")
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_machines_complete_in_every_shell(shell, monkeypatch, capsys):
    assert {"explain", "explore", "export"} <= set(
        completed(shell, "loraq-sim exp", monkeypatch, capsys)
        .replace('"', " ")
        .replace("\t", " ")
        .split()
    )
    assert "mi300x" in completed(shell, "loraq-sim cost --hw mi", monkeypatch, capsys)
    assert "aie2p" in completed(shell, "loraq-sim hw show ai", monkeypatch, capsys)


@pytest.mark.parametrize(
    ("shell", "said"),
    [("bash", "complete -o"), ("zsh", "#compdef loraq-sim"), ("fish", "--command")],
)
def test_the_script_of_each_shell_is_printed(shell, said, monkeypatch, capsys):
    from loraq_sim.cli.app import app

    monkeypatch.setenv("_LORAQ_SIM_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        app(prog_name="loraq-sim")
    assert said in capsys.readouterr().out
