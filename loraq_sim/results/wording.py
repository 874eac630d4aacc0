"""How results are put into words: values with units, comparisons, lists, and names of cases.

The name of a case is its split and what is done to its inputs: rotation and smoothing are named
always, for a label says what runs. Other settings are named where cases of one split differ in
them.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import hwmodels
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.layers import SYNTHETIC_MODEL
from loraq_sim.results.columns import choose_unit, column_for, format_numbers, in_unit, is_missing
from loraq_sim.results.rows import AnyRow, Row

__all__ = [
    "cases_of",
    "clock_text",
    "comparison",
    "context_of",
    "drawn_text",
    "glossary",
    "labelled",
    "labels_of",
    "main_and_branch_of",
    "meaning_of",
    "limit_text",
    "listing",
    "name_of",
    "percent_text",
    "pretty_unit",
    "resting_of",
    "rows_in",
    "some_of",
    "the_case",
    "value_text",
]


_MOST_NAMES = 3
_MOST_DIGITS = 17


def glossary() -> dict[str, str]:
    """What the words of tables, verdicts and pages mean, in order of the alphabet."""
    text = Path(__file__).with_name("glossary.toml").read_text(encoding="utf-8")
    return dict(sorted(tomllib.loads(text).items(), key=lambda item: item[0].lower()))


def meaning_of(term: str) -> tuple[str, str]:
    """The word of the glossary that `term` is, and its meaning; spaces, -, _ and case are one.

    Raises
    ------
    InputError
        If it is none; the message names the nearest.
    """
    words = {_folded(word): (word, meaning) for word, meaning in glossary().items()}
    if _folded(term) not in words:
        raise InputError(unknown_name("term", term, [word for word, _ in words.values()]))
    return words[_folded(term)]


def _folded(term: str) -> str:
    return re.sub(r"[\s_-]+", " ", term.strip().lower())


_JOINT = re.compile(r"[+~]")


def main_and_branch_of(split: str) -> tuple[str, str]:
    """The text of a split's main branch, and what follows it: ``+W8A8r8``, ``~W8A8r8f4`` or none.

    >>> main_and_branch_of("W4A4~W8A8r8f4")
    ('W4A4', '~W8A8r8f4')
    """
    joint = _JOINT.search(split)
    return (split, "") if joint is None else (split[: joint.start()], split[joint.start() :])


def name_of(row: AnyRow) -> str:
    """What a row is called: its ``label`` where it has one, else its split."""
    return str(row.get("label") or row["split"])


def listing(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def some_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    if len(names) <= _MOST_NAMES + 1:
        return listing(names)
    return listing([*names[:_MOST_NAMES], f"{len(names) - _MOST_NAMES} more"])


def value_text(key: str, value: Any) -> str:
    """One value with its unit: ``4.17 %``, ``2.97 ms``; ``not known`` if it is missing."""
    if is_missing(value):
        return "not known"
    if math.isinf(value):
        return "infinite"
    column = column_for(key)
    unit = choose_unit([value], column.quantity)
    (text,) = format_numbers([in_unit(value, unit)], column.digits)
    return f"{text} {pretty_unit(unit.symbol)}".strip()


def limit_text(key: str, below: float, down_to: float) -> str:
    """A round value of `key` in (down_to, below]: as few digits as that takes, three at least.

    >>> limit_text("weight_bytes", 2 * 2**20, 2**20), limit_text("latency_s", 2.9996e-3, 2.9991e-3)
    ('2.00 MiB', '2.9995 ms')
    """
    unit = choose_unit([below], column_for(key).quantity)
    scaled = below / unit.size
    whole = math.floor(math.log10(scaled)) + 1 if scaled > 0 else 1
    for digits in range(3, _MOST_DIGITS):
        decimals = max(0, digits - whole)
        step = 10.0 ** (max(0, whole - digits) - decimals)
        rounded = math.floor(scaled / step * (1 + 1e-12)) * step
        if down_to < rounded * unit.size <= below * (1 + 1e-12):
            return f"{rounded:,.{decimals}f} {pretty_unit(unit.symbol)}".strip()
    return f"{scaled!r} {pretty_unit(unit.symbol)}".strip()


def pretty_unit(symbol: str) -> str:
    """A unit as print writes it: tables of the terminal keep to ASCII."""
    return f"\u00b5{symbol[1:]}" if symbol in ("us", "uJ") else symbol


def resting_of(row: AnyRow) -> str:
    """Which assumed numbers of a machine the latency of a row rests on; empty where none is."""
    try:
        effects = json.loads(row.get("rests_on") or "{}")
        return hwmodels.resting_text({str(key): float(value) for key, value in effects.items()})
    except (AttributeError, TypeError, ValueError):
        return ""


_REST_ON = "The errors, and so this choice, rest on"


def drawn_text(rows: Sequence[AnyRow]) -> str:
    """What errors on drawn inputs rest on, in a sentence."""
    if any(SYNTHETIC_MODEL in str(row.get("inputs")) for row in rows):
        return (
            f"{_REST_ON} synthetic weights and inputs: drawn by kind with the statistics of "
            "trained layers, at the shapes of the model, not taken from one."
        )
    return (
        f"{_REST_ON} synthetic inputs: drawn by the kind of each layer on its own weights, not "
        "captured from a run of the model. `dump capture` records real ones."
    )


def percent_text(fraction: float) -> str:
    """A fraction in percent: ``7.3 %``."""
    return f"{100 * fraction:.1f} %"


def comparison(row: AnyRow, base: AnyRow, costs: Sequence[str], y: str) -> str:
    """What `row`, which has less error, gains and costs against `base`: a sentence without subject.

    Costs that one of the two does not hold, or that are zero in `base`, are not spoken of.

    >>> row, base = {"split": "W8A8", "e": 0.1, "t_s": 3.0}, {"split": "W4A4", "e": 0.2, "t_s": 2.0}
    >>> comparison(row, base, ["t_s"], "e")
    'halves the e of W4A4 for +50 % t'
    """
    gain = _gain(_ratio(row[y], base[y]), column_for(y).heading, name_of(base))
    prices = [
        _price(_ratio(row[key], base[key]), column_for(key).heading)
        for key in costs
        if base.get(key) and row.get(key) is not None
    ]
    return f"{gain} {' and '.join(prices)}".replace(" and for ", " and ").rstrip()


def _ratio(value: float, base: float) -> float | Fraction:
    """`value` over `base`, exact where a float would not hold it or the inverse of it."""
    ratio = value / base
    known = math.isfinite(value) and math.isfinite(base)
    return Fraction(value) / Fraction(base) if known and not 1e-300 < ratio < 1e300 else ratio


def _times(ratio: float | Fraction) -> str:
    """``12.3×``; of more than a million the size only."""
    if 0 < ratio < 1_000_000:
        return f"{float(ratio):.1f}×"
    if isinstance(ratio, Fraction):
        return f"{Decimal(ratio.numerator) / Decimal(ratio.denominator):.1e}×"
    return f"{ratio:.1e}×"


def _gain(ratio: float | Fraction, error: str, base: str) -> str:
    short = error.removeprefix("output ")
    if 0.475 <= ratio <= 0.525:
        return f"halves the {short} of {base}"
    if ratio == 0:
        return f"has none of the {short} of {base}"
    if ratio < 0.4:
        return f"has {_times(1 / ratio)} less {short} than {base}"
    return f"cuts the {short} of {base} by {100 * float(1 - ratio):.0f} %"


def _price(ratio: float | Fraction, cost: str) -> str:
    if 0.995 < ratio < 1.005:
        return f"at the same {cost}"
    if ratio < 1:
        return f"with {100 * float(1 - ratio):.0f} % less {cost}"
    if ratio < 2:
        return f"for +{100 * float(ratio - 1):.0f} % {cost}"
    return f"for {_times(ratio)} the {cost}"


# Word before a value that does not say by itself what it is.
_SETTINGS = {
    "method": "",
    "preset": "",
    "family": "",
    "group_size": "group",
    "acc_bits": "acc",
    "overflow": "",
    "products_per_add": "products",
    "accumulators": "accumulators",
    "seed": "seed",
    "token_limit": "tokens",
    "options": "",
}


def labelled(rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
    """Rows with a ``label``: unique among the cases of one layer on one accelerator.

    A setting is named where two rows of the same split, layer, dump and accelerator differ in it.
    """
    return [{**row, "label": label} for row, label in zip(rows, labels_of(rows), strict=True)]


def labels_of(rows: Sequence[AnyRow]) -> list[str]:
    """The labels of `labelled`."""
    first: dict[tuple, tuple] = {}
    named: dict[str, set[str]] = {}
    for row in rows:
        own = tuple(map(row.get, _SETTINGS))
        known = first.setdefault(_case(row), own)
        differing = named.setdefault(str(row.get("split")), set())
        if own != known:
            both = zip(_SETTINGS, own, known, strict=True)
            differing.update(key for key, one, other in both if one != other)
    return [_label(row, named[str(row.get("split"))]) for row in rows]


def _transform_words(row: AnyRow) -> list[str]:
    """What is done to the inputs of a case before they are rounded; empty for nothing."""
    words = []
    rotation, smooth = row.get("rotation"), row.get("smooth")
    if isinstance(rotation, str) and rotation:
        _, _, block = rotation.partition(":")
        words.append(f"rotated {block}".strip())
    if isinstance(smooth, int | float) and not isinstance(smooth, bool) and smooth == smooth:
        words.append(f"smooth {smooth:g}")
    words += [
        word
        for key, word in (("condition", "conditioned"), ("finish", "finish"))
        if isinstance(value := row.get(key), str) and value
        for word in (f"{word} {value}",)
    ]
    return words


def context_of(row: AnyRow, *, several_dumps: bool) -> str:
    """Where a row's numbers compare with others: its accelerator, of its dump if there are more."""
    name = str(row.get("accelerator") or "")
    return f"{row.get('dump')} on {name}" if several_dumps else name


def rows_in(rows: Sequence[Any], context: str) -> list[Any]:
    """The rows of one context, which has this name among all of them."""
    several = len({row.get("dump") for row in rows}) > 1
    return [row for row in rows if context_of(row, several_dumps=several) == context]


def the_case(rows: Sequence[AnyRow], layer: str, split: str, missing: Sequence[AnyRow] = ()) -> Row:
    """The row of one layer, by its name or a pattern that no other matches, in one split, by its
    label or, where one case alone has it, its text.

    Raises
    ------
    InputError
        If there is none, or several; also says if it is `missing` only so far.
    """
    stored, left = (
        any(case["layer"] == layer and case["split"] == split for case in some)
        for some in (rows, missing)
    )
    if left and not stored:
        raise InputError(
            f"{split} in {layer} is planned and has no result yet; the same sweep continues"
        )
    names = dict.fromkeys(str(row["layer"]) for row in rows)
    layers = [layer] if layer in names else [name for name in names if fnmatchcase(name, layer)]
    if len(layers) != 1:
        told = unknown_name("layer", layer, names)
        raise InputError(f"{layer!r} matches {some_of(layers)}; name one" if layers else told)
    own = labelled([row for row in rows if row["layer"] == layers[0]])
    found = [row for row in own if split == row["label"]]
    found = found or [row for row in own if split == row["split"]]
    if len(found) != 1:
        told = unknown_name("split", split, [row["label"] for row in own])
        several = f"{split} has several cases: {listing([row['label'] for row in found])}"
        raise InputError(several if found else told)
    return found[0]


def cases_of(rows: Sequence[AnyRow], split: str, *, is_partial: bool) -> list[Row]:
    """The row of each layer in one split (`the_case`); of a partial sweep those that are there."""
    layers = list(dict.fromkeys(str(row["layer"]) for row in rows))
    found = []
    for layer in layers:
        try:
            found.append(the_case(rows, layer, split))
        except InputError:
            # A split that no layer has is refused.
            if not is_partial or (not found and layer == layers[-1]):
                raise
    return found


def _case(row: AnyRow) -> tuple:
    return (row.get("dump"), row.get("accelerator"), row.get("layer"), str(row.get("split")))


def _label(row: AnyRow, keys: Iterable[str]) -> str:
    words: list[str] = []
    for key, word in _SETTINGS.items():
        if key not in keys:
            continue
        value = row.get(key)
        if key == "options":
            words.append(_options(value))
        elif value is None or value == "":
            words.append(f"all {word}" if key == "token_limit" else "")
        else:
            words.append(f"{word} {value}".strip())
    told = ", ".join(word for word in (*_transform_words(row), *words) if word)
    return f"{row.get('split')} ({told})" if told else str(row.get("split"))


def _options(text: Any) -> str:
    """``{"datapath": {"array": "imma"}, "fused": false}`` as ``array imma, not fused``."""
    try:
        options = json.loads(text or "{}")
    except (TypeError, ValueError):
        return str(text)
    if not isinstance(options, dict):
        return str(text)
    inner = options.pop("datapath", None)
    settings = {**options, **(inner if isinstance(inner, dict) else {})}
    parts = [
        f"not {name}" if value is False else f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
    ]
    return ", ".join(parts)


def clock_text(seconds: float) -> str:
    """``1:05`` of 65 seconds, ``2:00:00`` of two hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
