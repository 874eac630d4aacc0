"""Color and marker of a precision split: the main branch sets the color, the branch the marker.

Colors are Okabe and Ito's palette (Color Universal Design, 2008), told apart with every common
form of color blindness; the shape repeats what matters, so a gray print still reads. Known
precisions keep their color in every figure; others take the next free one in sorted order.
"""

from collections.abc import Iterable

from reports.split_names import NO_BRANCH, main_and_branch

__all__ = ["SERIES_COLORS", "branch_markers", "dark_color", "main_colors", "part_colors"]

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
