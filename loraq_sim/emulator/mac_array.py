"""The arithmetic that adds K products: trees and accumulators, or the floats of tensor cores.

Semantics: the products of codes are exact. ``products_per_add`` consecutive products (one chunk;
the last may be short) are summed in a tree, exactly or in ``tree_bits`` with ``tree_overflow``.
Chunk t is added to accumulator ``t mod accumulators``, each add applying ``overflow`` at
``acc_bits``. At the end the accumulators are merged in order, 0 + 1, then + 2, ..., under the same
rule. Saturation is not associative: order, chunk size and accumulator count are part of the answer.

A `TwoLevelArray` runs tiles of K through such a column, each from zero, and adds their partial sums
to a wide accumulator, in order. Tensor cores add floats in steps of their own (`FusedDot`).

Zero points: with codes u of the activations and v of the weights, and zero points z and z_w,

    sum (u - z) (v - z_w)  =  sum u v  +  c,    c = K z z_w - z sum v - z_w sum u

The array multiplies codes; c is one integer for each output. ``zero_point="initial"``: c is part of
the value that the (first, or wide) accumulator starts from, and obeys its overflow rule, as the
bias of a kernel does: what the exact c and `init` do not fit is clamped or wrapped before the first
product, and counts as one overflow at K index 0. ``zero_point="after"``: the array adds plain
products, and c is added behind it, exactly, in 64 bits; nothing there can overflow.
"""

import operator
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format

__all__ = [
    "FusedDot",
    "GivenZeros",
    "MacArray",
    "NO_ZEROS",
    "OVERFLOW_RULES",
    "TENSOR_CORES",
    "TwoLevelArray",
    "ZERO_POINT_PLACES",
    "ZeroPoints",
    "checked_int",
    "checked_zero_points",
    "combine_format",
    "describe_array",
    "element_name",
    "fitted",
    "fused_dot_of",
    "overflow_limits",
    "signed_width",
]


OVERFLOW_RULES = ("wrap", "saturate", "saturate_symmetric")


def overflow_limits(bits: int, overflow: str) -> tuple[int, int]:
    """Return the (lowest, highest) value of a signed register under an overflow rule.

    ``saturate_symmetric`` gives up the most negative value: -(2**(bits-1) - 1).
    """
    high = 2 ** (bits - 1) - 1
    return (-high if overflow == "saturate_symmetric" else -high - 1), high


def signed_width(low: int, high: int) -> int:
    """Return the bits of the narrowest two's complement register that holds low and high."""
    return 1 + max(
        (high if high >= 0 else -high - 1).bit_length(),
        (low if low >= 0 else -low - 1).bit_length(),
    )


def checked_int(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """Return `value` as a Python integer, or raise InputError with the value and the rule."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise InputError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return number


class _Register:
    """The (wide) accumulator of an array: `acc_bits` and `overflow`, and its limits."""

    acc_bits: int
    overflow: str

    @property
    def lo(self) -> int:
        """Lowest value of the accumulator."""
        return overflow_limits(self.acc_bits, self.overflow)[0]

    @property
    def hi(self) -> int:
        """Highest value of the accumulator."""
        return overflow_limits(self.acc_bits, self.overflow)[1]


def _check_field(record: "MacArray | TwoLevelArray", field: str, low: int, high: int) -> None:
    # A NumPy integer would overflow in 2**bits and print as np.int64(20): keep Python's.
    object.__setattr__(record, field, checked_int(field, getattr(record, field), low, high))


@dataclass(frozen=True, kw_only=True)
class MacArray(_Register):
    """Accumulator width, overflow rule and adder shape of a MAC array.

    Parameters
    ----------
    acc_bits : int
        Accumulator width in bits, 8 to 64.
    overflow : {"wrap", "saturate", "saturate_symmetric"}
        What an add does when its exact result does not fit: keep the low bits (two's complement),
        clamp to [-2**(b-1), 2**(b-1)-1], or clamp to [-(2**(b-1)-1), 2**(b-1)-1].
    products_per_add : int
        Products c summed before each add into an accumulator, 1 to 64.
    accumulators : int
        Partial accumulators P that take chunks in turn, 1 to 64.
    tree_bits : int or None
        Width of the sum of one chunk, 2 to 64; None keeps it exact.
    tree_overflow : str or None
        Overflow rule of the tree; None means the same as `overflow`. Only with `tree_bits`.

    Raises
    ------
    InputError
        If a field is outside its range, with the value and the rule.
    """

    acc_bits: int = 32
    overflow: str = "wrap"
    products_per_add: int = 1
    accumulators: int = 1
    tree_bits: int | None = None
    tree_overflow: str | None = None

    def __post_init__(self) -> None:
        _check_field(self, "acc_bits", 8, 64)
        _check_field(self, "products_per_add", 1, 64)
        _check_field(self, "accumulators", 1, 64)
        if self.tree_bits is not None:
            _check_field(self, "tree_bits", 2, 64)
        if self.overflow not in OVERFLOW_RULES:
            raise InputError(unknown_name("overflow", self.overflow, OVERFLOW_RULES))
        if self.tree_overflow is None:
            return
        if self.tree_overflow not in OVERFLOW_RULES:
            raise InputError(unknown_name("tree_overflow", self.tree_overflow, OVERFLOW_RULES))
        if self.tree_bits is None:
            raise InputError(
                f"tree_overflow={self.tree_overflow!r} has no effect without tree_bits, "
                "because an unbounded tree is exact; set tree_bits or drop tree_overflow"
            )

    @property
    def tree_rule(self) -> str:
        """Overflow rule of the tree: `tree_overflow`, or `overflow` where that is None."""
        return self.tree_overflow or self.overflow

    def __str__(self) -> str:
        text = f"acc{self.acc_bits} {self.overflow} c{self.products_per_add}"
        if self.accumulators > 1:
            text += f" P{self.accumulators}"
        if self.tree_bits is not None:
            text += f" tree{self.tree_bits} {self.tree_rule}"
        return text


@dataclass(frozen=True, kw_only=True)
class TwoLevelArray(_Register):
    """Narrow column sums added to a wide accumulator, as systolic array generators build it.

    K is cut into tiles of `column_k` products; the last may be short. `column` sums each tile from
    zero: tree, accumulators and overflow rule of its own. The wide accumulator starts at the
    initial value and takes the partial sums tile by tile in order of K, each add applying
    `overflow` at `acc_bits`.

    Parameters
    ----------
    column : MacArray
        What one pass through the array does with its tile.
    column_k : int
        Products of a tile (rows of the systolic array), 1 to 4096.
    acc_bits : int
        Width of the wide accumulator, 8 to 64 bits.
    overflow : {"wrap", "saturate", "saturate_symmetric"}
        Overflow rule of the wide accumulator.

    Raises
    ------
    InputError
        If a field is outside its range, with the value and the rule.
    """

    column: MacArray
    column_k: int = 16
    acc_bits: int = 32
    overflow: str = "wrap"

    def __post_init__(self) -> None:
        if not isinstance(self.column, MacArray):
            raise InputError(f"column must be a MacArray, got {self.column!r}")
        _check_field(self, "column_k", 1, 4096)
        _check_field(self, "acc_bits", 8, 64)
        if self.overflow not in OVERFLOW_RULES:
            raise InputError(unknown_name("overflow", self.overflow, OVERFLOW_RULES))

    @property
    def accumulators(self) -> int:
        """Wide accumulators of one output."""
        return 1

    def __str__(self) -> str:
        return f"acc{self.acc_bits} {self.overflow} over columns of {self.column_k}: {self.column}"


def describe_array(array: MacArray | TwoLevelArray) -> dict[str, int | str]:
    """Columns of a result row: width, overflow rule, products per add, partial accumulators."""
    inner = array.column if isinstance(array, TwoLevelArray) else array
    return {
        "acc_bits": array.acc_bits,
        "overflow": array.overflow,
        "products_per_add": inner.products_per_add,
        "accumulators": inner.accumulators,
    }


@dataclass(frozen=True, kw_only=True)
class FusedDot:
    """How a tensor core adds floats in one step (see `loraq_sim.emulator.tensor_cores`).

    `bits` below the largest exponent; `chunk`, the products of one step; `kept`, fraction bits of
    the sum. `zero` is the exponent of an accumulator of zero, below any of float32.
    """

    bits: int
    chunk: int
    zero: int = -133
    kept: int = 23
    rounds_down: bool = False


_SIXTEEN = ("fp16", "bf16")
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_FP6_FP4 = ("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
_CUDA_8 = dict.fromkeys(_SIXTEEN, FusedDot(bits=24, chunk=8, zero=-132))
_CUDA_16 = dict.fromkeys(_SIXTEEN, FusedDot(bits=25, chunk=16))
_RULES: dict[str, dict[str, FusedDot]] = {
    "turing": {"fp16": FusedDot(bits=24, chunk=8, zero=-132)},
    "ampere": _CUDA_8,
    "ada": _CUDA_8 | dict.fromkeys(_FP8, FusedDot(bits=13, chunk=16, zero=-132, kept=13)),
    "hopper": _CUDA_16 | dict.fromkeys(_FP8, FusedDot(bits=13, chunk=32, kept=13)),
    "blackwell": _CUDA_16 | dict.fromkeys((*_FP8, *_FP6_FP4), FusedDot(bits=25, chunk=32)),
    "cdna3": dict.fromkeys(_SIXTEEN, FusedDot(bits=24, chunk=8, rounds_down=True)),
}
TENSOR_CORES = tuple(_RULES)


def combine_format(combine: str) -> str:
    """The format that partial sums are combined in: fp32 on tensor cores and after a shift."""
    return "fp32" if combine == "shift" or combine in TENSOR_CORES else combine


def fused_dot_of(combine: str, x: Format, w: Format) -> FusedDot | None:
    """How this generation multiplies two such operands, where one instruction is published."""
    rules = _RULES.get(combine, {})
    one, other = element_name(x), element_name(w)
    if one not in rules or other not in rules:
        return None
    # fp16 does not meet bf16, nor either of them a small float, in one instruction.
    if (one in _SIXTEEN or other in _SIXTEEN) and one != other:
        return None
    return rules[one]


def element_name(fmt: Format) -> str:
    """The name of a format's element as the tables of tensor cores have it."""
    return fmt.element.minifloat or fmt.element.name


ZERO_POINT_PLACES = ("initial", "after")


class GivenZeros(NamedTuple):
    """Zero points as a caller gave them, not checked: of `a`, of `w`, and where they enter."""

    a: ArrayLike | None = None
    w: ArrayLike | None = None
    place: str = "initial"


NO_ZEROS = GivenZeros()


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroPoints:
    """Zero points `a` (M,) of the rows of activations and `w` (N,) of the rows of weights, int64.

    ``after`` says that the correction is added behind the accumulators.
    """

    a: NDArray[np.int64]
    w: NDArray[np.int64]
    after: bool = False

    def correction(self, a: NDArray[np.integer], w: NDArray[np.integer]) -> NDArray[np.int64]:
        """c (M, N) of codes (M, K) and (N, K); its terms stay below 2**48 for any K below 2**16.

        A row of zero points that is zero needs no sums of the other operand.
        """
        c = np.zeros((a.shape[0], w.shape[0]), np.int64)
        if self.a.any():
            c -= self.a[:, None] * w.sum(axis=1, dtype=np.int64)
            c += self.a[:, None] * (a.shape[1] * self.w)
        if self.w.any():
            c -= a.sum(axis=1, dtype=np.int64)[:, None] * self.w
        return c

    def starts(
        self, init: NDArray[np.int64], a: NDArray[np.integer], a_range: tuple[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Extreme initial values (N,) for any codes within `a_range` in place of `a` (M, K).

        `init` (M, N) is that of these codes; zero points count as they are.
        """
        if not self.w.any():
            return init.min(axis=0), init.max(axis=0)
        fixed = init + a.sum(axis=1, dtype=np.int64)[:, None] * self.w
        ends = np.multiply.outer([-a.shape[1] * code for code in a_range], self.w)
        return fixed.min(axis=0) + ends.min(axis=0), fixed.max(axis=0) + ends.max(axis=0)


def checked_zero_points(
    given: GivenZeros, a: NDArray[np.integer], w: NDArray[np.integer]
) -> ZeroPoints | None:
    """The zero points of codes `a` (M, K) and `w` (N, K), in the dtypes the caller gave; or None.

    Raises
    ------
    InputError
        If a zero point is no integer of the range of its codes, is neither one nor one a row, or
        the place is unknown.
    """
    if given.place not in ZERO_POINT_PLACES:
        raise InputError(unknown_name("zero_point", str(given.place), ZERO_POINT_PLACES))
    if given.a is None and given.w is None:
        return None
    of_a, of_w = _of_rows("a", given.a, a), _of_rows("w", given.w, w)
    return ZeroPoints(a=of_a, w=of_w, after=given.place == "after")


def _of_rows(name: str, given: ArrayLike | None, codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Zero points (rows,) int64 of a code matrix (rows, K)."""
    rows = codes.shape[0]
    if given is None:
        return np.zeros(rows, np.int64)
    values = np.asarray(given)
    if values.dtype.kind not in "iu":
        raise InputError(
            f"{name}_zero must hold integers, got dtype {values.dtype}; a zero point is a code of "
            f"{name}"
        )
    if values.shape not in ((), (1,), (rows,), (rows, 1)):
        raise InputError(
            f"{name}_zero has shape {values.shape}; give one zero point, or one for each of the "
            f"{rows} rows of {name}: shape ({rows},)"
        )
    low, high = _range(codes)
    if values.size:
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            raise InputError(
                f"{name}_zero holds values from {least} to {most}, outside the codes of {name} "
                f"({low}..{high}); a zero point is the code that stands for 0"
            )
    flat = values.reshape(-1).astype(np.int64)
    return np.ascontiguousarray(np.broadcast_to(flat, (rows,)) if flat.size == 1 else flat)


def _range(codes: NDArray[np.integer]) -> tuple[int, int]:
    """Lowest and highest code: of a narrow dtype its own, else of what the codes could be."""
    if codes.dtype.itemsize == 1 or codes.dtype == np.int16:
        limits = np.iinfo(codes.dtype)
        return int(limits.min), int(limits.max)
    low = int(codes.min()) if codes.size else 0
    high = int(codes.max()) if codes.size else 0
    return (0 if high > 127 else -128, 127 if low < 0 else 255)


def fitted(values: NDArray[np.int64], array: MacArray | TwoLevelArray) -> NDArray[np.int64]:
    """`values` under the overflow rule of an accumulator; a register of 64 bits takes all."""
    if array.overflow != "wrap":
        return np.clip(values, array.lo, array.hi)
    if array.acc_bits == 64:
        return values
    low = values & np.int64(2**array.acc_bits - 1)
    return np.where(low > array.hi, low - np.int64(2**array.acc_bits), low)
