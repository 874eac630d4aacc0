"""An entry point for ``loraq-sim dump capture``: a model of your own and what it is run on.

loraq-sim dump capture examples/capture_entry.py:two_layers --out runs/two_layers.safetensors
"""

import torch

STEPS = 10


class TwoLayers(torch.nn.Module):
    """Predicts a velocity for each of 32 tokens from the token and the time."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width + 1, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, time: float) -> torch.Tensor:
        """Map x of shape (images, tokens, width) to a velocity of the same shape."""
        times = torch.full((*x.shape[:-1], 1), time)
        return self.down(torch.nn.functional.gelu(self.up(torch.cat([x, times], dim=-1))))


def two_layers():
    """Return the model, and a generator of (time step, inputs); it gets each output back."""

    def calls():
        x = torch.randn(4, 32, 64)
        for i in range(STEPS):
            time = 1 - i / STEPS
            velocity = yield time, {"x": x, "time": time}
            x = x - velocity / STEPS

    return TwoLayers(), calls()
