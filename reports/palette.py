"""Color and marker of a precision split: the main branch sets the color, the branch the marker.

Colors are Okabe and Ito's palette (Color Universal Design, 2008), told apart with every common
form of color blindness; the shape repeats what matters, so a gray print still reads. Known
precisions keep their color in every figure; others take the next free one in sorted order.
"""

from collections.abc import Iterable

from reports.split_names import NO_BRANCH, main_and_branch

__all__ = ["branch_markers", "main_colors"]

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


def main_colors(splits: Iterable[str]) -> dict[str, str]:
    """Color of each main precision among `splits`, in legend order."""
    return _assign({main_and_branch(s)[0] for s in splits}, _KNOWN_COLORS, _SPARE_COLORS)


def branch_markers(splits: Iterable[str]) -> dict[str, str]:
    """Marker of each branch precision among `splits`, in legend order."""
    return _assign({main_and_branch(s)[1] for s in splits}, _KNOWN_MARKERS, _SPARE_MARKERS)


def _assign(names: set[str], known: dict[str, str], spare: tuple[str, ...]) -> dict[str, str]:
    assigned = {name: look for name, look in known.items() if name in names}
    free = [look for look in spare if look not in assigned.values()] or list(spare)
    others = sorted(names - known.keys())
    return assigned | {name: free[i % len(free)] for i, name in enumerate(others)}
