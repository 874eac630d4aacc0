"""What commands leave on the disk: whole files that were asked for, and nothing else."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

LAYER = "transformer_blocks.0.attn1.to_q"
DUMP = ("--layer-dump", "examples/tiny_pixart.pt")
SMALL = ("--split", "W4A4+W8A8r8", "--preset", "fast", "--tokens", 16)


@pytest.fixture(scope="module")
def store(request, tmp_path_factory):
    """Folder of a small sweep's store."""
    from typer.testing import CliRunner

    from loraq_sim.cli.app import app

    out = tmp_path_factory.mktemp("swept") / "run"
    words = ("sweep", "--hw", "aie2", "--layer-dump", request.config.rootpath / DUMP[1])
    words += ("--layers", "*.0.attn1.to_q,*.0.attn1.to_k", "--jobs", 0, "--quiet", "--out", out)
    words += ("--split", "W4A4,W8A8", *SMALL)
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    return out


def writers(store, out):
    """Commands that write files under `out`, by name."""
    layer = (*DUMP, "--layer", LAYER, "--hw", "aie2")
    return {
        "vectors": ("vectors", *layer, *SMALL, "--out", out / "v", "--force"),
        "explain": ("explain", *layer, *SMALL, "--out", out / "e", "--force"),
        "report": ("report", store, "--out", out / "r.html", "--force"),
        "export csv": ("export", store, "--csv", out / "rows.csv", "--force"),
        "export parquet": ("export", store, "--parquet", out / "rows.parquet", "--force"),
        "pareto": ("pareto", store, "--figure", out / "front.svg", "--force"),
        "allocate": (
            "allocate",
            store,
            "--budget",
            "weight_bytes=1MB",
            "--out",
            out / "a",
            "--force",
        ),
        "solve": (
            *("solve", *DUMP, "--layers", LAYER, *SMALL),
            *("--save", out / "m.safetensors", "--force"),
        ),
        "dump convert": (
            *("dump", "convert", DUMP[1], out / "d.pt", "--layers", LAYER, "--force"),
        ),
        "hw validate": ("hw", "validate", "--figure", out / "times.png", "--force"),
    }


WRITERS = tuple(writers(Path(), Path()))


def files_in(*folders):
    """Content of every file under `folders` by path; folders too, as None."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for folder in folders
        for path in Path(folder).rglob("*")
    }


def changes_in(folder):
    """When each entry of `folder` was changed last; what lies deeper may be gigabytes of others."""
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("*")}


def fill_disk(monkeypatch, whole_files):
    """Every write to a temporary file fails after so many of them."""
    opened, count = Path.open, []

    def full(self, *args, **options):
        if self.suffix == ".tmp":
            count.append(self)
            if len(count) > whole_files:
                self.touch()
                return opened(Path("/dev/full"), "wb")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, whose writes all fail")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_whole_files_and_one_line_that_names_one(
    command, store, tmp_path, monkeypatch, name
):
    out = tmp_path / "out"
    out.mkdir()
    words = writers(store, out)[name]
    assert command(*words).exit_code == 0
    whole = files_in(out)
    n_files = sum(content is not None for content in whole.values())
    for earlier in range(0, n_files, max(1, n_files // 3)):
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        with monkeypatch.context() as patch:
            fill_disk(patch, earlier)
            result = command(*words)
        left = files_in(out)
        assert result.exit_code == 2, result.output
        (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
        refused = line.removeprefix("error: ").partition(": cannot be written: No space left")[0]
        assert refused in whole, line
        assert refused not in left
        assert {path: whole.get(path) for path in left} == left


@contextmanager
def largest_file(n_bytes):
    """No file may grow beyond `n_bytes`, as under a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_keeps_the_vectors_that_were_there(command, store, tmp_path):
    words = writers(store, tmp_path)["vectors"]
    assert command(*words, "--tile", "4x16x4").exit_code == 0
    before = files_in(tmp_path)
    with largest_file(4000):
        result = command(*words, "--tile", "16x128x16")
    assert result.exit_code == 2
    assert "cannot be written: File too large" in result.stderr
    assert files_in(tmp_path) == before


READERS = {
    "pareto": ("pareto", "STORE"),
    "pareto by layer": ("pareto", "STORE", "--by", "layer", "--format", "json"),
    "compare": ("compare", "STORE", "STORE"),
    "dump info": ("dump", "info", DUMP[1]),
    "hw list": ("hw", "list"),
    "hw show": ("hw", "show", "aie2"),
    "hw schema": ("hw", "schema"),
    "hw validate": ("hw", "validate"),
    "cost": ("cost", "--hw", "aie2", "--split", "W4A4", "--shape", "64x64x64"),
    "explain": ("explain", *DUMP, "--layer", LAYER, "--hw", "aie2", *SMALL),
    "emulate": ("emulate", *DUMP, "--layers", LAYER, "--hw", "aie2", *SMALL),
    "solve": ("solve", *DUMP, "--layers", LAYER, *SMALL),
    "allocate": ("allocate", "STORE", "--budget", "weight_bytes=1MB"),
    "doctor": ("doctor",),
    "dry run": ("sweep", *DUMP, "--hw", "aie2", "--dry-run", *SMALL),
}


@pytest.mark.parametrize("name", READERS)
def test_commands_that_only_read_write_nothing(command, store, tmp_path, monkeypatch, name):
    for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        (tmp_path / variable).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "TMPDIR"))
    monkeypatch.delenv("LORAQ_SIM_CACHE", raising=False)
    words = [store if word == "STORE" else word for word in READERS[name]]
    places = (tmp_path, store, "examples")
    before = files_in(*places), changes_in("runs")
    result = command(*words)
    assert result.exit_code == 0, result.output
    assert (files_in(*places), changes_in("runs")) == before
