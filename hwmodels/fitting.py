"""Fitting the values of a kernel family to measured rows, and how far the fit can be trusted.

Fitted are the numbers that a library and not the chip decides: the rate of each MAC mode that rows
ran in, the share of DRAM bandwidth, what a kernel takes once (`kernel.start_s`; of arrays the
launch), how far memory hides behind compute, for kernels with a branch also the start and drain of
tiles; and every other number with a decimal point in the family's `set`. Words and whole numbers
there say how kernels are built and stay. A family that is within `_GOOD` on its rows at the chip's
own values keeps them. The search starts from these and pays for leaving them, so that a value on
which the rows say nothing stays what the chip says:

    minimize  mean |ln(predicted / measured)|  +  sum of pull * |log2(value / chip's value)|

with a pull of 0.15 for DRAM, 0.03 for rates and overlap and 0.01 for times, by moving one value at
a time in steps that shrink when none helps. No value belongs to a row.

Cross-validation leaves out one source after the other. Its rows are predicted with values fitted on
the other sources of the same family and machine; where there are none, with what the same family
fits on other machines, as a ratio to their chips; where there are none either, with values fitted
on the machine's other families; at last with the chip's own.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwmodels.branch import split_into_kernels
from hwmodels.description import Accelerator, KernelFamily
from hwmodels.errors import AcceleratorError
from hwmodels.families import family_named
from hwmodels.loader import list_accelerators, load_accelerator
from hwmodels.measured import Row, family_of, is_of, machine_of, workload_of
from hwmodels.overrides import keys_of
from hwmodels.validation import compare

__all__ = ["FamilyFit", "cross_validate", "family_text", "fit_family", "fitted_family"]

_BUILT = ("memories.l2.panel_fraction",)
"""Numbers that say how kernels are built, as words and whole numbers do: not fitted."""
_GOOD = 0.05
_PULLS = (("memories.dram", 0.15), ("modes.", 0.03), ("kernel.overlap", 0.03), ("", 0.01))
_ROUNDS = 3
_FIRST_STEPS = (1.5, 4.0)
_START_S = 0.5e-6  # Where the search for `kernel.start_s` begins.
_FEW_ROWS = 4  # With fewer, only the rate of each mode is fitted.
_LAST_STEP = 1.04


@dataclass(frozen=True, kw_only=True)
class FamilyFit:
    """Fitted values of one family on one machine, and the rows and errors behind them."""

    accelerator: str
    kernel: str
    values: dict[str, float]
    rows: int
    sources: int
    modes: tuple[str, ...]
    m: tuple[int, int]
    n: tuple[int, int]
    k: tuple[int, int]
    mean_error: float
    worst_error: float
    held_out_error: float | None


def fit_family(hw: Accelerator, name: str, rows: Sequence[Row]) -> FamilyFit:
    """Values of the family `name` of `hw` fitted to those of `rows` that are its own.

    `held_out_error` is the mean error of rows whose source was left out of the fit; None where all
    rows are of one source.

    Raises
    ------
    AcceleratorError
        If the family does not exist, no row is of it, or a row is beyond the peak of the machine.
    """
    family = family_named(hw, name)
    own = [row for row in rows if is_of(hw, row) and _family(hw, row) == name]
    if not own:
        raise AcceleratorError(f"no row of {hw.name} is of the kernel family {name!r}")
    values = _fitted(hw, family, own)
    errors = [abs(error) for error in _errors(_under(hw, family, values), own)]
    works = [workload_of(row) for row in own]
    modes = [split_into_kernels(w, hw)[0].choice.mode.name for w in works]
    sources = {row.get("source") or "" for row in own}
    held_out = None
    if len(sources) > 1:
        left_out = [abs(r["error"]) for r in _leave_out(hw, own, own)]
        held_out = math.fsum(left_out) / len(left_out)
    return FamilyFit(
        accelerator=hw.name,
        kernel=name,
        values=values,
        rows=len(own),
        sources=len(sources),
        modes=tuple(mode.name for mode in hw.modes if mode.name in modes),
        m=(min(w.m for w in works), max(w.m for w in works)),
        n=(min(w.n for w in works), max(w.n for w in works)),
        k=(min(w.k for w in works), max(w.k for w in works)),
        mean_error=math.fsum(errors) / len(errors),
        worst_error=max(errors),
        held_out_error=held_out,
    )


def cross_validate(hw: Accelerator, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as `validate` gives them, each predicted without any row of its own source."""
    own = [row for row in rows if is_of(hw, row)]
    return _leave_out(hw, own, own)


def _leave_out(hw: Accelerator, own: Sequence[Row], known: Sequence[Row]) -> list[dict[str, Any]]:
    results = []
    groups = dict.fromkeys((row.get("source") or "", _family(hw, row)) for row in own)
    for source, name in groups:
        mine = [
            row for row in own
            if (row.get("source") or "") == source and _family(hw, row) == name
        ]  # fmt: skip
        if name is None:
            results += [compare(machine_of(hw, row), row) for row in mine]
            continue
        family = family_named(hw, name)
        others = [row for row in known if (row.get("source") or "") != source]
        train = [row for row in others if _family(hw, row) == name]
        values = _transferred(hw, family, source) if not train else _fitted(hw, family, train)
        if values is None:
            values = _fitted(hw, family, _of_relatives(hw, family, others))
        under = _under(hw, family, values)
        results += [compare(machine_of(under, row), row) for row in mine]
    return results


def _of_relatives(hw: Accelerator, family: KernelFamily, rows: Sequence[Row]) -> list[Row]:
    """Rows of the machine's other families of the same kind, as if `family` had run them."""
    related = []
    for row in rows:
        other = _family(hw, row)
        if other is not None and {*family.serves} & {*family_named(hw, other).serves}:
            related.append({**row, "family": family.name})
    return related


def _transferred(hw: Accelerator, family: KernelFamily, source: str) -> dict[str, float] | None:
    """What the same family fits on other machines, in proportion to the chips; None without any."""
    found: dict[str, list[float]] = {}
    n_machines = 0
    for name in list_accelerators():
        other = load_accelerator(name)
        same = [f for f in other.kernels if f.name == family.name and f.rows]
        if other.name == hw.name.partition("@")[0] or not same or source in same[0].source:
            continue
        n_machines += 1
        chip = _chip_values(other, same[0])
        for key, value in same[0].set.items():
            if key in chip and isinstance(value, float):
                found.setdefault(key, []).append(math.log(value / chip[key]))
    if not n_machines:
        return None
    own, known = _chip_values(hw, family), keys_of(hw)
    ratios = {k: math.exp(math.fsum(v) / n_machines) for k, v in found.items() if k in known}
    values = {key: own.get(key, 0.0) * ratio for key, ratio in ratios.items()}
    most = {key: 1.0 for key in values if key.endswith("fraction")}
    return {key: min(value, most.get(key, value)) for key, value in values.items() if value}


def _family(hw: Accelerator, row: Row) -> str | None:
    if row["kernel"].startswith("single core"):
        return None
    return family_of(hw, row)


def _fitted(hw: Accelerator, family: KernelFamily, rows: Sequence[Row]) -> dict[str, float]:
    """The values that fit `rows` best, from the chip's own, by small steps or by large ones."""
    if not rows:
        return {}
    _errors(hw, rows)  # A row that no values could predict is told, not skipped.
    chip = _chip_values(hw, family, rows)
    free = list(chip)
    if len(rows) < _FEW_ROWS:
        free = [key for key in free if key.startswith("modes.")]
    start = _loss(hw, family, {}, chip, rows)
    if start < _GOOD:
        return {}
    start = _loss(hw, family, chip, chip, rows)
    found = [_descend(hw, family, chip, free, rows, start, step) for step in _FIRST_STEPS]
    return min(found, key=lambda pair: pair[1])[0]


def _descend(
    hw: Accelerator,
    family: KernelFamily,
    chip: dict[str, float],
    free: Sequence[str],
    rows: Sequence[Row],
    start: float,
    first_step: float,
) -> tuple[dict[str, float], float]:
    """Values and loss where no single step of any of the `free` keys helps any more."""
    best, value = dict(chip), start
    for _ in range(_ROUNDS):
        step, before = first_step, value
        while step > _LAST_STEP:
            moved = False
            for key in free:
                for factor in (step, 1 / step):
                    trial = best | {key: best[key] * factor}
                    loss = _loss(hw, family, trial, chip, rows)
                    if loss < value - 1e-5:
                        best, value, moved = trial, loss, True
                        break
            if not moved:
                step = math.sqrt(step)
        if before - value < 1e-3:
            break
    return best, value


def _loss(
    hw: Accelerator,
    family: KernelFamily,
    values: Mapping[str, float],
    chip: Mapping[str, float],
    rows: Sequence[Row],
) -> float:
    """Mean error of `rows` in logarithms and the pull to the chip; infinite where a rule breaks."""
    try:
        errors = _errors(_under(hw, family, values), rows)
    except AcceleratorError:
        return math.inf
    misses = [abs(math.log1p(error)) for error in errors]
    pull = [_pull(key) * abs(math.log2(values[key] / chip[key])) for key in values]
    return math.fsum(misses) / len(misses) + math.fsum(pull)


def _pull(key: str) -> float:
    return next(pull for start, pull in _PULLS if key.startswith(start))


def _errors(hw: Accelerator, rows: Sequence[Row]) -> list[float]:
    return [compare(machine_of(hw, row), row)["error"] for row in rows]


def _under(hw: Accelerator, family: KernelFamily, values: Mapping[str, float]) -> Accelerator:
    """`hw` with other fitted values in one of its families."""
    changed = family.model_copy(update={"set": _built(family) | dict(values)})
    kernels = tuple(changed if f.name == family.name else f for f in hw.kernels)
    return hw.model_copy(update={"kernels": kernels})


def _built(family: KernelFamily) -> dict[str, int | float | str]:
    """What a family sets that says how its kernels are built."""
    return {k: v for k, v in family.set.items() if not isinstance(v, float) or k in _BUILT}


def _chip_values(
    hw: Accelerator, family: KernelFamily, rows: Sequence[Row] = ()
) -> dict[str, float]:
    """The chip's own values of the numbers that are fitted for a family on `rows`."""
    ran = {split_into_kernels(workload_of(row), hw)[0].choice.mode.name for row in rows}
    keys = [f"modes.{mode.name}.sustained_fraction" for mode in hw.modes if mode.name in ran]
    keys += ["memories.dram.sustained_fraction", "kernel.overlap_fraction"]
    keys.append("dispatch.launch_s" if hw.units.organization == "array" else "kernel.start_s")
    if "branch" in family.serves:
        keys += ["kernel.tile_overhead_cycles", "memories.l1.drain_bytes_per_cycle"]
    own = [k for k, v in family.set.items() if isinstance(v, float) and k not in _BUILT]
    content, paths = hw.model_dump(), keys_of(hw)
    values = {}
    for key in dict.fromkeys([*keys, *own]):
        place: Any = content
        for step in paths[key]:
            place = place[step]
        # What is nothing on the chip could not be scaled.
        values[key] = max(float(place), 1e-2 if key.endswith("fraction") else _START_S)
    return values


def fitted_family(hw: Accelerator, fit: FamilyFit, rows: Sequence[Row]) -> KernelFamily:
    """The family of `fit` with its values (three digits), rows, range and errors filled in.

    Values that stayed the chip's own are left out: a family says what it changes.
    """
    family = family_named(hw, fit.kernel)
    own = [row for row in rows if is_of(hw, row) and _family(hw, row) == fit.kernel]
    chip = _chip_values(hw, family, own)
    changed = {
        key: float(f"{value:.3g}")
        for key, value in fit.values.items()
        if abs(value / chip[key] - 1) > 1e-3 or key.endswith("start_s")
    }
    bare = family.model_copy(update={"set": changed | _built(family)})
    under = hw.model_copy(
        update={"kernels": tuple(bare if f.name == bare.name else f for f in hw.kernels)}
    )
    errors = [abs(error) for error in _errors(under, own)]
    sources = dict.fromkeys(row.get("source") or "a user's table" for row in own)
    return bare.model_copy(
        update={
            "rows": len(own),
            "branch_rows": sum(workload_of(row).has_branch for row in own),
            "measured_modes": fit.modes,
            "measured_m": fit.m,
            "measured_n": fit.n,
            "measured_k": fit.k,
            "mean_error": round(math.fsum(errors) / len(errors), 3),
            "worst_error": round(max(errors), 3),
            "source": "Fitted to rows of " + "; ".join(sources),
            "confidence": "measured",
        }
    )


def family_text(family: KernelFamily) -> str:
    """A family as its entry in the `kernels` list of an accelerator file."""
    lines = [f"  - name: {family.name}", f"    title: {_quoted(family.title)}"]
    for name in ("serves", "modes", "matches", "measured_modes"):
        items = getattr(family, name)
        if items:
            lines.append(f"    {name}: [{', '.join(_quoted(item) for item in items)}]")
    if family.m_max is not None:
        lines.append(f"    m_max: {family.m_max}")
    if family.set:
        lines.append("    set:")
        lines += [f"      {key}: {_value(value)}" for key, value in family.set.items()]
    if family.attention is not None:
        lines.append("    attention:")
        lines += [f"      {k}: {_value(v)}" for k, v in family.attention.model_dump().items()]
    if family.rows:
        lines.append(f"    rows: {family.rows}")
        lines += [f"    branch_rows: {family.branch_rows}"] if family.branch_rows else []
        for name in ("measured_m", "measured_n", "measured_k"):
            low, high = getattr(family, name)
            lines.append(f"    {name}: [{low}, {high}]")
        lines.append(f"    mean_error: {family.mean_error}")
        lines.append(f"    worst_error: {family.worst_error}")
    lines.append("    source: >-")
    lines += textwrap.wrap(
        family.source, 100, initial_indent=" " * 6, subsequent_indent=" " * 6,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    lines.append(f"    confidence: {family.confidence}")
    return "\n".join(lines) + "\n"


def _value(value: float | str) -> str:
    # YAML 1.2 reads an exponent only behind a decimal point.
    text = repr(value) if isinstance(value, float) else str(value)
    return text.replace("e-", ".0e-") if "e-" in text and "." not in text else text


def _quoted(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.() /-]*", text) is not None
    return text if plain else '"' + text.replace('"', '\\"') + '"'
