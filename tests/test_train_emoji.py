"""The training script of examples/emoji, on a few made-up pictures."""

import base64
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
# Of each: category, names, and whether the package has a picture of it.
ENTRIES = (
    *(("face-smiling", (f"FACE {i}", f"face_{i}", f"smile-{i}"), True) for i in range(4)),
    *(("heart", (f"HEART {i}", f"heart_{i}"), True) for i in range(4)),
    ("heart", ("LOST HEART", "lost"), False),
    ("flag", ("FLAG", "flag"), True),
    ("animal-mammal", ("YAK FACE", "yak"), True),
    ("animal-mammal", ("YAK", "yak2"), True),
)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, with a package of random pictures in place of the real one."""
    pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("train_emoji", EXAMPLES / "train_emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(0)
    package, entries = io.BytesIO(), []
    with tarfile.open(fileobj=package, mode="w") as archive:

        def add(name, data):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

        for i, (subcategory, names, has_picture) in enumerate(ENTRIES):
            entries.append(
                {
                    "name": names[0], "short_names": list(names[1:]), "image": f"{i}.png",
                    "subcategory": subcategory, "category": "Any", "sort_order": -i,
                }
            )  # fmt: skip
            if has_picture:
                pixels = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
                pixels[:32, :, 3], pixels[32:, :, 3] = 0, 255
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "png")
                add(f"package/img/twitter/64/{i}.png", file.getvalue())
        add("package/emoji.json", json.dumps(entries).encode())
    module.file = tmp_path / "emoji.tgz"
    module.file.write_bytes(package.getvalue())
    digest = base64.b64encode(hashlib.sha512(package.getvalue()).digest()).decode()
    monkeypatch.setattr(module, "PACKAGE_SHA512", digest)

    def run(out, **options):
        words = {"archive": module.file, "out": out, "text": "words", "batch": 4, "warmup": 2}
        words |= {"width": 64, "depth": 1, "patch": 8, "cooldown": 1, **options}
        argv = ["--all", *(word for k, v in words.items() for word in (f"--{k}", str(v)))]
        monkeypatch.setattr(sys, "argv", ["train", *argv])
        module.main()
        return (out / "diffusion_pytorch_model.safetensors").read_bytes()

    module.run = run
    yield module
    sys.modules.pop("train_tiny_pixart", None)


def test_two_steps_make_a_folder_that_draws_color_and_goes_on(script, tmp_path):
    first = script.run(tmp_path / "a", steps=2)
    log = json.loads((tmp_path / "a" / "training.json").read_text())["log"]
    assert log[-1]["step"] == 2
    assert (tmp_path / "a" / "captions.txt").read_text().splitlines()[:2] == ["yak face", "heart 3"]
    from loraq_sim.diffusion import load_transformer, sample_images

    transformer = load_transformer(tmp_path / "a")
    assert transformer.text.shape == (9 + 1, 10, 64)
    assert transformer.model.proj_out.weight.dtype == torch.float32
    assert sample_images(transformer, images=2, steps=1).shape == (2, 3, 32, 32)
    # More steps go on from there.
    assert script.run(tmp_path / "a", steps=3) != first
    log = json.loads((tmp_path / "a" / "training.json").read_text())["log"]
    assert [row["step"] for row in log] == [2, 3]


def test_a_run_in_two_parts_is_the_run_in_one(script, tmp_path):
    """Of what decides the files: the same bytes and losses, whether it was cut off or not."""
    script.run(tmp_path / "a", steps=2, cooldown=1)
    parts = script.run(tmp_path / "a", steps=4, cooldown=1)
    assert script.run(tmp_path / "b", steps=4, cooldown=1, average=0.99) == parts
    texts = [(tmp_path / name / "training.json").read_text() for name in "ab"]
    cut, whole = ({r["step"]: r for r in json.loads(text)["log"]} for text in texts)
    assert cut[4]["loss"] == pytest.approx(whole[4]["loss"], abs=2e-5)
    assert cut[4]["seconds"] >= cut[2]["seconds"]
    assert cut[4]["cpu_seconds"] >= cut[2]["cpu_seconds"]


def test_the_bundled_checkpoint_is_of_the_command_without_options(script, monkeypatch):
    kept = json.loads((EXAMPLES / "emoji" / "training.json").read_text())
    monkeypatch.setattr(sys, "argv", ["train", "--out", "anywhere"])
    plain = {k: v for k, v in vars(script._options()).items() if not isinstance(v, Path | None)}
    assert kept["options"] == plain
    assert kept["log"][-1]["step"] == plain["steps"]
    captions = (EXAMPLES / "emoji" / "captions.txt").read_text().splitlines()
    assert captions == list(script.SHOWN)
    page = (EXAMPLES / "emoji" / "README.md").read_text()
    for row in kept["log"]:
        assert f"| {row['step']:,} | {row['loss']:.3f} | {row['cpu_seconds'] / 60:.1f} |" in page


def test_pictures_stand_on_white_and_have_all_their_names(script):
    pictures, captions = script.read_emoji(script.file.read_bytes(), True)
    # In the order of the package's keyboard; neither flags nor what has no picture.
    assert captions[:2] == [["yak face", "yak"], ["heart 3"]]
    assert captions[-1] == ["face 0", "smile 0"]
    assert pictures.shape == (9, 3, 32, 32)
    assert (pictures[:, :, :16] == 255).all()
    assert pictures[:, :, 16:].float().mean() == pytest.approx(127.5, abs=3)


def test_few_emoji_are_learned_by_default(script, monkeypatch):
    monkeypatch.setattr(script, "SHOWN", ("flag", "face 2"))
    pictures, captions = script.read_emoji(script.file.read_bytes(), False)
    assert captions == [["flag"], ["face 2", "smile 2"]]
    assert len(pictures) == 2


def test_another_archive_is_refused(script, tmp_path):
    other = tmp_path / "other.tgz"
    other.write_bytes(b"no emoji")
    with pytest.raises(SystemExit, match=r"not emoji-datasource-twitter 16\.0\.0"):
        script.fetch_package(other, tmp_path)


@pytest.mark.parametrize("where", ["environment", "npmrc"])
def test_the_package_comes_from_the_registry_that_npm_would_ask(
    script, tmp_path, monkeypatch, where
):
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(tmp_path / "npmrc"))
    assert script._registry() == "https://registry.npmjs.org/"
    served = tmp_path / "mirror" / Path(script.PACKAGE)
    served.parent.mkdir(parents=True)
    served.write_bytes(script.file.read_bytes())
    mirror = (tmp_path / "mirror").as_uri()
    if where == "environment":
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", mirror)
    else:
        (tmp_path / "npmrc").write_text(f"color=false\nregistry={mirror}/\n")
    assert script.fetch_package(None, tmp_path / "cache") == script.file.read_bytes()
    served.unlink()
    assert script.fetch_package(None, tmp_path / "cache") == script.file.read_bytes()


def test_words_are_vectors_of_their_own(script):
    encode = script.WordVectors()
    red, blue = encode("red Heart"), encode("blue heart")
    torch.testing.assert_close(red[1], blue[1], rtol=0, atol=0)
    assert not torch.equal(red[0], blue[0])
    assert not red[2:].any()
    assert not encode("").any()


def test_the_text_encoder_is_bert(script, tmp_path):
    """Against torch's own encoder layer, which computes the same from the same weights."""
    rng = torch.Generator().manual_seed(0)
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat", "fa", "##ce", "!")
    encoder = script.MiniLM.__new__(script.MiniLM)
    encoder.ids = {word: i for i, word in enumerate(words)}
    weights = {}

    def made(name, *shape):
        weights[name] = 0.1 * torch.randn(shape, generator=rng) + name.endswith("LayerNorm.weight")

    for name, rows in (("word", 8), ("position", 16), ("token_type", 2)):
        made(f"embeddings.{name}_embeddings.weight", rows, 384)
    parts = {"output.dense": (384, 1536), "intermediate.dense": (1536, 384)}
    parts |= {f"attention.self.{name}": (384, 384) for name in ("query", "key", "value")}
    parts["attention.output.dense"] = (384, 384)
    for at in ("embeddings.", *(f"encoder.layer.{i}." for i in range(6))):
        for name, shape in ({} if at == "embeddings." else parts).items():
            made(f"{at}{name}.weight", *shape)
            made(f"{at}{name}.bias", shape[0])
        norms = ("",) if at == "embeddings." else ("output.", "attention.output.")
        for norm in norms:
            made(f"{at}{norm}LayerNorm.weight", 384)
            made(f"{at}{norm}LayerNorm.bias", 384)
    encoder.weights = weights
    found = encoder("cat face! zebra")

    ids = [words.index(word) for word in ("[CLS]", "cat", "fa", "##ce", "!", "[UNK]", "[SEP]")]
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    at = "embeddings.LayerNorm"
    x = torch.nn.functional.layer_norm(
        x, (384,), weights[at + ".weight"], weights[at + ".bias"], 1e-12
    )
    for i in range(6):
        at = f"encoder.layer.{i}."
        block = torch.nn.TransformerEncoderLayer(
            384, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self = [f"{at}attention.self.{name}" for name in ("query", "key", "value")]
        ends = {
            "self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense",
            "linear2": "output.dense", "norm1": "attention.output.LayerNorm",
            "norm2": "output.LayerNorm",
        }  # fmt: skip
        state = {
            f"{mine}.{kind}": weights[f"{at}{theirs}.{kind}"]
            for mine, theirs in ends.items()
            for kind in ("weight", "bias")
        }
        state["self_attn.in_proj_weight"] = torch.cat([weights[name + ".weight"] for name in self])
        state["self_attn.in_proj_bias"] = torch.cat([weights[name + ".bias"] for name in self])
        block.load_state_dict(state)
        with torch.no_grad():
            x = block.train()(x[None])[0]
    expected = torch.nn.functional.layer_norm(x, (384,))
    torch.testing.assert_close(found[: len(ids)], expected, rtol=1e-4, atol=1e-4)
    assert not found[len(ids) :].any()
