import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app


@pytest.fixture
def command(request, monkeypatch):
    """Run a command line from the project's root; the result has exit_code, stdout, stderr."""
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    return invoke


@pytest.fixture
def sweep(command):
    """Run a small sweep of two layers in three splits."""

    def invoke(out, *words):
        return command(
            *("sweep", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt"),
            *("--layers", "*.0.attn1.to_q,*.0.attn1.to_k", "--tokens", 16, "--preset", "fast"),
            *("--split", "W4A4,W4A8", "--split", "W4A4+W8A8r8", "--jobs", 0, "--quiet"),
            *("--out", out, *words),
        )

    return invoke
