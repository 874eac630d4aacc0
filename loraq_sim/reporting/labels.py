"""The label of a precision split in a picture: what it says, its color and marker, and its place.

A name is read without the parser of splits: results may come from an old store or another tool, so
one that does not parse is no error here. The main branch sets the color and the branch the marker.
Colors are Okabe and Ito's palette (Color Universal Design, 2008), told apart with every common form
of color blindness; the shape repeats what matters, so a gray print still reads. Known precisions
keep their color in every figure; others take the next free one in sorted order.

Places are found in pixels, without a plotting library. Each label tries places around its point,
from near to far; the cheapest wins, where cost adds up covered points, covered labels, crossed
leader lines and distance. Labels move in turn until none gains (at most `_PASSES` rounds).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraq_sim.results.wording import main_and_branch_of

__all__ = [
    "Box",
    "NO_BRANCH",
    "SERIES_COLORS",
    "branch_markers",
    "dark_color",
    "main_and_branch",
    "main_colors",
    "main_weight_bits",
    "part_colors",
    "place_labels",
]


_PASSES = 6
_N_DIRECTIONS = 24
# Below and left of a front there is nothing by definition, so that side is free of points.
_PREFERRED_ANGLE = math.radians(225)

_COST_LABEL = 1000.0
_COST_OUTSIDE = 1500.0
_COST_POINT = 400.0
_COST_PASSED = 60.0
_COST_CROSSING = 250.0
_COST_LINE = 14.0
_COST_DISTANCE = 0.8
_COST_DIRECTION = 6.0


@dataclass(frozen=True, kw_only=True)
class Box:
    """Axis-aligned rectangle in pixels, y upward."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the open interiors share a point."""
        return (
            self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1
        )

    def grown(self, margin: float) -> "Box":
        """The box with `margin` added on every side."""
        return Box(
            x0=self.x0 - margin, y0=self.y0 - margin, x1=self.x1 + margin, y1=self.y1 + margin
        )

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """The point of the box that is nearest to `point`."""
        return (min(max(point[0], self.x0), self.x1), min(max(point[1], self.y0), self.y1))


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    bounds: Box,
    obstacles: Sequence[Box] = (),
    line: Sequence[tuple[float, float]] = (),
    distances: Sequence[float] = (9.0, 16.0, 26.0, 40.0, 58.0, 80.0, 108.0),
) -> list[Box]:
    """Boxes for the labels, one for each anchor and in the same order.

    Parameters
    ----------
    anchors : sequence of (float, float)
        Labelled points, in pixels.
    sizes : sequence of (float, float)
        Width and height of each label, in pixels.
    bounds : Box
        Area the labels should stay in.
    obstacles : sequence of Box
        Drawn points; covering one costs much.
    line : sequence of (float, float)
        Samples of a drawn line; covering one costs little.
    distances : sequence of float
        Gaps between point and label to try, in pixels.
    """
    places = [
        _candidates(anchor, size, distances) for anchor, size in zip(anchors, sizes, strict=True)
    ]
    boxes = np.array([(b.x0, b.y0, b.x1, b.y1) for b in obstacles]).reshape(-1, 4)
    samples = np.array(line, dtype=np.float64).reshape(-1, 2)
    own = [
        _own_costs(options, anchor, bounds, boxes, samples)
        for anchor, options in zip(anchors, places, strict=True)
    ]
    reaches = [
        [_reach(box.grown(1.5), anchor) for box, _ in options]
        for anchor, options in zip(anchors, places, strict=True)
    ]
    puzzle = _Puzzle(anchors=list(anchors), places=places, reaches=reaches, own_costs=own)
    # Three starts, since moving one label at a time can get stuck in a crowded corner.
    order = list(range(len(anchors)))
    starts = [
        puzzle.settle(sequence) for sequence in (order, order[::-1], order[::2] + order[1::2])
    ]
    chosen = min(starts, key=puzzle.total_cost)
    return [places[i][c][0] for i, c in chosen.items()]


@dataclass(frozen=True, kw_only=True)
class _Puzzle:
    """Candidate places of every label and what each costs on its own."""

    anchors: list[tuple[float, float]]
    places: list[list[tuple[Box, float]]]
    reaches: list[list[Box]]
    own_costs: list[list[float]]

    def settle(self, sequence: Sequence[int]) -> dict[int, int]:
        """Place labels one by one in `sequence`, then let each move until none gains."""
        chosen: dict[int, int] = {}
        for _ in range(_PASSES):
            before = dict(chosen)
            for i in sequence:
                chosen[i] = self._best_place(i, chosen)
            if chosen == before:
                break
        return {i: chosen[i] for i in sorted(chosen)}

    def total_cost(self, chosen: dict[int, int]) -> float:
        return sum(self._cost(i, c, self._rivals(i, chosen)) for i, c in chosen.items())

    def _best_place(self, i: int, chosen: dict[int, int]) -> int:
        rivals = self._rivals(i, chosen)
        best, least = 0, math.inf
        for c in sorted(range(len(self.places[i])), key=self.own_costs[i].__getitem__):
            if self.own_costs[i][c] >= least:
                break  # Rivals only add cost, so no later place can win.
            cost = self._cost(i, c, rivals, most=least)
            if cost < least:
                best, least = c, cost
        return best

    def _cost(self, i: int, c: int, rivals: list, *, most: float = math.inf) -> float:
        """Cost of a place; from `most` on it is not added up to its end."""
        reach = self.reaches[i][c]
        near = [rival[:2] for rival in rivals if reach.overlaps(rival[2])]
        own = self.own_costs[i][c]
        return own + _rival_cost(self.places[i][c][0], self.anchors[i], near, most - own)

    def _rivals(self, i: int, chosen: dict[int, int]) -> list:
        return [
            (self.places[j][c][0], self.anchors[j], self.reaches[j][c])
            for j, c in chosen.items()
            if j != i
        ]


def _candidates(
    anchor: tuple[float, float], size: tuple[float, float], distances: Sequence[float]
) -> list[tuple[Box, float]]:
    x, y = anchor
    width, height = size
    found = []
    for gap in distances:
        for step in range(_N_DIRECTIONS):
            angle = 2 * math.pi * step / _N_DIRECTIONS
            dx, dy = math.cos(angle), math.sin(angle)
            # The label's side that faces the point sits `gap` away, whatever its width.
            left = x + dx * gap + (dx - 1) / 2 * width
            bottom = y + dy * gap + (dy - 1) / 2 * height
            found.append((Box(x0=left, y0=bottom, x1=left + width, y1=bottom + height), gap))
    return found


def _own_costs(
    options: Sequence[tuple[Box, float]],
    anchor: tuple[float, float],
    bounds: Box,
    obstacles: NDArray[np.float64],
    line: NDArray[np.float64],
) -> list[float]:
    """What each place costs with no other label there; obstacles (n, 4) and samples (n, 2)."""
    x0, y0, x1, y1 = np.array([(b.x0, b.y0, b.x1, b.y1) for b, _ in options]).T
    gaps = np.array([gap for _, gap in options])
    outside = np.max([bounds.x0 - x0, x1 - bounds.x1, bounds.y0 - y0, y1 - bounds.y1], axis=0)
    angle = np.arctan2((y0 + y1) / 2 - anchor[1], (x0 + x1) / 2 - anchor[0])
    cost = _COST_DISTANCE * gaps + _COST_DIRECTION * (1 - np.cos(angle - _PREFERRED_ANGLE))
    cost += _COST_OUTSIDE * (outside > 0)
    left, low, right, high = (side[:, None] for side in (x0 - 2, y0 - 2, x1 + 2, y1 + 2))
    ox0, oy0, ox1, oy1 = obstacles.T
    covered = (left < ox1) & (ox0 < right) & (low < oy1) & (oy0 < high)
    cost += _COST_POINT * covered.sum(axis=1)
    x, y = line.T
    cost += _COST_LINE * ((left < x) & (x < right) & (low < y) & (y < high)).sum(axis=1)
    # Points the leader passes, from the anchor to the nearest point of the label.
    dx = (np.clip(anchor[0], x0, x1) - anchor[0])[:, None]
    dy = (np.clip(anchor[1], y0, y1) - anchor[1])[:, None]
    px, py = (ox0 + ox1) / 2 - anchor[0], (oy0 + oy1) / 2 - anchor[1]
    length2 = dx * dx + dy * dy
    along = np.divide(px * dx + py * dy, length2, out=np.zeros(covered.shape), where=length2 > 0)
    along = np.clip(along, 0.0, 1.0)
    is_near = np.hypot(px - along * dx, py - along * dy) < (ox1 - ox0) / 2
    is_near &= np.hypot(px, py) > 1
    return (cost + _COST_PASSED * is_near.sum(axis=1)).tolist()


def _rival_cost(
    box: Box,
    anchor: tuple[float, float],
    rivals: Sequence[tuple[Box, tuple[float, float]]],
    most: float,
) -> float:
    near = box.grown(1.5)
    leader = (anchor, box.nearest(anchor))
    cost = 0.0
    for other, other_anchor in rivals:
        other_leader = (other_anchor, other.nearest(other_anchor))
        cost += _COST_LABEL * near.overlaps(other)
        cost += _COST_CROSSING * _segments_cross(leader, other_leader)
        cost += _COST_CROSSING * (
            _segment_enters(leader, other) + _segment_enters(other_leader, box)
        )
        if cost > most:
            break
    return cost


def _reach(box: Box, anchor: tuple[float, float]) -> Box:
    """What a label and its leader lie in."""
    x, y = anchor
    return Box(x0=min(box.x0, x), y0=min(box.y0, y), x1=max(box.x1, x), y1=max(box.y1, y))


def _segments_cross(a: tuple, b: tuple) -> bool:
    def side(p: tuple, q: tuple, r: tuple) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    (p, q), (r, s) = a, b
    return side(p, q, r) * side(p, q, s) < 0 and side(r, s, p) * side(r, s, q) < 0


def _segment_enters(segment: tuple, box: Box) -> bool:
    (x0, y0), (x1, y1) = segment
    # Most lie beside the box altogether.
    if (x0 < box.x0 and x1 < box.x0) or (x0 > box.x1 and x1 > box.x1):
        return False
    if (y0 < box.y0 and y1 < box.y0) or (y0 > box.y1 and y1 > box.y1):
        return False
    corners = [(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)]
    return any(_segments_cross(segment, (corners[i], corners[i - 1])) for i in range(4))


NO_BRANCH = "none"

_RANK = re.compile(r"(@[a-z0-9]+)?r\d+(f\d+)?$", re.IGNORECASE)
_WEIGHT_BITS = re.compile(r"W(\d+)", re.IGNORECASE)


def main_and_branch(split: str) -> tuple[str, str]:
    """Main precision and branch precision named by a split; the branch is ``none`` without one.

    >>> main_and_branch("W4A4+W8A8@fp16r32"), main_and_branch("W4A8")
    (('W4A4', 'W8A8'), ('W4A8', 'none'))
    >>> main_and_branch("W4A4~W8A8r62f31")
    ('W4A4', '~W8A8')
    """
    main, branch = main_and_branch_of(split)
    return main, _RANK.sub("", branch.removeprefix("+")) or NO_BRANCH


def main_weight_bits(split: str) -> int | None:
    """Bits of the main branch's weights, None if the name does not say.

    >>> main_weight_bits("W4A8+W16A16r32")
    4
    """
    found = _WEIGHT_BITS.match(split)
    return int(found.group(1)) if found else None


_KNOWN_COLORS = {
    "W4A4": "#D55E00",
    "W4A8": "#0072B2",
    "W8A8": "#009E73",
    "W4A16": "#CC79A7",
    "W6A6": "#E69F00",
    "W16A16": "#000000",
}
_SPARE_COLORS = ("#56B4E9", "#CC79A7", "#E69F00", "#000000", "#009E73", "#8C8C8C")
_KNOWN_MARKERS = {
    NO_BRANCH: "o",
    "W8A8": "s",
    "W4A4": "D",
    "W4A8": "^",
    "W6A6": "p",
    "W16A16": "X",
}
_SPARE_MARKERS = ("v", "P", "<", "h", "*", ">")

# The same hues, light enough for a dark page.
_ON_DARK = {
    "#D55E00": "#F28A3C",
    "#0072B2": "#4FA8E0",
    "#009E73": "#35C79C",
    "#CC79A7": "#DE94BD",
    "#E69F00": "#F0B433",
    "#000000": "#F2F2F2",
    "#8C8C8C": "#A6A6A6",
    "#56B4E9": "#B5E1FF",
    "#5A5A5A": "#666E78",
    "#BDBDBD": "#D9D9D9",
}
SERIES_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
"""Colors of series that are not precisions (methods, devices), in order."""
# Useful work in hues, waiting in yellow, overhead in grays.
_PARTS = {
    **{"main": "#0072B2", "mac_main": "#0072B2", "weights": "#0072B2"},
    **{"branch_down": "#E69F00", "branch_up": "#D55E00", "mac_branch": "#D55E00"},
    **{"feedback_down": "#56B4E9", "feedback_back": "#009E73", "mac_feedback": "#56B4E9"},
    **{"feedback": "#56B4E9", "feedback_left": "#009E73"},
    **{"factors": "#D55E00", "left": "#D55E00", "right": "#E69F00"},
    **{"combine": "#CC79A7", "vector": "#CC79A7", "unpack": "#8C8C8C", "tile": "#8C8C8C"},
    **{"stall": "#F0E442", "dram": "#F0E442", "activations": "#F0E442", "fill": "#BDBDBD"},
    **{"dispatch": "#5A5A5A", "static": "#5A5A5A", "l1": "#009E73", "l2": "#7FCFB5"},
    **{"output": "#009E73", "p": "#CC79A7"},
}


def main_colors(splits: Iterable[str]) -> dict[str, str]:
    """Color of each main precision among `splits`, in legend order."""
    return _assign({main_and_branch(s)[0] for s in splits}, _KNOWN_COLORS, _SPARE_COLORS)


def branch_markers(splits: Iterable[str]) -> dict[str, str]:
    """Marker of each branch precision among `splits`, in legend order."""
    return _assign({main_and_branch(s)[1] for s in splits}, _KNOWN_MARKERS, _SPARE_MARKERS)


def part_colors(parts: Iterable[str]) -> dict[str, str]:
    """Color of each part of a cost, in the order given."""
    names = list(dict.fromkeys(parts))
    return {
        name: _PARTS.get(name, SERIES_COLORS[i % len(SERIES_COLORS)])
        for i, name in enumerate(names)
    }


def dark_color(color: str) -> str:
    """The color that takes the place of `color` on a dark page."""
    return _ON_DARK.get(color, color)


def _assign(names: set[str], known: dict[str, str], spare: tuple[str, ...]) -> dict[str, str]:
    assigned = {name: look for name, look in known.items() if name in names}
    free = [look for look in spare if look not in assigned.values()] or list(spare)
    others = sorted(names - known.keys())
    return assigned | {name: free[i % len(free)] for i, name in enumerate(others)}
