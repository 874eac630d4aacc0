"""The two ways to start the program."""

import shutil
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
    from loraq_sim.cli.app import app, complete_words

    complete_words(app)
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
    ("line", "offered", "not_offered"),
    [
        ("sweep --preset ", {"fast", "balanced", "best"}, {"aie2"}),
        ("sweep --hw aie2,h1", {"aie2,h100"}, {"h100"}),
        ("solve --compare rtn,lor", {"rtn,loraq"}, {"loraq"}),
        ("cost --model pix", {"pixart-sigma"}, {"sdxl"}),
        ("hw explain mi3", {"mi300x"}, {"aie2"}),
        ("explain hyperv", {"hypervolume"}, {"knee"}),
        ("schema swe", {"sweep"}, {"solve"}),
        ("pareto runs --under lat", {"latency_s="}, {"energy_j="}),
        ("hw list --format j", {"json"}, {"csv"}),
        ("sweep --split W4A4", {"W4A4u", "W4A4+W8A8@fp16r32", "W4A4~W8A8@fp16r32"}, {"W8A8"}),
        ("sweep --split W4A8,W4A4+W8", {"W4A8,W4A4+W8A8r64"}, {"W4A8,W4A4+W8r64"}),
        ("sweep --split W5A7+W3A3", {"W5A7+W3A3r16", "W5A7+W3A3@fp16r32"}, {"W5A7+W8A8r16"}),
    ],
)
def test_words_of_options_complete_after_a_comma_too(
    line, offered, not_offered, monkeypatch, capsys
):
    found = completed("bash", f"loraq-sim {line}", monkeypatch, capsys).split()
    assert offered <= set(found)
    assert not not_offered & set(found)


def test_every_split_that_is_offered_is_one():
    from loraq_sim.cli.app import split_words
    from loraq_sim.split import parse_split

    for start in ("", "W4", "W4A4", "W4A4+", "W4A4~W8A8", "W4A8+W16A16@", "W6A6+W5A5", "x"):
        for word in split_words(start):
            assert word.startswith(start)
            parse_split(word)
    assert split_words("x") == []
    assert len(split_words("W4A4~")) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_real_shell_completes(shell, tmp_path):
    """Read the script of the shell as the documentation says, and press the key."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    home = {"HOME": str(tmp_path), "PATH": f"{Path(SCRIPT).parent}:/usr/bin:/bin"}
    source = home | {"_LORAQ_SIM_COMPLETE": f"source_{shell}"}
    text = subprocess.run([SCRIPT], env=source, capture_output=True, text=True, check=False).stdout
    if shell == "fish":
        words = ["-c", f"{text}\ncomplete -C'loraq-sim sweep --hw aie2,h1'"]
    elif shell == "bash":
        words = ["-c", f"{text}\nCOMP_WORDS=(loraq-sim sweep --hw aie2,h1); COMP_CWORD=3\n"]
        words[1] += "_loraq_sim_completion loraq-sim; echo ${COMPREPLY[@]}"
    else:
        # Outside of a line editor `_arguments` has no place to write to: it says what it got.
        words = ["-c", f"{text}\n_arguments() {{ echo $@ }}\nwords=(loraq-sim sweep --hw aie2,h1)"]
        words[1] += "; CURRENT=4; _loraq_sim_completion"
    done = subprocess.run([program, *words], env=home, capture_output=True, text=True, check=False)
    assert "aie2,h100" in done.stdout, done.stderr


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
