"""Sample grids: what is drawn where, and in which colors."""

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.reporting.layer_figures import sample_grid, shown_image

pytestmark = pytest.mark.pictures


def rows(channels=1, n_images=3, scale=1.0):
    rng = np.random.default_rng(0)
    images = scale * rng.uniform(-1, 1, (n_images, channels, 8, 8))
    return {"reference": (images, ""), "W4A4": (images * 0.5, "27.6 dB")}


def test_a_grid_has_one_picture_for_each_image_of_each_row():
    figure = sample_grid(rows(), title="A title", subtitle="of something")
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 2 * 3
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["A title", "of something", "reference", "", "W4A4", "27.6 dB"]
    # The same image stands below its reference.
    boxes = [axes.get_position() for axes in pictures]
    for above, below in zip(boxes[:3], boxes[3:], strict=True):
        assert above.x0 == pytest.approx(below.x0)
        assert above.y0 > below.y1
    assert all(box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1 for box in boxes)


def test_words_stay_inside_the_figure_and_off_the_pictures():
    long = {"full precision": rows()["reference"], "W4A4+W8A8@fp16r32 svdquant": rows()["W4A4"]}
    figure = sample_grid(long, title="t")
    figure.canvas.draw()
    edge = min(axes.get_window_extent().x0 for axes in figure.axes)
    for text in figure.texts[2:]:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= edge


def test_at_most_twelve_images_are_drawn():
    assert len(sample_grid(rows(n_images=20)).axes) == 2 * 12


def test_pixels_and_latents_become_colors_within_range():
    gray = shown_image(np.array([[[-1.0, 0.0, 1.0, 2.0]]]), -1.0, 1.0)
    np.testing.assert_allclose(gray[0, :, 0], [0, 0.5, 1, 1])
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
    latents = np.arange(4 * 2 * 2, dtype=float).reshape(4, 2, 2)
    assert shown_image(latents, 0.0, 15.0).shape == (2, 2, 3)
    figure = sample_grid(rows(channels=4, scale=7.0))
    shown = np.concatenate([axes.images[0].get_array().ravel() for axes in figure.axes[:3]])
    assert shown.min() < 0.1
    assert shown.max() > 0.9


def test_rows_of_different_shapes_are_refused():
    wrong = {"reference": rows()["reference"], "W4A4": rows(n_images=2)["W4A4"]}
    with pytest.raises(InputError, match="one shape"):
        sample_grid(wrong)
    with pytest.raises(InputError, match="one shape"):
        sample_grid({})
