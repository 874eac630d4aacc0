"""Sample grids: the same images under several arithmetics, one row each, the reference on top."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from loraq_sim.errors import InputError
from reports.panels import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sample_grid", "shown_image"]

# Inches.
_SIZE, _GAP, _LABEL, _MARGIN, _TITLE = 0.85, 0.06, 2.5, 0.15, 0.55
_MOST_IMAGES = 12


def sample_grid(
    rows: Mapping[str, tuple[np.ndarray, str]], *, title: str = "", subtitle: str = ""
) -> "Figure":
    """Draw rows of images, label and note to their left.

    Parameters
    ----------
    rows : mapping of label to (images, note)
        Images (images, channels, height, width), the same number in each row; the first row is
        the reference. A row's note stands below its label, such as ``27.6 dB``.
    title, subtitle : str

    Raises
    ------
    InputError
        If there are no images, or rows differ in shape.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = {images.shape for images, _ in rows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or 0 in next(iter(shapes)):
        raise InputError(f"rows must hold images of one shape, got {sorted(shapes)}")
    low, high = _shown_range(next(iter(rows.values()))[0])
    n_images = min(next(iter(shapes))[0], _MOST_IMAGES)
    top = _TITLE if title or subtitle else 0.0
    width = _LABEL + n_images * (_SIZE + _GAP) + _MARGIN
    height = top + len(rows) * (_SIZE + _GAP) + 2 * _MARGIN
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(_MARGIN / width, 1 - 0.2 / height, title, fontsize=11, color=INK, va="center")
    figure.text(_MARGIN / width, 1 - 0.42 / height, subtitle, fontsize=8, color=MUTED, va="center")
    for r, (label, (images, note)) in enumerate(rows.items()):
        bottom = height - top - _MARGIN - (r + 1) * _SIZE - r * _GAP
        middle = (bottom + _SIZE / 2) / height
        left = (_LABEL - 0.12) / width
        look = {"ha": "right", "color": INK if r else MUTED}
        figure.text(left, middle, label, fontsize=9, va="bottom" if note else "center", **look)
        figure.text(left, middle - 0.04 / height, note, fontsize=8.5, va="top", **look)
        for i, image in enumerate(images[:n_images]):
            place = ((_LABEL + i * (_SIZE + _GAP)) / width, bottom / height)
            axes = figure.add_axes((*place, _SIZE / width, _SIZE / height))
            axes.imshow(shown_image(image, low, high), interpolation="nearest")
            axes.set_axis_off()
    return figure


def shown_image(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """RGB (height, width, 3) within 0..1 of (channels, height, width); 1 channel is gray.

    Of latents, which have more channels, the first three are shown.
    """
    channels = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    return np.clip((channels.transpose(1, 2, 0) - low) / (high - low), 0.0, 1.0)


def _shown_range(reference: np.ndarray) -> tuple[float, float]:
    """-1..1 for pixels; for latents the range that holds all but the outermost 1 %."""
    if np.abs(reference).max() <= 1.0:
        return -1.0, 1.0
    low, high = np.quantile(reference, [0.005, 0.995])
    return float(low), float(max(high, low + 1e-6))
