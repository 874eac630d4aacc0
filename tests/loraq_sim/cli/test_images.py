"""``loraq-sim images`` on the bundled transformer."""

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from loraq_sim.cli.app import app


@pytest.fixture
def run(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words):
        words = ("images", "--hw", "aie2", "--images", 2, "--steps", 2, "--guidance", 3, *words)
        return CliRunner().invoke(app, [str(word) for word in words])

    return invoke


@pytest.fixture(autouse=True, scope="module")
def _diffusers():
    pytest.importorskip("diffusers", reason="needs the extra [diffusion]")


TINY = ("--checkpoint", "examples/tiny_pixart")


def test_images_writes_rows_a_grid_and_the_images(run, tmp_path):
    out = tmp_path / "a"
    result = run(
        *TINY, "--split", "W4A4,W4A4+W8A8@fp16r4", "--method", "loraq,svdquant",
        "--out", out, "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["split"], row["method"]) for row in rows] == [
        ("W4A4", "rtn"),
        ("W4A4+W8A8@fp16r4", "loraq"),
        ("W4A4+W8A8@fp16r4", "svdquant"),
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert row["psnr_db"] > 10
        assert 0 < row["ssim"] <= 1
        assert row["psnr_std"] >= 0
        assert row["seconds"] > 0
        assert (row["images"], row["steps"], row["seed"]) == (2, 2, 0)
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    with np.load(out / "images.npz") as images:
        assert len(images.files) == 4
        reference = images["reference"].astype(np.float64)
        drawn = [images[name] for name in images.files if name != "reference"]
    assert reference.shape == (2, 1, 16, 16)
    psnr = [10 * np.log10(4 / ((reference - x) ** 2).mean(axis=(1, 2, 3))) for x in drawn]
    assert rows[0]["psnr_db"] == pytest.approx(np.mean(psnr[0]))
    assert (rows[0]["psnr_gain_db"], rows[0]["gain_over"]) == (None, None)
    for row, values in zip(rows[1:], psnr[1:], strict=True):
        assert row["gain_over"] == "W4A4 rtn"
        assert row["psnr_gain_db"] == pytest.approx(np.mean(values - psnr[0]))
        # Of two images, half of how far their gains are apart.
        apart = abs(np.diff(values - psnr[0])[0])
        assert row["psnr_gain_se_db"] == pytest.approx(apart / 2)


@pytest.mark.parametrize("format", ["table", "csv", "md"])
def test_images_prints_every_format(run, tmp_path, format):
    result = run(*TINY, "--split", "W4A8", "--out", tmp_path, "--format", format)
    assert result.exit_code == 0, result.output
    assert "W4A8" in result.stdout
    assert "samples.png" in result.stderr


def test_the_data_path_may_be_overridden(run, tmp_path):
    words = (*TINY, "--split", "W8A8", "--format", "json")
    narrow = ("--acc-bits", 15, "--overflow", "saturate", "--rounding", "floor")
    plain = json.loads(run(*words, "--out", tmp_path / "a").stdout)["rows"][0]
    other = json.loads(run(*words, *narrow, "--out", tmp_path / "b").stdout)["rows"][0]
    assert (other["acc_bits"], other["overflow"], other["rounding"]) == (15, "saturate", "floor")
    assert other["overflow_count"] > 0 == plain["overflow_count"]
    assert other["psnr_db"] < plain["psnr_db"]


def test_smoothing_calibrates_first(run, tmp_path):
    words = (*TINY, "--split", "W4A4", "--smooth", 0.5, "--format", "json", "--out", tmp_path)
    row = json.loads(run(*words).stdout)["rows"][0]
    assert row["smooth"] == 0.5


def test_a_recipe_is_a_row_of_its_own(run, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('recipe = 1\n[layers]\n"*.attn1.*" = "W8A8"\nffn_up = "W4A4+W8A8r4"\n')
    result = run(*TINY, "--recipe", recipe, "--format", "json", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["split"], row["n_layers"]) == ("mine", 4 * 5)


def test_what_is_there_is_kept_unless_forced(run, tmp_path):
    words = (*TINY, "--split", "W8A8", "--out", tmp_path)
    assert run(*words).exit_code == 0
    again = run(*words)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(*words, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TINY, "--split or --recipe"),
        ((*TINY, "--split", "W4B4"), "not understood"),
        ((*TINY, "--split", "W4A4", "--images", "0"), "1 or more"),
        ((*TINY, "--split", "W4A4", "--hw", "aie9"), "aie9"),
        ((*TINY, "--split", "W4A4", "--rounding", "up"), "rounding"),
        ((*TINY, "--split", "W4A4", "--skip", "*"), "left to emulate"),
        ((*TINY, "--split", "W4A4", "--device", "cuda:7"), "cuda:7"),
        (("--checkpoint", "examples", "--split", "W4A4"), "config.json"),
        (("--checkpoint", "nowhere", "--split", "W4A4"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, words, message):
    result = run(*words, "--out", tmp_path / "a")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_missing_diffusers_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = run(*TINY, "--split", "W4A4", "--out", tmp_path)
    assert result.exit_code == 2
    assert "loraq-sim[diffusion]" in result.stderr


def test_images_that_leave_the_range_are_a_row_that_names_the_layer(run, tmp_path, monkeypatch):
    import loraq_sim.diffusion.emulated_model as emulated_layer

    plain = emulated_layer.run_layer
    monkeypatch.setattr(
        emulated_layer,
        "run_layer",
        lambda x, *rest, **named: plain(x * np.float32(1e8), *rest, **named),
    )
    words = ("--hw", "t4", "--split", "W8A8", "--format", "json", "--out", tmp_path)
    result = run(*TINY, *words)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["status"], row["psnr_db"], row["psnr_std"]) == ("overflow", None, None)
    assert row["clipped_count"] > 0
    assert "values beyond their float format in" in row["message"]
    assert (tmp_path / "samples.png").exists()


OWN = """
import torch

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(64, 64)
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return t * torch.tanh(self.mix(x.flatten(1))).reshape(x.shape) + self.conv(x)

def draw(*, steps, images, guidance, seed, first):
    noise = torch.randn(first + images, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    x = noise[first:]
    for i in range(steps):
        x = x - (yield 1 - i / steps, {"x": x, "t": 1.0}) / steps
    return x.clamp(-1, 1)

def own():
    return Own(), draw

def no_draw():
    return Own()

def no_images():
    def draw(**named):
        yield 0.0, {"x": torch.zeros(1, 1, 8, 8), "t": 1.0}
    return Own(), draw

def plain():
    return Own(), lambda *, steps, **named: [1]

def no_words():
    def draw():
        yield 0.0, {"x": torch.zeros(1, 1, 8, 8), "t": 1.0}
    return Own(), draw
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return lambda name: ("--checkpoint", f"{file}:{name}", "--split", "W4A4,W8A8")


def test_a_model_of_ones_own_draws_with_its_own_loop(run, tmp_path, own):
    result = run(
        *own("own"), "--condition", "auto", "--out", tmp_path / "a", "--format", "json",
        "--images", 6,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["n_layers"], row["space"], row["status"]) for row in rows] == 2 * [
        (1, "pixels", "ok")
    ]
    assert rows[1]["psnr_gain_db"] > 10
    # Calibration: another noise, and a condition that says what it chose.
    assert "of noise seed 1000003, none that is compared" in rows[0]["calibration"]
    assert rows[0]["message"].startswith("of 1 layer ")
    with np.load(tmp_path / "a" / "images.npz") as images:
        assert images["reference"].shape == (6, 1, 8, 8)
    # Image i has the noise of image i, in whatever batches: six of four and two at a time.
    words = ("--images", 6, "--batch", 5, "--out", tmp_path / "b", "--format", "json")
    assert run(*own("own"), *words).exit_code == 0
    with np.load(tmp_path / "a" / "images.npz") as a, np.load(tmp_path / "b" / "images.npz") as b:
        np.testing.assert_allclose(a["reference"], b["reference"], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_draw", "must return (model, draw)"),
        ("no_images", "must return (images, channels, height, width), got NoneType"),
        ("plain", "must be a generator of (time step, inputs)"),
        ("no_words", "draw must take steps, images, guidance, seed and first"),
        ("nothing", "nothing"),
    ],
)
def test_what_an_entry_point_lacks_is_one_line(run, tmp_path, own, name, message):
    result = run(*own(name), "--out", tmp_path / "a")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    result = run(*own("own"), "--captions", "x.safetensors", "--out", tmp_path / "a")
    assert "--captions are for a folder" in result.stderr


def test_dump_capture_records_what_images_draws(tmp_path, own):
    """The same function at both doors; rows against a loop written out here."""
    from loraq_sim.dumps import read_layer_dump

    out, entry = tmp_path / "own.safetensors", own("own")[1]
    words = ("--steps", 3, "--images", 2, "--seed", 5, "--tokens", 100, "--guidance", 3)
    command = ["dump", "capture", entry, "--out", str(out), *map(str, words)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "2 layers ran in 3 calls over 3 time steps" in result.stderr
    dump = read_layer_dump(out)
    assert (dump.meta["images"], dump.meta["guidance"]) == (2, 3.0)
    weight, bias = (dump["mix"].weight.astype(float), dump["mix"].bias.astype(float))
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    kernel = torch.from_numpy(dump["conv"].weight.reshape(1, 1, 3, 3).astype(np.float32))
    conv_bias = torch.from_numpy(dump["conv"].bias.astype(np.float32))
    x, seen = noise.numpy().astype(float), []
    for _ in range(3):
        rows = x.reshape(2, 64)
        seen.append(rows)
        mixed = np.tanh(rows @ weight.T + bias).reshape(x.shape)
        around = torch.nn.functional.conv2d(torch.from_numpy(x).float(), kernel, conv_bias, 1, 1)
        x = x - (mixed + around.numpy()) / 3
    found = dump["mix"].activations
    np.testing.assert_allclose(found, np.concatenate(seen), atol=1e-5)
    assert dump["conv"].activations.shape == (100, 9)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("plain", (), "must be a generator of (time step, inputs)"),
        ("no_words", (), "draw must take steps, images, guidance, seed and first"),
        ("own", ("--captions", "x.safetensors"), "--captions are for a folder"),
        ("own", ("--prompts", "x.txt"), "--prompts x.txt: cannot be read"),
        ("own", ("--steps", "0"), "steps and images must be at least 1, got 0 and 2"),
    ],
)
def test_capture_says_what_a_loop_of_ones_own_lacks(tmp_path, own, name, words, message):
    out = tmp_path / "own.safetensors"
    command = ["dump", "capture", own(name)[1], "--out", str(out), *words]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()
