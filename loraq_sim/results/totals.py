"""Totals of a whole model: what all its layers cost per denoising step under one split.

Costs are sums over layers of the cost of one call times the calls per step. Errors are means:
`ERROR_FORMULA` and `WEIGHT_ERROR_FORMULA` say which.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext
from fractions import Fraction
from operator import mul
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from loraq_sim.errors import InputError
from loraq_sim.layers import SYNTHETIC
from loraq_sim.metrics import DEFAULT_AGGREGATE, aggregate_of
from loraq_sim.results.rows import EVALUATED, IDENTITY, AnyRow, ResultRow, Row, StoredRow, cells_of

if TYPE_CHECKING:
    import pandas

__all__ = [
    "ERROR_FORMULA",
    "MODEL_COLUMNS",
    "ModelRow",
    "WEIGHT_ERROR_FORMULA",
    "as_asked",
    "is_synthetic",
    "model_totals",
    "records_of",
    "rows_of_total",
]


ERROR_FORMULA = aggregate_of("output_error").formula
WEIGHT_ERROR_FORMULA = aggregate_of("weight_error").formula

_MOST_NAMED = 3
_KEYS = tuple(name for name in IDENTITY if name != "layer")
_COSTS = ("latency_s", "cycles", "energy_j", "dram_bytes")
_AREAS = ("area_ge", "area_mm2")
_NUMBERS = (
    *("weight_bytes", "bits_per_weight", "weight_error", "output_error", "sqnr_db"),
    *("overflow_count", "safe_acc_bits", "clipped_count", "first_clipped"),
    *("activation_error_share", "p_error_share", "wide_p_error", "p_format"),
    *(*_COSTS, "utilization", "bound", "peak_activation_bytes", "fits_in"),
    *(*_AREAS, "array_energy_j", "rests_on", "m_source", "inputs"),
)
# What sums and maxima are made of.
_USED = (
    *("n", "k", "calls_per_step", "weight_bytes", "overflow_count", "safe_acc_bits"),
    *("clipped_count", "first_clipped", "activation_error_share", "p_error_share"),
    *("wide_p_error", "p_format", *_COSTS, "utilization", "bound", "peak_activation_bytes"),
    *("fits_in", "m_source", "inputs", *_AREAS, "array_energy_j", "rests_on"),
)
# What weights of aggregates are made of.
_WEIGHING = ("calls_per_step", "m", "n", "k", "output_rms")
# A mean of squares below it has lost digits of those below float64's normal numbers.
_LEAST_EXACT = 1e-280
MODEL_COLUMNS = (*_KEYS, "n_layers", "n_missing", "complete", *_NUMBERS, "status", "message")
"""Columns of the totals, in order."""


class ModelRow(TypedDict, total=False):
    """The columns of a model's total with their types; `model_totals` says what they mean.

    ``pareto`` is there once totals were compared. A total may hold further keys.
    """

    dump: str | None
    split: str
    family: str | None
    group_size: int | None
    rotation: str | None
    smooth: float | None
    condition: str | None
    finish: str | None
    method: str | None
    preset: str | None
    accelerator: str
    seed: int | None
    token_limit: int | None
    acc_bits: int | None
    overflow: str | None
    products_per_add: int | None
    accumulators: int | None
    options: str | None
    n_layers: int
    n_missing: int
    complete: bool
    weight_bytes: int | None
    bits_per_weight: float | None
    weight_error: float | None
    output_error: float | None
    sqnr_db: float | None
    overflow_count: int | None
    safe_acc_bits: int | None
    clipped_count: int | None
    first_clipped: str | None
    activation_error_share: float | None
    p_error_share: float | None
    wide_p_error: float | None
    p_format: str | None
    latency_s: float | None
    cycles: float | None
    energy_j: float | None
    dram_bytes: int | None
    utilization: float | None
    bound: str | None
    peak_activation_bytes: int | None
    fits_in: str | None
    area_ge: float | None
    area_mm2: float | None
    array_energy_j: float | None
    rests_on: str | None
    m_source: str | None
    inputs: str | None
    status: Literal["ok", "overflow", "incomplete"]
    message: str
    pareto: bool


@overload
def model_totals(
    frame: list[ResultRow],
    *,
    layers: Collection[str] = (),
    missing: Sequence[AnyRow] = (),
    aggregate: str = DEFAULT_AGGREGATE,
) -> list[ModelRow]: ...
@overload
def model_totals(
    frame: list[Row] | list[StoredRow],
    *,
    layers: Collection[str] = (),
    missing: Sequence[AnyRow] = (),
    aggregate: str = DEFAULT_AGGREGATE,
) -> list[Row]: ...
@overload
def model_totals(
    frame: "pandas.DataFrame",
    *,
    layers: Collection[str] = (),
    missing: Sequence[AnyRow] = (),
    aggregate: str = DEFAULT_AGGREGATE,
) -> "pandas.DataFrame": ...
def model_totals(
    frame: Any,
    *,
    layers: Collection[str] = (),
    missing: Sequence[AnyRow] = (),
    aggregate: str = DEFAULT_AGGREGATE,
) -> Any:
    """Totals per (split, method, preset, accelerator, ...) over all layers of a dump.

    Parameters
    ----------
    frame : DataFrame, or list of dict
        Result rows, at most one per layer and combination of the other settings.
    layers : collection of str
        Names of layers that belong to the model besides those with a row.
    missing : sequence of dict
        Cases without a row (`ResultStore.missing`), whose layers belong to the model of their dump.
    aggregate : str
        How output errors become one, of `loraq_sim.metrics.AGGREGATES`.

    Returns
    -------
    DataFrame or list of dict, as `frame`
        One row per combination, in order of appearance, with the columns `MODEL_COLUMNS`:

        ``n_layers``, ``n_missing``, ``complete``
            layers summed, layers of the model without a result, and whether none is missing;
        ``latency_s``, ``cycles``, ``energy_j``, ``dram_bytes``
            sum over layers of calls per step times the cost of one call;
        ``weight_bytes``, ``overflow_count``, ``safe_acc_bits``
            each layer's weight counted once; sum; maximum;
        ``clipped_count``, ``first_clipped``
            sum; the first layer with one, and what its row says;
        ``peak_activation_bytes``
            maximum: layers run one after the other. What other parts of the model hold meanwhile
            (a residual stream, keys of attention) is not in it;
        ``fits_in``
            the outermost of the memories that the layers' working sets need;
        ``area_ge``, ``area_mm2``, ``array_energy_j``
            largest array that a layer runs in; sum over calls of what its gates take;
        ``rests_on``
            elasticities of the latency by assumed number, of the layers weighted by their time;
        ``m_source``
            where the rows per call come from, batch and guidance included; of several, each once;
        ``inputs``
            what the activation rows are, such as ``synthetic``; of several, each once;
        ``activation_error_share``, ``p_error_share``, ``wide_p_error``, ``p_format``
            shares of the model's squared error; its error with a P of 16 bits; the one format of P;
        ``bits_per_weight``
            8 * sum of weight_bytes / sum of n * k;
        ``output_error``, ``weight_error``, ``sqnr_db``
            `ERROR_FORMULA`; `WEIGHT_ERROR_FORMULA`; -20 log10(output_error), None when exact; the
            output error is infinite where a layer's output is not finite;
        ``utilization``, ``bound``
            mean weighted by time; the bound that holds for most of the time;
        ``status``
            ``ok``; ``overflow`` when the output of a layer is not finite, which `message` names;
            ``incomplete`` when a layer is missing that another combination has. The numbers are
            then None, because a sum over fewer layers cannot be compared.

    Notes
    -----
    Layers that share a branch each carry an even share of it (`loraq_sim.solve_group`), in bytes,
    time and energy, so that sums charge it once.

    A layer that failed in every combination (an unreadable one) is left out of all of them, so
    the totals stay comparable; `n_missing` and `message` say so.

    Raises
    ------
    InputError
        If a layer has two rows in one combination, or the aggregate is unknown.
    """
    rows: Sequence[AnyRow] = frame if isinstance(frame, list) else records_of(frame)
    combinations: dict[tuple, dict[str, AnyRow]] = {}
    members: dict[Any, set[str]] = {}
    usable: dict[Any, set[str]] = {}
    for case in missing:
        if "layer" in case:
            members.setdefault(case.get("dump"), set(layers)).add(case["layer"])
    asked = list(map(as_asked, rows))
    for row, key in zip(asked, cells_of(asked, _KEYS), strict=True):
        _insert(combinations.setdefault(key, {}), row)
        members.setdefault(row.get("dump"), set(layers)).add(row["layer"])
        if row.get("status") in EVALUATED:
            usable.setdefault(row.get("dump"), set()).add(row["layer"])
    totals = [
        dict(zip(_KEYS, key, strict=True))
        | _combination(by_layer, members[key[0]], usable.get(key[0], set()), aggregate)
        for key, by_layer in combinations.items()
    ]
    if isinstance(frame, list):
        return totals
    return type(frame)(totals, columns=list(MODEL_COLUMNS))


def as_asked(row: AnyRow) -> AnyRow:
    """`row` under the split, method and preset the plan asked for, before overrides of its layer.

    A combination is a point of the plan's grid, whatever single layers do in it.
    """
    options = row.get("options")
    if not options or '"asked"' not in options:
        return row
    rest = json.loads(options)
    asked = rest.pop("asked")
    return {**row, **asked, "options": json.dumps(rest, sort_keys=True) if rest else ""}


def rows_of_total(rows: Sequence[AnyRow], total: AnyRow) -> list[Row]:
    """The rows that a total of `model_totals` was made of."""
    wanted = tuple(total.get(name) for name in _KEYS)
    keys = cells_of([as_asked(row) for row in rows], _KEYS)
    return [dict(row) for row, key in zip(rows, keys, strict=True) if tuple(key) == wanted]


def records_of(frame: "pandas.DataFrame") -> list[Row]:
    """The rows of a DataFrame as dicts, missing values None."""
    # NaN would break the grouping (it differs from itself), so missing values are None again.
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _insert(by_layer: dict[str, AnyRow], row: AnyRow) -> None:
    if row["layer"] in by_layer:
        raise InputError(
            f"layer {row['layer']!r} has two rows for split {row.get('split')}; "
            "select one sweep or one set of settings before adding up the model"
        )
    by_layer[row["layer"]] = row


def _combination(
    by_layer: Mapping[str, AnyRow], members: set[str], usable: set[str], aggregate: str
) -> Row:
    done = [row for row in by_layer.values() if row.get("status") in EVALUATED]
    n_missing = len(members) - len(done)
    comparable = bool(done) and len(done) == len(usable)
    facts: Row = {
        "n_layers": len(done),
        "n_missing": n_missing,
        "complete": n_missing == 0,
        "status": "ok" if comparable else "incomplete",
        "message": f"{n_missing} of {len(members)} layers missing" if n_missing else "",
    }
    numbers = _sums(done, aggregate) if comparable else dict.fromkeys(_NUMBERS)
    n_silent = sum(_error_of(row, "output_error") is None for row in done)
    told = [facts["message"]]
    if comparable and n_silent:
        told.append(f"output error not known: {n_silent} of {len(done)} layers have no activations")
    n_drawn = sum(is_synthetic(row) for row in done)
    if comparable and n_drawn:
        told.append(f"output error on synthetic inputs in {n_drawn} of {len(done)} layers")
    wild = [row["layer"] for row in done if row["status"] == "overflow"]
    if comparable and wild:
        facts["status"] = "overflow"
        told.append(f"the output of {len(wild)} of {len(done)} layers is not finite: {_few(wild)}")
    clamped = [row["layer"] for row in done if row.get("clipped_count") and row["status"] == "ok"]
    if comparable and clamped:
        told.append(f"values beyond a float format are clamped in {_few(clamped)}")
    facts["message"] = "; ".join(filter(None, told))
    return {name: (numbers | facts)[name] for name in MODEL_COLUMNS if name not in _KEYS}


def is_synthetic(row: AnyRow) -> bool:
    """Whether the output error of a row, or of a layer of a total, is that of drawn inputs."""
    return SYNTHETIC in str(row.get("inputs") or "")


def _sums(rows: Sequence[AnyRow], aggregate: str) -> Row:
    columns = dict(zip(_USED, map(list, zip(*cells_of(rows, _USED), strict=True)), strict=True))
    calls = [count or 1 for count in columns["calls_per_step"]]
    latency = columns["latency_s"]

    weight_bytes = _over(sum, columns["weight_bytes"])
    error = _root_mean_square(rows, "output_error", aggregate)
    totals: Row = {
        "weight_bytes": weight_bytes,
        "bits_per_weight": _ratio(8, weight_bytes, _over(sum, columns["n"], columns["k"])),
        "weight_error": _root_mean_square(rows, "weight_error", aggregate),
        "output_error": error,
        "sqnr_db": _sqnr_db(error),
        "overflow_count": _over(sum, columns["overflow_count"]),
        "safe_acc_bits": _over(max, columns["safe_acc_bits"]),
        "clipped_count": _over(sum, columns["clipped_count"]),
        "first_clipped": next(
            (
                f"{row['layer']}: {first}"
                for row, first in zip(rows, columns["first_clipped"], strict=True)
                if first
            ),
            None,
        ),
        **_rounding(rows, columns, aggregate),
    }
    for name in (*_COSTS, "array_energy_j"):
        totals[name] = _over(sum, columns[name], calls)
    for name in _AREAS:
        totals[name] = _over(max, columns[name])
    busy = _over(sum, columns["utilization"], latency, calls)
    totals["utilization"] = _ratio(1, busy, totals["latency_s"])
    totals["bound"] = _longest_bound(columns["bound"], latency, calls)
    totals["rests_on"] = _resting(columns["rests_on"], latency, calls)
    totals["peak_activation_bytes"] = _over(max, columns["peak_activation_bytes"])
    totals["fits_in"] = _outermost(columns["fits_in"])
    for name in ("m_source", "inputs"):
        totals[name] = "; ".join(dict.fromkeys(str(x) for x in columns[name] if x)) or None
    return totals


def _resting(
    texts: Sequence[str | None], latency: Sequence[float | None], calls: Sequence[int]
) -> str | None:
    """Elasticities of a sum of latencies: those of its parts, weighted by the parts."""
    known = [
        (json.loads(x), y * n) for x, y, n in zip(texts, latency, calls, strict=True) if x and y
    ]
    if not known:
        return None
    total = sum(y * n for y, n in zip(latency, calls, strict=True) if y)
    effects: dict[str, float] = {}
    for own, seconds in known:
        for key, effect in own.items():
            effects[key] = effects.get(key, 0.0) + effect * seconds / total
    return json.dumps(dict(sorted(effects.items(), key=lambda item: -abs(item[1]))))


def _rounding(rows: Sequence[AnyRow], columns: Mapping[str, list[Any]], aggregate: str) -> Row:
    """What rounding activations and P adds to the error of the model; a layer without P adds 0."""
    found: Row = dict.fromkeys(("activation_error_share", "p_error_share", "wide_p_error"))
    weight = aggregate_of("output_error", aggregate).weight
    shares = [
        name
        for name in ("activation_error_share", "p_error_share")
        if any(value is not None for value in columns[name])
    ]
    if shares:
        # Of errors scaled to at most 1: a square of 1e200 is no float.
        errors = [_error_of(row, "output_error") for row in rows]
        largest = max((error for error in errors if error is not None), default=0.0)
        scaled = [None if e is None else e / (largest or 1.0) for e in errors]
        weights = _values(weight, rows)
        square = _over(sum, weights, scaled, scaled)
        for name in shares if math.isfinite(largest) and math.isfinite(square or 0) else ():
            known = [value or 0.0 for value in columns[name]]
            found[name] = _ratio(1, _over(sum, weights, scaled, scaled, known), square)
    wide = columns["wide_p_error"]
    if any(value is not None for value in wide):
        replaced = [
            row if value is None else {**row, "output_error": value}
            for row, value in zip(rows, wide, strict=True)
        ]
        found["wide_p_error"] = _root_mean_square(replaced, "output_error", aggregate)
    formats = set(columns["p_format"]) - {None}
    found["p_format"] = next(iter(formats)) if len(formats) == 1 else None
    return found


def _over(reduce: Callable[[Iterable[Any]], Any], *factors: list[Any]) -> Any | None:
    """``reduce`` of the products of the factors of each row; None if a row lacks one."""
    try:
        if len(factors) == 1:
            return reduce(factors[0])
        first, *others = factors
        for other in others:
            first = list(map(mul, first, other))
        return reduce(first)
    except TypeError:
        return None


def _values(weight: Callable[[Any], float], rows: Sequence[AnyRow]) -> list[Any]:
    """Weight of each row, None where it lacks what that takes."""
    found: list[Any] = []
    for row in rows:
        try:
            found.append(weight(row))
        except (TypeError, KeyError):
            found.append(None)
    return found


def _root_mean_square(rows: Sequence[AnyRow], column: str, aggregate: str) -> float | None:
    weight = aggregate_of(column, aggregate).weight
    errors = [error for row in rows if (error := _error_of(row, column)) is not None]
    weights = _values(weight, rows)
    if len(errors) < len(rows) or None in weights:
        return None
    mean = _ratio(1, sum(map(mul, weights, map(mul, errors, errors))), sum(weights))
    if mean is None or _LEAST_EXACT < mean < math.inf or math.inf in errors or not any(errors):
        return None if mean is None else math.sqrt(mean)
    return _exact_root_mean_square(rows, errors, weight)


def _exact_root_mean_square(
    rows: Sequence[AnyRow], errors: Sequence[float], weight: Callable[[Any], float]
) -> float | None:
    """The same of numbers whose squares are beyond float64, or lost in it."""
    exact = [
        {name: Fraction(v) for name in _WEIGHING if (v := row.get(name)) is not None}
        for row in rows
    ]
    weights = list(map(weight, exact))
    square = sum(w * Fraction(e) ** 2 for w, e in zip(weights, errors, strict=True))
    if not (whole := sum(weights)):
        return None
    mean = Fraction(square) / Fraction(whole)
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 40, MAX_EMAX, MIN_EMIN
        return float((Decimal(mean.numerator) / Decimal(mean.denominator)).sqrt())


def _error_of(row: AnyRow, column: str) -> float | None:
    """Relative error of a row: of an output that is not finite infinite, which JSON makes null."""
    error = row.get(column)
    is_wild = column == "output_error" and row.get("status") == "overflow"
    return math.inf if error is None and is_wild else error


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _ratio(factor: float, over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else factor * over / under


def _sqnr_db(error: float | None) -> float | None:
    return -20 * math.log10(error) if error else None


def _outermost(memories: Sequence[Any]) -> str | None:
    """The memory farthest from the arithmetic; None if one is not known."""
    order = ("l1", "l2", "dram")
    if not all(memory in order for memory in memories):
        return None
    return max(memories, key=order.index, default=None)


def _longest_bound(
    bounds: Sequence[Any], latency: Sequence[Any], calls: Sequence[int]
) -> str | None:
    seconds: dict[str, float] = {}
    for bound, time, count in zip(bounds, latency, calls, strict=True):
        if bound and time is not None:
            seconds[bound] = seconds.get(bound, 0.0) + time * count
    return max(seconds, key=seconds.__getitem__) if seconds else None
