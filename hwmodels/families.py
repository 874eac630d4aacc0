"""Kernel families: what a library makes of a machine, and how far its fitted numbers reach.

A machine's file says what the chip has. Its `kernels` list says, for each library and kind of
kernel, what was fitted on measured times (`set`: values of the machine that hold under it) and the
range of the rows behind it. A kernel runs in the first family of the file that serves its kind and
its MAC mode; a family for few rows (`m_max`) competes with the one for all, and the faster counts.
Where no family serves, the chip's own numbers hold.

Confidence of a cost:

    measured       its mode lies among those of the family's rows, and each of its sizes between
                   half the least and twice the largest of theirs
    extrapolated   the family has rows on this machine, but of other modes or sizes
    assumed        no row of this machine stands behind the numbers
"""

from dataclasses import dataclass
from typing import Literal

from hwmodels.branch import GemmKernel
from hwmodels.description import Accelerator, KernelFamily
from hwmodels.errors import AcceleratorError, nearest
from hwmodels.overrides import with_overrides

__all__ = [
    "ASSUMED_ERROR",
    "Confidence",
    "GENERIC",
    "Trust",
    "family_named",
    "machine_under",
    "missing_modes",
    "serving_families",
    "trust_in",
    "usual_families",
    "weakest",
]

Confidence = Literal["measured", "extrapolated", "assumed"]
_ORDER: tuple[Confidence, ...] = ("measured", "extrapolated", "assumed")
GENERIC = "generic"
"""Name that a cost gives where no family of the file serves."""
ASSUMED_ERROR = 0.5
"""Interval of a cost that no measured row stands behind, as a fraction."""
_LARGE = 2**20  # Rows beyond what any family for few rows takes.
_REACH = 2  # Sizes this far beyond the measured ones are predicted as well as those between.
_BEYOND = 2.0  # Outside its range a family is trusted half as far.
_LEAST_BEYOND = 0.3


@dataclass(frozen=True, kw_only=True)
class Trust:
    """How far a latency can be trusted: its kind, and the error to expect as a fraction of it."""

    confidence: Confidence
    mean_error: float | None
    worst_error: float | None
    spread: float


def serving_families(hw: Accelerator, serves: str, mode: str, m: int) -> list[KernelFamily]:
    """Families that run a kernel: the first for all sizes, and those for few rows before it.

    A machine without a family that carries a branch runs it in its plain kernels, extended.
    """
    serving = [f for f in hw.kernels if serves in f.serves and (not f.modes or mode in f.modes)]
    if serves == "branch" and not serving:
        return serving_families(hw, "plain", mode, m)
    chosen: list[KernelFamily] = []
    for family in serving:
        if family.m_max is None:
            return [*chosen, family]
        if m <= family.m_max:
            chosen.append(family)
    return chosen


def usual_families(hw: Accelerator) -> set[str]:
    """Names of the families that large layers of some mode get where none is asked for."""
    usual = {GENERIC}
    for mode in hw.modes:
        for serves in ("plain", "branch"):
            usual |= {f.name for f in serving_families(hw, serves, mode.name, _LARGE)}
    return usual


def family_named(hw: Accelerator, name: str) -> KernelFamily:
    """The family `name` of `hw`.

    Raises
    ------
    AcceleratorError
        If the machine has no such family.
    """
    for family in hw.kernels:
        if family.name == name:
            return family
    known = [family.name for family in hw.kernels]
    hint = nearest(name, known) if known else "its file lists none"
    raise AcceleratorError(f"{hw.name} has no kernel family {name!r:.60}; {hint}")


def machine_under(hw: Accelerator, family: KernelFamily | None) -> Accelerator:
    """`hw` with the values that hold under the kernels of `family`.

    Raises
    ------
    AcceleratorError
        If a key does not exist or a value breaks a rule of the file.
    """
    if family is None or not family.set:
        return hw
    key = ("family", family.name)
    cache = hw._cache
    if key not in cache:
        bare = hw.model_copy(update={"kernels": ()})
        foreign = tuple(f"modes.{name}." for name in missing_modes(hw, family))
        changes = {k: value for k, value in family.set.items() if not k.startswith(foreign)}
        under = with_overrides(bare, changes, name=hw.name) if changes else bare
        # Which mode a precision runs in is the chip's: no library changes what is multiplied.
        under._cache["chip"] = hw
        cache[key] = under
    changed: Accelerator = cache[key]
    return changed


def missing_modes(hw: Accelerator, family: KernelFamily) -> list[str]:
    """Modes the family speaks of that `hw` has not: what it says of them does not hold here."""
    known = {mode.name for mode in hw.modes}
    said = {key.split(".")[1] for key in family.set if key.startswith("modes.")}
    return sorted((said | {*family.modes, *family.measured_modes}) - known)


def trust_in(family: KernelFamily | None, kernel: GemmKernel) -> Trust:
    """How far the latency of `kernel` in `family` can be trusted."""
    if family is None or not family.rows:
        return Trust(confidence="assumed", mean_error=None, worst_error=None, spread=ASSUMED_ERROR)
    mean, worst = family.mean_error or 0.0, family.worst_error or 0.0
    ranges = (
        (kernel.m, family.measured_m),
        (kernel.n, family.measured_n),
        (kernel.k, family.measured_k),
    )
    has_kind = family.branch_rows > 0 or kernel.branch is None
    inside = has_kind and kernel.choice.mode.name in family.measured_modes
    inside = inside and all(
        r is not None and r[0] <= _REACH * size and size <= _REACH * r[1] for size, r in ranges
    )
    if inside:
        return Trust(confidence="measured", mean_error=mean, worst_error=worst, spread=worst)
    return Trust(
        confidence="extrapolated",
        mean_error=mean,
        worst_error=worst,
        spread=max(_BEYOND * worst, _LEAST_BEYOND),
    )


def weakest(confidences: list[Confidence]) -> Confidence:
    """The confidence of several kernels together: that of the least sure."""
    return max(confidences, key=_ORDER.index)
