"""Fitting the values of a kernel family to measured rows, and how far the fit can be trusted.

Fitted are the numbers that a library and not the chip decides: the rate of each MAC mode that rows
ran in, the share of DRAM bandwidth, what a kernel takes once (`kernel.start_s`; of arrays the
launch), how far memory hides behind compute, for kernels with a branch also the start and drain of
tiles; and every other number with a decimal point in the family's `set`. Words and whole numbers
there say how kernels are built and stay. The search starts from defaults and pays for leaving
them, the more the fewer rows there are:

    minimize  mean |ln(predicted / measured)|
              + 8 / n * sum of pull * |log2(value / default)|

with a pull of 0.15 for DRAM, 0.03 for rates and overlap and 0.015 for times, by moving one value at
a time in steps that shrink when none helps; n is the number of rows, of which a source counts for
at most `_ROWS_OF_SOURCE`, since what is wrong with one of its rows is wrong with all. No value
belongs to a row. The default of a value is the weighted geometric mean of the chip's own and of
what the families of all machines of that kind (arrays, grids) make of theirs, in proportion; those
of the same machine count twice, those of the same name, a library's kernels on another chip, 24
times, each by n / (n + 8) of its n rows. What a family's rows do not show (a mode they never ran
in, the start of kernels that all run long, a branch where all were plain) it says nothing of.

Cross-validation leaves out one source after the other. Its rows are predicted with values fitted on
the other sources of the same family and machine; where there are none, with the defaults. Families
that have seen a row of the source left out say nothing of the defaults, and its rows extend no
range: `confidence` is what the others alone would give.
"""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwmodels.branch import split_into_kernels
from hwmodels.description import Accelerator, KernelFamily
from hwmodels.errors import AcceleratorError
from hwmodels.families import family_named, machine_under
from hwmodels.loader import list_accelerators, load_accelerator
from hwmodels.measured import Row, family_of, is_of, machine_of, workload_of
from hwmodels.validation import compare

__all__ = ["FamilyFit", "cross_validate", "family_text", "fit_family", "fitted_family"]

_BUILT = ("memories.l2.panel_fraction",)
"""Numbers that say how kernels are built, as words and whole numbers do: not fitted."""
_PULLS = (("memories.dram", 0.15), ("modes.", 0.03), ("kernel.overlap", 0.03), ("", 0.015))
_PULLED_ROWS = 8  # Rows at which the pulls hold as they stand.
_MOST_PULL = 8.0
_ROWS_OF_SOURCE = 6
_ALIKE, _OWN = 24, 2  # Weights of families of the same name, and of the same machine.
_OF_CHIP = 2.0  # Weight of the chip's own value among those of families.
_PARTS = 3  # Of rows of one source, of which one is left out.
_ROUNDS = 3
_FIRST_STEPS = (1.5, 4.0)
_START_S = 0.5e-6  # Where the search for `kernel.start_s` begins.
_LAST_STEP = 1.04
_AS_WELL = 0.005  # Mean miss that is not worth a value of a family's own.
_SAME = 0.03  # Nearer to the chip's own, a value is not written down.


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
    held_out: str


def fit_family(hw: Accelerator, name: str, rows: Sequence[Row]) -> FamilyFit:
    """Values of the family `name` of `hw` fitted to those of `rows` that are its own.

    Its own are the rows that name it or say one of its words, and those that say none of any
    family, as a user's table does, in a mode that it has. `held_out_error` is the mean error of
    rows that the fit has not seen: those of one source after the other, or every third row where
    all are of one source (`held_out` says which); None with fewer than six rows of one source.

    Raises
    ------
    AcceleratorError
        If the family does not exist, no row is of it, or a row is beyond the peak of the machine.
    """
    family = family_named(hw, name)
    own = _rows_of(hw, family, rows)
    if not own:
        raise AcceleratorError(_why_no_row(hw, family, rows))
    values = _fitted(hw, family, own)
    errors = [abs(error) for error in _errors(_under(hw, family, values), own)]
    works = [workload_of(row) for row in own]
    modes = [split_into_kernels(w, hw)[0].choice.mode.name for w in works]
    sources = {row.get("source") or "" for row in own}
    left_out, how = _errors_left_out(hw, family, own)
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
        held_out_error=math.fsum(left_out) / len(left_out) if left_out else None,
        held_out=how,
    )


def _rows_of(hw: Accelerator, family: KernelFamily, rows: Sequence[Row]) -> list[Row]:
    """The rows of `hw` that a fit of `family` is for, each naming it."""
    own = []
    for row in rows:
        if not is_of(hw, row) or row["kernel"].startswith("single core"):
            continue
        said = family_of(hw, row)
        if said is not None:
            family_named(hw, said)  # A slip in a name is told, not skipped.
        if said == family.name or (said is None and _may_run(hw, family, row)):
            own.append(row | {"family": family.name})
    return own


def _may_run(hw: Accelerator, family: KernelFamily, row: Row) -> bool:
    work = workload_of(row)
    kind = "branch" if work.has_branch else "plain"
    mode = split_into_kernels(work, hw)[0].choice.mode.name
    return kind in family.serves and (not family.modes or mode in family.modes)


def _why_no_row(hw: Accelerator, family: KernelFamily, rows: Sequence[Row]) -> str:
    own = [row for row in rows if is_of(hw, row)]
    if not own:
        devices = ", ".join(sorted({row["device"] for row in rows})[:5])
        return f"no row is of {hw.name}; the devices of the table: {devices}"
    said = sorted({str(family_of(hw, row) or f"{row['a_format']} GEMMs") for row in own})
    serves = f"serves {' and '.join(family.serves)}, modes {', '.join(family.modes) or 'all'}"
    return (
        f"no row of {hw.name} is of the kernel family {family.name!r} ({serves}); its rows are "
        f"{', '.join(said)[:200]}"
    )


def _errors_left_out(
    hw: Accelerator, family: KernelFamily, own: Sequence[Row]
) -> tuple[list[float], str]:
    """Absolute errors of rows that a fit has not seen, and which were left out."""
    if len({row.get("source") or "" for row in own}) > 1:
        return [abs(r["error"]) for r in _leave_out(hw, own, own)], "its source"
    if len(own) < 2 * _PARTS:
        return [], ""
    errors: list[float] = []
    for part in range(_PARTS):
        held = own[part::_PARTS]
        train = [row for index, row in enumerate(own) if index % _PARTS != part]
        under = _under(hw, family, _fitted(hw, family, train, held))
        errors += [abs(error) for error in _errors(under, held)]
    return errors, "every third row"


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
        values = _fitted(hw, family, train, mine, source)
        under = _under(hw, _described(hw, family, train, values), values)
        results += [compare(machine_of(under, row), row) for row in mine]
    return results


def _described(
    hw: Accelerator, family: KernelFamily, rows: Sequence[Row], values: Mapping[str, float]
) -> KernelFamily:
    """`family` with the range and errors of `rows` alone; assumed where there are none."""
    if not rows:
        return family.model_copy(
            update={
                "rows": 0, "branch_rows": 0, "measured_modes": (), "measured_m": None,
                "measured_n": None, "measured_k": None, "mean_error": None, "worst_error": None,
            }
        )  # fmt: skip
    works = [workload_of(row) for row in rows]
    errors = [abs(error) for error in _errors(_under(hw, family, values), rows)]
    modes = {split_into_kernels(work, hw)[0].choice.mode.name for work in works}
    return family.model_copy(
        update={
            "rows": len(rows),
            "branch_rows": sum(work.has_branch for work in works),
            "measured_modes": tuple(mode.name for mode in hw.modes if mode.name in modes),
            "measured_m": (min(w.m for w in works), max(w.m for w in works)),
            "measured_n": (min(w.n for w in works), max(w.n for w in works)),
            "measured_k": (min(w.k for w in works), max(w.k for w in works)),
            "mean_error": math.fsum(errors) / len(errors),
            "worst_error": max(errors),
        }
    )


def _defaults(
    hw: Accelerator, family: KernelFamily, chip: Mapping[str, float], source: str
) -> dict[str, float]:
    """Where a family's values are expected before any of its rows is seen."""
    said: dict[str, list[tuple[float, float]]] = {key: [(chip[key], _OF_CHIP)] for key in chip}
    for name in list_accelerators():
        other = load_accelerator(name)
        if other.units.organization != hw.units.organization:
            continue
        is_own = other.name == hw.name.partition("@")[0]
        for known in other.kernels:
            is_alike = known.name == family.name
            unknown = not known.rows or not _shown(known) & {*family.serves}
            if unknown or (is_own and is_alike) or (source and source in known.source):
                continue
            known_share = known.rows / (known.rows + _PULLED_ROWS)
            weight = known_share * (_ALIKE if is_alike else _OWN if is_own else 1)
            for key in chip:
                ratio = _ratio_under(other, known, key)
                if ratio is not None:
                    said[key].append((chip[key] * ratio, weight))
    most = {key: 1.0 if key.endswith("fraction") else math.inf for key in chip}
    return {key: min(_center(pairs), most[key]) for key, pairs in said.items()}


def _shown(family: KernelFamily) -> set[str]:
    """What the measured rows of a family say something of: plain GEMMs, and those with a branch."""
    kinds = {"plain"} if family.branch_rows < family.rows else set()
    kinds |= {"branch"} if family.branch_rows else set()
    return kinds & {*family.serves}


def _ratio_under(hw: Accelerator, family: KernelFamily, key: str) -> float | None:
    """A value under a family over that of the chip; None where its rows cannot have said it."""
    is_rate = key.startswith("modes.")
    if is_rate and key.split(".")[1] not in family.measured_modes:
        return None
    value = _value(machine_under(hw, family), key)
    is_unseen = key == "kernel.start_s" and value <= _START_S  # Long kernels do not show it.
    return None if is_unseen else value / _value(hw, key)


def _center(pairs: Sequence[tuple[float, float]]) -> float:
    """Weighted geometric mean of (value, weight)."""
    total = math.fsum(weight for _, weight in pairs)
    return math.exp(math.fsum(weight * math.log(value) for value, weight in pairs) / total)


def _family(hw: Accelerator, row: Row) -> str | None:
    if row["kernel"].startswith("single core"):
        return None
    return family_of(hw, row)


def _fitted(
    hw: Accelerator,
    family: KernelFamily,
    rows: Sequence[Row],
    wanted: Sequence[Row] = (),
    source: str = "",
) -> dict[str, float]:
    """The values that fit `rows` best, from the defaults, by small steps or by large ones.

    `wanted` are rows to be predicted, in modes that none of `rows` may have run in; families that
    have seen `source` say nothing of the defaults. Where the chip's own values do as well, they
    stay.
    """
    _errors(hw, [*rows, *wanted])  # A row that no values could predict is told, not skipped.
    chip = _chip_values(hw, family, [*rows, *wanted])
    center = _defaults(hw, family, chip, source)
    if not rows:
        return center
    start = _loss(hw, family, center, center, rows)
    found = [_descend(hw, family, center, rows, start, step) for step in _FIRST_STEPS]
    best = min(found, key=lambda pair: pair[1])[0]
    # Centered on themselves values are not pulled: these are the misses alone.
    plain, fitted = (_loss(hw, family, values, values, rows) for values in (chip, best))
    return dict(chip) if plain <= fitted + _AS_WELL else best


def _descend(
    hw: Accelerator,
    family: KernelFamily,
    center: dict[str, float],
    rows: Sequence[Row],
    start: float,
    first_step: float,
) -> tuple[dict[str, float], float]:
    """Values and loss where no single step of any value helps any more."""
    best, value = dict(center), start
    for _ in range(_ROUNDS):
        step, before = first_step, value
        while step > _LAST_STEP:
            moved = False
            for key in center:
                for factor in (step, 1 / step):
                    trial = best | {key: best[key] * factor}
                    loss = _loss(hw, family, trial, center, rows)
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
    center: Mapping[str, float],
    rows: Sequence[Row],
) -> float:
    """Mean error of `rows` in logarithms and the pull to `center`; infinite where a rule breaks."""
    try:
        errors = _errors(_under(hw, family, values), rows)
    except AcceleratorError:
        return math.inf
    misses = [abs(math.log1p(error)) for error in errors]
    pull = [_pull(key) * abs(math.log2(values[key] / center[key])) for key in values]
    strength = min(_MOST_PULL, _PULLED_ROWS / _independent(rows))
    return math.fsum(misses) / len(misses) + strength * math.fsum(pull)


def _independent(rows: Sequence[Row]) -> int:
    """Rows that say something new: of one source, only the first few."""
    counts = Counter(row.get("source") or "" for row in rows)
    return sum(min(count, _ROWS_OF_SOURCE) for count in counts.values())


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
    return {key: _value(hw, key) for key in dict.fromkeys([*keys, *own])}


def _value(hw: Accelerator, key: str) -> float:
    """The number at a key path of the file, as one that can be scaled."""
    place: Any = hw
    for step in key.split("."):
        if isinstance(place, tuple):
            place = next(mode for mode in place if mode.name == step)
        else:
            place = getattr(place, step)
    return max(float(place or 0.0), 1e-2 if key.endswith("fraction") else _START_S)


def fitted_family(hw: Accelerator, fit: FamilyFit, rows: Sequence[Row]) -> KernelFamily:
    """The family of `fit` with its values (three digits), rows, range and errors filled in.

    Values that stayed the chip's own are left out: a family says what it changes.
    """
    family = family_named(hw, fit.kernel)
    own = _rows_of(hw, family, rows)
    chip = _chip_values(hw, family, own)
    changed = {
        key: float(f"{value:.3g}")
        for key, value in fit.values.items()
        if abs(value / chip[key] - 1) > _SAME or key.endswith("start_s")
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
        lines += [f"      {key}: {_number(value)}" for key, value in family.set.items()]
    if family.attention is not None:
        lines.append("    attention:")
        lines += [f"      {k}: {_number(v)}" for k, v in family.attention.model_dump().items()]
    if family.elementwise is not None:
        lines.append("    elementwise:")
        lines += [
            f"      {work}: {{elements_per_cycle: {rate.elements_per_cycle}, units: {rate.units}}}"
            for work, rate in family.elementwise.items()
        ]
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


def _number(value: float | str) -> str:
    # YAML 1.2 reads an exponent only behind a decimal point.
    text = repr(value) if isinstance(value, float) else str(value)
    return text.replace("e-", ".0e-") if "e-" in text and "." not in text else text


def _quoted(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.() /-]*", text) is not None
    return text if plain else '"' + text.replace('"', '\\"') + '"'
