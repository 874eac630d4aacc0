"""Bad input: one clear line on stderr, the right exit code, never a traceback."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.errors import StoreError
from loraq_sim.results.store import ResultStore

PROGRAM = "from loraq_sim.__main__ import main; main()"
SWEEP = ("sweep", "--hw", "aie2", "--jobs", "0", "--preset", "fast", "--tokens", "8")


@pytest.fixture
def run(request, monkeypatch):
    """Run a command line from the project's root, in this process."""
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        # Anything but a planned exit would have been a traceback.
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done

    return invoke


def refused(done):
    """Whether a command ended with one line of error, nothing on stdout and exit code 2."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.exit_code == 2 and len(errors) == 1 and done.stdout == ""


def test_the_installed_program_shows_no_traceback(request):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "sweep", "--hw", "aie2", "--layer-dump", "no such file.pt"],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no such file.pt" in done.stderr


def layer(seed=0, **changes):
    rng = np.random.default_rng(seed)
    tensors = {
        "weight": torch.tensor(rng.standard_normal((16, 64)), dtype=torch.float16),
        "bias": None,
        "activations": torch.tensor(rng.standard_normal((8, 64)), dtype=torch.float16),
        "kind": "linear",
        "group": "g",
    }
    return tensors | changes


def write_dump(path, layers):
    torch.save({"format": "layer-dump-v0", "meta": {}, "layers": layers}, path)
    return path


def poisoned(value):
    weight = layer()["weight"].clone()
    weight[3, 5] = value
    return weight


class RunsCode:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def broken_dump(kind, folder):
    path = folder / f"{kind}.pt"
    if kind == "missing":
        return path
    if kind == "text":
        path.write_text("hello, this is not a dump\n")
    elif kind == "empty_file":
        path.write_bytes(b"")
    elif kind == "no_layers":
        write_dump(path, {})
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        whole = write_dump(folder / "whole.pt", {"a": layer()}).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "nan":
        write_dump(path, {"a": layer(weight=poisoned(float("nan")))})
    elif kind == "inf_activations":
        bad = layer()["activations"].clone()
        bad[1, 2] = float("inf")
        write_dump(path, {"a": layer(activations=bad)})
    elif kind == "shape_mismatch":
        write_dump(path, {"a": layer(activations=torch.zeros((8, 63), dtype=torch.float16))})
    elif kind == "integer_weight":
        write_dump(path, {"a": layer(weight=torch.ones((16, 64), dtype=torch.int32))})
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "missing.pt"),
        ("text", "text.pt"),
        ("empty_file", "empty"),
        ("no_layers", "no layers"),
        ("folder", "folder"),
        ("truncated", "truncated.pt"),
        ("nan", "nan"),
        ("inf_activations", "activations"),
        ("shape_mismatch", "63"),
        ("integer_weight", "int32"),
    ],
)
def test_an_unusable_dump_is_refused_in_one_line(run, tmp_path, kind, message):
    path = broken_dump(kind, tmp_path)
    done = run(*SWEEP, "--layer-dump", path, "--split", "W4A4", "--out", tmp_path / "out")
    assert refused(done)
    assert message in done.stderr


@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "pickle in a zip"])
@pytest.mark.parametrize("words", [("dump", "info"), (*SWEEP, "--split", "W4A4", "--layer-dump")])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(run, tmp_path, wrapped, words):
    trace = tmp_path / "it ran"
    payload = pickle.dumps({"layers": {"a": RunsCode(str(trace))}}, protocol=2)
    path = tmp_path / "evil.pt"
    if wrapped:
        torch.save({"layers": {"a": layer()}}, path)
        with (
            zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old,
            zipfile.ZipFile(path, "w") as new,
        ):
            for name in old.namelist():
                new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))
    else:
        path.write_bytes(payload)
    done = run(*words, path)
    assert refused(done)
    assert "evil.pt" in done.stderr
    assert not trace.exists()


GOOD = "examples/tiny_pixart.pt"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*SWEEP[:1], "--hw", "aie3", "--layer-dump", GOOD), "aie2"),
        ((*SWEEP, "--layer-dump", GOOD, "--split", "W4B4"), "W4A4+W8A8r64"),
        ((*SWEEP, "--layer-dump", GOOD, "--split", "W4A9"), "or 16 bits, got 9"),
        ((*SWEEP, "--layer-dump", GOOD, "--method", "lorak"), "did you mean 'loraq'"),
        ((*SWEEP, "--layer-dump", GOOD, "--preset", "fats"), "did you mean 'fast'"),
        ((*SWEEP, "--layer-dump", GOOD, "--family", "intt"), "did you mean 'int'"),
        ((*SWEEP, "--layer-dump", GOOD, "--tokens", "0"), "tokens must be a positive integer"),
        ((*SWEEP, "--layer-dump", GOOD, "--seed", "-1"), "seed must be"),
        ((*SWEEP, "--layer-dump", GOOD, "--seed", str(10**30)), "seed must be"),
        ((*SWEEP, "--layer-dump", GOOD, "--tokens", str(10**30)), "tokens must be"),
        ((*SWEEP, "--layer-dump", GOOD, "--group", "0"), "group must be"),
        ((*SWEEP, "--layer-dump", GOOD, "--layers", "*.attn9.*"), "attn9"),
        ((*SWEEP, "--layer-dump", GOOD, "--acc-bits", "7"), "acc_bits"),
        ((*SWEEP, "--layer-dump", GOOD, "--acc-bits", "16,x"), "--acc-bits must be"),
        ((*SWEEP, "--layer-dump", GOOD, "--array", "imna"), "did you mean 'imma'"),
        ((*SWEEP, "--layer-dump", GOOD, "--overflow", "wrapp"), "did you mean 'wrap'"),
        ((*SWEEP, "--layer-dump", GOOD, "--p-format", "fp32"), "unknown format of P"),
        ((*SWEEP, "--layer-dump", GOOD, "--out", "/proc/nowhere/x"), "/proc/nowhere"),
        (("cost", "--hw", "aie2", "--shape", "10x20"), "MxKxN"),
        (("cost", "--hw", "aie2", "--shape", "m=8,n=8"), "m=4096,n=4608,k=1152"),
        (("cost", "--hw", "aie2", "--shape", "m=8,n=8,m=8"), "m=4096,n=4608,k=1152"),
        (("cost", "--hw", "aie2", "--shape", "m=8,n=8,k=8,h=8"), "m=4096,n=4608,k=1152"),
        (("cost", "--hw", "aie2", "--shape", "m=8,n=8,k=0"), "m=4096,n=4608,k=1152"),
        (("cost", "--hw", "aie2"), "--shape"),
        (("cost", "--hw", "no/such.yaml", "--shape", "1x1x1"), "no/such.yaml"),
        (("hw", "show", "a10"), "a100"),
        (("pareto", "no/such/store"), "no/such/store"),
        (("pareto", GOOD), "tiny_pixart.pt"),
        (("solve", "--layer-dump", GOOD, "--split", "W4A4+W8A8r500"), "min(N, K) = 128"),
    ],
)
def test_bad_words_are_refused_in_one_line_that_helps(run, words, message):
    done = run(*words)
    assert refused(done)
    assert message in done.stderr


@pytest.mark.parametrize(
    "words", [("sweep",), ("swep",), ("sweep", "--hx", "aie2"), ("hw", "list", "--format", "xml")]
)
def test_wrong_usage_exits_with_two(run, words):
    assert run(*words).exit_code == 2


def test_one_bad_layer_does_not_stop_a_sweep(run, tmp_path):
    path = write_dump(
        tmp_path / "d.pt", {"good": layer(), "bad": layer(weight=poisoned(float("nan")))}
    )
    done = run(
        *(*SWEEP, "--layer-dump", path, "--split", "W4A4", "--split", "W4A8"),
        *("--out", tmp_path / "out", "--format", "json"),
    )
    assert done.exit_code == 1
    rows = {(row["layer"], row["split"]): row for row in json.loads(done.stdout)["rows"]}
    assert {key: row["status"] for key, row in rows.items()} == {
        ("good", "W4A4"): "ok",
        ("good", "W4A8"): "ok",
        ("bad", "W4A4"): "failed",
        ("bad", "W4A8"): "failed",
    }
    assert "nan" in rows["bad", "W4A4"]["message"].lower()
    assert "2 cases failed" in done.stderr


@pytest.mark.parametrize("command", ["solve", "emulate", "cost"])
def test_one_bad_layer_leaves_the_others_their_rows(run, tmp_path, command):
    narrow = layer(weight=layer()["weight"][:1].clone())
    path = write_dump(tmp_path / "d.pt", {"good": layer(), "narrow": narrow})
    words = [command, "--layer-dump", path, "--split", "W4A4+W8A8r4", "--format", "json"]
    done = run(*words, *([] if command == "solve" else ["--hw", "aie2"]))
    assert done.exit_code == 1
    rows = {row["layer"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["good"]["status"] == "ok"
    assert rows["narrow"]["status"] == "failed"
    assert "1 of 2 cases failed" in done.stderr


def test_default_splits_of_cost_suit_narrow_layers(run):
    assert run("cost", "--hw", "aie2", "--shape", "7x5x3").exit_code == 0


@pytest.mark.parametrize(("hw", "n_rows"), [("mine", 11), ("mine,aie2", 24)])
def test_default_splits_are_those_that_a_machine_has_modes_for(run, tmp_path, hw, n_rows):
    """A machine without 16-bit modes: nobody asked for what would fail there."""
    hw = hw.replace("mine", f"{tmp_path}/mine.yaml")
    assert run("hw", "new", tmp_path / "mine.yaml", "--modes", "int8,int4x8").exit_code == 0
    path = write_dump(tmp_path / "d.pt", {"a": layer()})
    words = ("--hw", hw, "--layer-dump", path, "--preset", "fast", "--jobs", 0)
    done = run("sweep", *words, "--out", tmp_path / "out", "--format", "json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == n_rows
    wide = {row["accelerator"] for row in rows if "W16A16" in row["split"]}
    assert wide == ({"aie2"} if "aie2" in hw else set())
    assert "left out of the default splits on mine: no MAC mode" in done.stderr
    costed = run("cost", "--hw", hw, "--shape", "64x64x64", "--format", "json")
    assert costed.exit_code == 0, costed.stderr
    # Who asks for it is told why not.
    asked = run("cost", "--hw", hw, "--shape", "64x64x64", "--split", "W4A4+W16A16r8")
    assert asked.exit_code == (1 if "aie2" in hw else 2)
    assert "no MAC mode wide enough for int W16A16" in asked.stderr


def test_a_layer_without_activations_is_named_as_the_reason_for_an_empty_front(run, tmp_path):
    path = write_dump(tmp_path / "d.pt", {"a": layer(), "bare": layer(activations=None)})
    words = ("--layer-dump", path, "--split", "W4A4", "--out", tmp_path / "out")
    done = run(*SWEEP, *words)
    assert done.exit_code == 0
    assert "1 of 2 layers have no activations" in " ".join(done.stdout.split())


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_traceback(request, tmp_path, closed):
    words = f"dump info {GOOD} --no-statistics {'>&-' if closed == 'stdout' else '2>&-'}"
    done = subprocess.run(
        f"{sys.executable} -c '{PROGRAM}' {words}",
        shell=True,
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_rank_too_large_for_one_layer_fails_only_there(run, tmp_path):
    small = layer(weight=layer()["weight"][:4].clone())
    path = write_dump(tmp_path / "d.pt", {"good": layer(), "small": small})
    done = run(
        *(*SWEEP, "--layer-dump", path, "--split", "W4A4+W8A8r8", "--format", "json"),
        *("--out", tmp_path / "out"),
    )
    assert done.exit_code == 1
    rows = {row["layer"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["good"]["status"] == "ok"
    assert "min(N, K) = 4" in rows["small"]["message"]
    # Said before the run starts.
    first, _, rest = done.stderr.partition("\n")
    assert first.startswith("split W4A4+W8A8r8 fails in 1 of 2 layers (1 case), such as small:")
    assert "1 case failed" in rest
    dry = run(
        *(*SWEEP, "--layer-dump", path, "--split", "W4A4+W8A8r8", "--dry-run"),
        *("--out", tmp_path / "out"),
    )
    assert (dry.exit_code, first in dry.stderr) == (0, True)


def test_a_rank_too_large_for_every_layer_is_a_mistake_of_the_command(run, tmp_path):
    words = ("--layer-dump", GOOD, "--split", "W4A4+W8A8r9999,W4A4", "--out", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        done = run(*SWEEP, *words, *more)
        assert refused(done)
        assert "split W4A4+W8A8r9999 cannot be solved in any of its" in done.stderr
    assert not (tmp_path / "out").exists()


def test_results_of_another_kind_are_not_overwritten(run, tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    done = run(*SWEEP, "--layer-dump", GOOD, "--out", tmp_path, "--split", "W4A4")
    assert refused(done)
    assert (tmp_path / "results.csv").read_text() == "mine"


def test_ctrl_c_keeps_finished_rows_and_exits_with_130(request, tmp_path):
    words = ["sweep", "--hw", "aie2", "--layer-dump", "examples/minilm.pt", "--preset", "best"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words, "--jobs", "1", "--out", str(out)],
        cwd=request.config.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Shells let what runs in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 600
    n_rows = 0
    while n_rows == 0 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        # The store is opened while it is being made, too.
        with suppress(StoreError), ResultStore.open(out / "results.sqlite") as store:
            n_rows = len(store.rows())
    assert n_rows > 0, process.communicate()
    # As a terminal does: the whole process group gets the signal.
    os.killpg(process.pid, signal.SIGINT)
    # 2 s is the promise; the rest is for a loaded machine.
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    with ResultStore.open(out / "results.sqlite") as store:
        assert n_rows <= len(store.rows()) < 8 * 13


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--resolution", "512"), "--model"), (("--layers", "ffn_*"), "--layer-dump")],
)
def test_cost_ignores_no_option(command, words, named):
    done = command("cost", "--hw", "aie2", "--shape", "64x64x64", "--split", "W4A4", *words)
    assert done.exit_code == 2
    assert words[0] in done.stderr
    assert named in done.stderr
