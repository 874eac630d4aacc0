"""The denoising loops on models whose answer is known, without diffusers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loraq_sim.dumps.capture_diffusers import Transformer, denoising_calls


class KnownModel(torch.nn.Module):
    """Sees through any noise to one image; answers with velocity, or with noise and a variance."""

    def __init__(self, out_channels):
        super().__init__()
        self.config = SimpleNamespace(
            in_channels=2, out_channels=out_channels, sample_size=3, use_additional_conditions=False
        )
        image = torch.linspace(-1, 1, 18).reshape(2, 3, 3)
        self.image = torch.nn.Parameter(image, requires_grad=False)

    def signal(self, timestep):
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        return torch.prod(1 - betas[: round(timestep) + 1])

    def forward(self, hidden_states, encoder_hidden_states, timestep, return_dict, **extra):
        time = float(timestep[0])
        if self.config.out_channels == 2:
            return ((hidden_states - self.image) / (time / 1000),)
        kept = self.signal(time)
        noise = (hidden_states - kept.sqrt() * self.image) / (1 - kept).sqrt()
        return (torch.cat([noise, torch.full_like(noise, 9.0)], dim=1).float(),)


def denoise(model, steps, images=3):
    text = torch.arange(4.0).reshape(4, 1, 1)
    seen = []
    options = {"steps": steps, "images": images, "guidance": 2.0, "seed": 0}
    transformer = Transformer(
        folder=Path(), model=model, class_name="PixArtTransformer2DModel", text=text, captions=""
    )
    calls = denoising_calls(transformer, **options)
    answer = None
    with torch.no_grad():
        while True:
            try:
                step, inputs = calls.send(answer)
            except StopIteration:
                return seen
            seen.append((step, inputs))
            answer = model(**inputs)


@pytest.mark.parametrize("out_channels", [2, 4], ids=["velocity", "noise and variance"])
def test_the_loop_goes_straight_from_the_noise_to_the_image_the_model_sees(out_channels):
    model = KnownModel(out_channels)
    seen = denoise(model, steps=50)
    distances = []
    for step, inputs in seen:
        x = inputs["hidden_states"]
        kept = 1 - step / 1000 if out_channels == 2 else float(model.signal(step)) ** 0.5
        noise = step / 1000 if out_channels == 2 else (1 - kept**2) ** 0.5
        # What is left beside the image is the noise it started from, in due proportion.
        distances.append(float((x - kept * model.image).std() / noise))
    assert distances == pytest.approx([distances[0]] * 50, rel=1e-3)
    assert 0.7 < distances[0] < 1.3


def test_time_steps_and_captions_of_the_calls():
    seen = denoise(KnownModel(2), steps=4)
    assert [step for step, _ in seen] == [1000, 750, 500, 250]
    text = seen[0][1]["encoder_hidden_states"].flatten().tolist()
    assert text == [0, 1, 2, 3, 3, 3]
    assert [step for step, _ in denoise(KnownModel(4), steps=4)] == [999, 749, 499, 249]
    many = denoise(KnownModel(2), steps=1, images=5)[0][1]
    assert many["encoder_hidden_states"].flatten().tolist() == [0, 1, 2, 0, 1, 3, 3, 3, 3, 3]
    assert many["timestep"].tolist() == [1000.0] * 10
