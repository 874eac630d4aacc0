"""Compare the emulated integer arithmetic with plain Python integers on random cases.

    python benchmarks/fuzz_arithmetic.py --cases 50000 --seed 0      # writes fuzz_arithmetic.md
    python benchmarks/fuzz_arithmetic.py --kind gemm --cases 2000    # one kind; writes nothing

The oracle is in this file and uses nothing of loraq_sim: sums of Python integers, one product after
the other, and fractions. Kinds of cases (`KINDS`; one function makes a case from a random generator
and returns what differs, or nothing):

gemm      int4 to int8, uint4, uint8 and int16 codes with zero points of both operands, initial
          values, arrays of one level and of two, every overflow rule, on every path of kernels here
long      the same with K up to 70,000 and extreme codes
scaled    stored tensors with scales and zero points per group, row or tensor, summed in float32
quantize  codes, scales and zero points of integer formats

A case that differs prints its kind and seed, and the exit code is 1.
"""

import argparse
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

import loraq_sim as lq
from loraq_sim.emulator.gemm import emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import OVERFLOW_RULES, TwoLevelArray
from loraq_sim.emulator.scaled_gemm import BIT_EXACT, scaled_gemm
from loraq_sim.kernels.processor import LOOPS, PATH_VARIABLE, PATHS, choose_path

NOTE = Path(__file__).with_suffix(".md")

Found = tuple[str, str | None]
"""What ran, for the count of the note, and what differs, if anything."""

CODES = {
    **{f"int{b}": (-(2 ** (b - 1)), 2 ** (b - 1) - 1, np.int8) for b in (4, 6, 8)},
    **{f"uint{b}": (0, 2**b - 1, np.uint8) for b in (4, 8)},
    "int16": (-(2**15), 2**15 - 1, np.int16),
}


# The oracle: Python integers.


def fit(value: int, bits: int, rule: str) -> int:
    """`value` in a register of `bits` under an overflow rule."""
    half = 1 << (bits - 1)
    if rule == "wrap":
        return (value + half) % (2 * half) - half
    return max(1 - half if rule == "saturate_symmetric" else -half, min(half - 1, value))


class Register:
    """An accumulator, with what it would hold if it were wide enough."""

    def __init__(self, start: int, bits: int, rule: str) -> None:
        self.bits, self.rule = bits, rule
        self.held, self.exact = fit(start, bits, rule), start
        self.overflows, self.first = int(self.held != start), 0 if self.held != start else None
        self.low, self.high = min(0, start), max(0, start)

    def add(self, value: int, k: int, exact: int | None = None) -> None:
        total = self.held + value
        self.held = fit(total, self.bits, self.rule)
        if self.held != total:
            self.overflows += 1
            self.first = k if self.first is None else min(self.first, k)
        self.exact += value if exact is None else exact
        self.low, self.high = min(self.low, self.exact), max(self.high, self.exact)


def column(products: list[int], start: int, mac: "lq.MacArray") -> tuple[Register, int]:
    """Accumulator 0 of one output after all products, and how often the tree overflowed."""
    bank = [Register(start, mac.acc_bits, mac.overflow)]
    bank += [Register(0, mac.acc_bits, mac.overflow) for _ in range(mac.accumulators - 1)]
    trees = 0
    for turn, k in enumerate(range(0, len(products), mac.products_per_add)):
        chunk = sum(products[k : k + mac.products_per_add])
        if mac.tree_bits is not None:
            kept = fit(chunk, mac.tree_bits, mac.tree_overflow or mac.overflow)
            trees += kept != chunk
            chunk = kept
        bank[turn % mac.accumulators].add(chunk, k)
    first = bank[0]
    for other in bank[1:]:
        first.add(other.held, len(products), other.exact)
        first.overflows += other.overflows
        first.low, first.high = min(first.low, other.low), max(first.high, other.high)
        known = [k for k in (first.first, other.first) if k is not None]
        first.first = min(known) if known else None
    return first, trees


def output(products: list[int], start: int, array: object) -> tuple[int, int, int | None]:
    """Accumulator, overflows of the (wide) accumulator, first K index of one."""
    if not isinstance(array, TwoLevelArray):
        register, _ = column(products, start, array)
        return register.held, register.overflows, register.first
    wide = Register(start, array.acc_bits, array.overflow)
    for k in range(0, len(products), array.column_k):
        wide.add(column(products[k : k + array.column_k], 0, array.column)[0].held, k)
    return wide.held, wide.overflows, wide.first


def width(low: int, high: int) -> int:
    """Bits of a two's complement register that holds both."""
    return 1 + max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0)


def gemm_oracle(a, w, array, init, a_zero, w_zero, place):
    """Accumulators, overflow count and first K index of nested lists of integers."""
    acc, counts, firsts = [], 0, []
    for i, row in enumerate(a):
        acc.append([])
        for j, weights in enumerate(w):
            products = [x * y for x, y in zip(row, weights, strict=True)]
            pairs = zip(row, weights, strict=True)
            wanted = sum((x - a_zero[i]) * (y - w_zero[j]) for x, y in pairs)
            correction = wanted - sum(products)
            start = init[i][j] + (correction if place == "initial" else 0)
            held, overflows, first = output(products, start, array)
            acc[-1].append(held + (correction if place == "after" else 0))
            counts += overflows
            firsts += [] if first is None else [first]
    return acc, counts, min(firsts) if firsts else None


# The cases.


def codes_of(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random codes, extremes, or one code everywhere."""
    low, high, dtype = CODES[kind]
    style = rng.integers(4)
    codes = rng.integers(low, high + 1, shape)
    if style == 0:
        codes = np.full(shape, rng.choice([low, high]))
    elif style < 3:
        codes = np.where(rng.random(shape) < 0.5, codes, rng.choice([low, high, 0], shape))
    return codes.astype(dtype)


def random_array(rng: np.random.Generator, *, levels: bool = True) -> object:
    """An array of one level or of two."""

    def rule() -> str:
        return str(rng.choice(OVERFLOW_RULES))

    def mac() -> "lq.MacArray":
        tree = int(rng.integers(2, 31)) if rng.random() < 0.3 else None
        return lq.MacArray(
            acc_bits=int(rng.choice([8, 11, 14, 16, 18, 20, 24, 30, 31, 32, 33, 40, 48, 64])),
            overflow=rule(),
            products_per_add=int(rng.choice([1, 2, 3, 4, 5, 8, 16, 32])),
            accumulators=int(rng.choice([1, 1, 1, 2, 3, 4])),
            tree_bits=tree,
            tree_overflow=rule() if tree and rng.random() < 0.5 else None,
        )

    if levels and rng.random() < 0.2:
        bits = int(rng.choice([8, 16, 20, 32, 40]))
        tile = int(rng.integers(1, 40))
        return TwoLevelArray(column=mac(), column_k=tile, acc_bits=bits, overflow=rule())
    return mac()


def gemm(rng: np.random.Generator, k: int | None = None) -> Found:
    """One GEMM with zero points, on a random path of kernels."""
    k = int(rng.integers(0, 70)) if k is None else k
    m, n = (1, 1) if k > 1000 else tuple(map(int, rng.integers(1, 5, 2)))
    a_kind = str(rng.choice(list(CODES)))
    w_kind = str(rng.choice([kind for kind in CODES if kind != "int16"]))
    a, w, array = codes_of(rng, a_kind, (m, k)), codes_of(rng, w_kind, (n, k)), random_array(rng)
    reach = min(array.hi, 2**45)
    init = rng.integers(-reach, reach + 1, (m, n)) if rng.random() < 0.5 else None
    zeros = [codes_of(rng, kind, (rows,)) for kind, rows in ((a_kind, m), (w_kind, n))]
    given = [zero if rng.random() < 0.7 else None for zero in zeros]
    place = str(rng.choice(["initial", "initial", "after"]))
    known = [[0] * rows if z is None else z.tolist() for z, rows in zip(given, (m, n), strict=True)]
    starts = np.zeros((m, n), np.int64) if init is None else init
    expected, count, first = gemm_oracle(
        a.tolist(), w.tolist(), array, starts.tolist(), *known, place
    )
    options = {"a_zero": given[0], "w_zero": given[1], "zero_point": place, "init": init}
    path = str(rng.choice(["", "", LOOPS, *PATHS]))
    with on_path(path):
        bits = 16 if a_kind == "int16" else 8
        report = emulate_gemm_report(a, w, array, a_bits=bits, **options)
        fast = lq.emulate_gemm(a, w, array, **options)
        shift = int(rng.integers(0, 12))
        narrow = emulate_gemm_srs(a, w, array, shift, rounding="floor", **options)
    differs = None
    if report.acc.tolist() != expected or fast.tolist() != expected:
        differs = "accumulators"
    elif (report.overflow_count, report.first_overflow_k) != (count, first):
        differs = "counts of overflows"
    elif narrow.tolist() != [[fit(v >> shift, 8, "saturate") for v in row] for row in expected]:
        differs = "outputs of shift-round-saturate"
    elif report.guaranteed_acc_bits < report.safe_acc_bits:
        differs = "guaranteed width below the safe one"
    route = getattr(report, "route", "two levels")
    return f"{route}, {path or 'the fastest path'}", differs


def long(rng: np.random.Generator) -> Found:
    """One output of a long sum."""
    what, differs = gemm(rng, int(rng.choice([2**12, 2**15 + 1, 65_535, 65_536, 70_000])))
    return f"K from 4,096, {what}", differs


@cache
def fastest_path() -> str:
    """The path that this machine takes by itself."""
    return choose_path()


@contextmanager
def on_path(path: str) -> Iterator[None]:
    """Run on the kernels of one path where this machine has it, else of the fastest it has."""
    order = (*PATHS, LOOPS)
    kept = os.environ.pop(PATH_VARIABLE, None)
    if path and order.index(path) >= order.index(fastest_path()):
        os.environ[PATH_VARIABLE] = path
    try:
        yield
    finally:
        os.environ.pop(PATH_VARIABLE, None)
        if kept is not None:
            os.environ[PATH_VARIABLE] = kept


_FORMATS = (
    *("int4/g16", "uint4/g16", "uint4/row", "uint8/tensor", "uint8/g24/fp16/z128", "int8/g16"),
    *("uint4/g16/bf16/z0", "int8/row/fp32/z-3", "uint3/g7", "int16/g16", "uint8/g16/e8m0"),
)


def values_of(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Values on both sides of zero, on one, on a grid with ties, or some zeros."""
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-8, 8)
    style = rng.integers(4)
    x = np.abs(x) if style == 0 else np.rint(x * 4) / 4 if style == 1 else x
    return np.where(rng.random(shape) < 0.1 * (style == 2), 0.0, x).astype(np.float32)


def scaled(rng: np.random.Generator) -> Found:
    """One scaled GEMM of stored tensors."""
    k = int(rng.integers(1, 60))
    x_fmt = str(rng.choice(_FORMATS))
    w_fmt = str(rng.choice([fmt for fmt in _FORMATS if not fmt.startswith("int16")]))
    signed = rng.random() < 0.5 and x_fmt.startswith("int") and "z" not in x_fmt
    rule = "signed_absmax" if signed else None
    x = lq.quantize(values_of(rng, (3, k)), x_fmt, rule=rule)
    w = lq.quantize(values_of(rng, (4, k)), w_fmt)
    array = random_array(rng, levels=False)
    place = str(rng.choice(["initial", "after"]))
    y, seen = scaled_gemm(x, w, array, "fp32", zero_point=place)
    widths = [tensor.format.group_width(k) for tensor in (x, w)]
    edges = sorted({0, k, *(edge for size in widths for edge in range(0, k, size))})
    expected, count = np.zeros((3, 4), np.float32), 0
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        at = [per_row(tensor, start) for tensor in (x, w)]
        codes = [tensor.codes[:, start:stop].tolist() for tensor in (x, w)]
        zeros = [zero for _, zero in at]
        acc, more, _ = gemm_oracle(*codes, array, [[0] * 4] * 3, *zeros, place)
        count += more
        for i in range(3):
            for j in range(4):
                scale = at[0][0][i] * at[1][0][j]
                expected[i, j] = expected[i, j] + np.float32(acc[i][j]) * scale
    differs = None
    if seen.arithmetic != BIT_EXACT:
        differs = f"arithmetic {seen.arithmetic}"
    elif not np.array_equal(y, expected):
        differs = "sums"
    elif array.tree_bits is None and seen.overflow_count != count:
        differs = "counts of overflows"
    return f"{x.format.element.name} x {w.format.element.name}", differs


def per_row(tensor, k: int) -> tuple[list[np.float32], list[int]]:
    """Scale and zero point of every row at position `k`."""
    rows, group = len(tensor.codes), k // tensor.format.group_width(tensor.codes.shape[1])
    index = [(min(i, len(tensor.scales) - 1), group) for i in range(rows)]
    scales = [tensor.scales[at] for at in index]
    zeros = [0 if tensor.zero_points is None else int(tensor.zero_points[at]) for at in index]
    return scales, zeros


def quantize(rng: np.random.Generator) -> Found:
    """Codes of one tensor from its stored scales and zero points, in exact fractions."""
    text = str(rng.choice(_FORMATS))
    x = values_of(rng, (2, int(rng.integers(1, 40))))
    signed = rng.random() < 0.5 and text.startswith("int") and "z" not in text
    stored = lq.quantize(x, text, rule="signed_absmax" if signed else None)
    element = stored.format.element
    for k in range(x.shape[1]):
        scales, zeros = per_row(stored, k)
        for i, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
            code = int(stored.codes[i, k])
            if scale == 0:
                exact = Fraction(0)
            elif stored.format.has_zero_point:
                exact = Fraction(float(x[i, k])) / Fraction(float(scale))
            else:
                # Symmetric codes are rounded from a quotient in float32.
                exact = Fraction(float(x[i, k] / scale))
            if code != max(element.lo, min(element.hi, round(exact) + zero)):
                return text, f"code {code} of {x[i, k]!r} with scale {scale!r} and zero {zero}"
            if stored.format.zero is None and not element.lo <= zero <= element.hi:
                return text, f"zero point {zero}"
    return text, None


KINDS: dict[str, tuple[float, Callable[[np.random.Generator], Found]]] = {
    "gemm": (0.70, gemm),
    "long": (0.005, long),
    "scaled": (0.145, scaled),
    "quantize": (0.15, quantize),
}
"""Share of the cases, and what runs one."""


def run(cases: int, seed: int, only: str | None = None) -> tuple[Counter, list[str]]:
    """Run random cases; how many of each kind ran where, and what differed."""
    counts: Counter = Counter()
    differences = []
    for kind, (share, one) in KINDS.items():
        if only not in (None, kind):
            continue
        for number in range(cases if only else max(1, round(share * cases))):
            what, differs = one(np.random.default_rng([seed, list(KINDS).index(kind), number]))
            counts[kind, what] += 1
            if differs is not None:
                differences.append(f"{kind} {number} of seed {seed} ({what}): {differs}")
    return counts, differences


def note(cases: int, seed: int, counts: Counter, differences: list[str], seconds: float) -> str:
    """The page that `NOTE` keeps."""
    lines = [
        "# Random cases of the integer arithmetic against Python integers",
        "",
        f"`python benchmarks/fuzz_arithmetic.py --cases {cases} --seed {seed}`: "
        f"{sum(counts.values()):,} cases, {len(differences)} that differ, {seconds:.0f} s. "
        f"{platform.machine()}, Python {platform.python_version()}.",
        "",
        "| kind | where it ran | cases |",
        "|---|---|---:|",
    ]
    lines += [f"| {kind} | {what} | {count:,} |" for (kind, what), count in sorted(counts.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parse the options, run, print, and write the note of a whole run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS))
    options = parser.parse_args()
    started = time.perf_counter()
    counts, differences = run(options.cases, options.seed, options.kind)
    seconds = time.perf_counter() - started
    for text in differences[:20]:
        print(text, file=sys.stderr)
    print(f"{sum(counts.values()):,} cases, {len(differences)} that differ, {seconds:.0f} s")
    if options.kind is None and not differences:
        NOTE.write_text(note(options.cases, options.seed, counts, differences, seconds), "utf-8")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
