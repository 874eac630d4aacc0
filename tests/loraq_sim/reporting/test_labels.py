"""Labels stay inside, off the points and off each other."""

import itertools
import math

import numpy as np
import pytest

from loraq_sim.reporting.labels import Box, place_labels

BOUNDS = Box(x0=0, y0=0, x1=900, y1=500)


def crowded_front(n, seed):
    rng = np.random.default_rng(seed)
    xs = np.sort(rng.uniform(200, 420, n))
    ys = np.sort(rng.uniform(250, 430, n))[::-1]
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def point_box(point):
    return Box(x0=point[0], y0=point[1], x1=point[0], y1=point[1]).grown(5)


@pytest.mark.parametrize("seed", range(5))
def test_twelve_labels_of_a_crowded_front_overlap_nothing(seed):
    anchors = crowded_front(12, seed)
    points = [point_box(anchor) for anchor in anchors]
    boxes = place_labels(
        anchors,
        [(85.0, 12.0)] * 12,
        bounds=BOUNDS,
        obstacles=points,
        distances=(10, 17, 27, 41, 60, 84, 112, 150),
    )
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes for point in points if box.overlaps(point)]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 900 and box.y1 <= 500 for box in boxes)


def test_lone_label_sits_below_left_of_its_point():
    (box,) = place_labels([(400.0, 250.0)], [(60.0, 12.0)], bounds=BOUNDS)
    assert box.y1 < 250
    assert (box.x0 + box.x1) / 2 < 400


def test_label_at_the_left_edge_moves_inside():
    wide = Box(x0=-900, y0=0, x1=900, y1=500)
    (free,) = place_labels([(4.0, 250.0)], [(60.0, 12.0)], bounds=wide)
    (box,) = place_labels([(4.0, 250.0)], [(60.0, 12.0)], bounds=BOUNDS)
    assert free.x0 < 0 <= box.x0
    assert math.dist(box.nearest((4.0, 250.0)), (4.0, 250.0)) < 20


def test_boxes_have_the_size_asked_for_and_their_order():
    sizes = [(60.0, 12.0), (90.0, 14.0)]
    boxes = place_labels([(100.0, 100.0), (500.0, 100.0)], sizes, bounds=BOUNDS)
    drawn = [(box.x1 - box.x0, box.y1 - box.y0) for box in boxes]
    # Corners below 1000 px: float64 keeps sums to 1e-12 of that.
    np.testing.assert_allclose(drawn, sizes, rtol=0, atol=1e-9)
    assert boxes[0].x1 < boxes[1].x0


def test_no_labels_need_no_boxes():
    assert place_labels([], [], bounds=BOUNDS) == []
