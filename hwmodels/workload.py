"""One linear layer as the cost model sees it: sizes, bits, groups, and its low-rank branch.

    y (M, N) = X_a (M, K) . W (N, K)^T  +  requantize(X_b (M, K) . R (r, K)^T) . L (N, r)^T

With a residual input (`feedback_rank` = r_f of the rank) P_f = X_b V^T is formed first, and both
branches read D = X - P_f V in place of X; P_f L_f^T is a part of the branch's sum.

Bytes follow the packer: every row of codes is padded to a whole byte, every row has
ceil(columns / group) scales; 16-bit operands have no scales; an NVFP4 tensor has one fp32 more.
"""

import operator
import re
from dataclasses import dataclass, fields

from hwmodels.errors import AcceleratorError
from hwmodels.operands import (
    FAMILIES,
    QUANTIZED_BITS,
    Operand,
    grouping_of,
    parse_operands,
    parse_precision,
    tensor_bytes,
)

__all__ = ["BRANCH_SCHEDULES", "GemmWorkload", "activation_bytes"]

BRANCH_SCHEDULES = ("fused", "unfused", "down_fused", "recompute", "parallel", "given_p")

_TRANSFORM = re.compile(r"smooth|shift|hadamard([0-9]{1,10})")
_FEEDBACK_BLOCK = 64  # Rows and columns of V that share a scale.
_SHORT_ROW = 1 / 8  # Part of a group that a row of L_f must exceed to have scales of its own.


@dataclass(frozen=True, kw_only=True, repr=False)
class GemmWorkload:
    """One layer call: y (M, N) = x (M, K) times weight (N, K) transposed, with a branch or none.

    Parameters
    ----------
    m, n, k : int
        Rows of the activations, output channels, input channels.
    main, branch : str
        Precisions "WxAy", x and y in 2 to 8 (quantized) or 16 (float). `branch` None: none. A
        letter says more (`Operand`): ``W4A4u`` has zero points, ``W8A16i`` 16-bit integers.
    rank : int
        Rank of the branch; 0 means no branch whatever `branch` says.
    fused : bool
        One kernel for main and branch, or three (main, down, up) with P and y through DRAM.
    branch_schedule : str or None
        How the branch runs, in place of `fused`: ``fused``; ``unfused``; ``down_fused`` (X R^T in
        the kernel that quantizes X, P L^T in main's); ``recompute`` (every output tile forms its
        own P); ``parallel`` (X R^T on the accelerator's side unit while the array works);
        ``given_p`` (P exists already; only P L^T is costed).
    family : str
        Element family of widths below 16 bits: int, mxint, mxfp or nvfp. Families other than int
        bring their own groups and scales.
    out_bits : int
        Width of y: 8, 16 or 32.
    group : int or None
        Elements along K (along the rank for P and L) that share one scale; None: one per row.
    scale_bits : int
        Width of one scale; 0 means no scales at all, in any family (integer result, requantized
        by a shift; or one scale per tensor, which costs nothing).
    p_bits : int or None
        Width of the intermediate P (M, rank); None means the branch's activation bits.
    feedback_rank : int
        Components of `rank` that the residual input takes, 0 for none. Their directions V (r_f, k)
        are stored once, with one scale per block of rows and columns.
    feedback_p_bits : int or None
        Width of P_f (M, r_f); None means that of P.
    feedback_shared_by : int
        How many layers read the same D, `shared_by` at least: each is charged its even share of V
        and of forming, transforming and rounding D, whether they share R or have one each.
    partial_bits : int or None
        Width of partial sums between K tiles; None means what the accelerator's datapath says.
    transforms : tuple of str
        What is done to X before it is rounded, in order: ``smooth`` (each channel times a stored
        16-bit factor), ``hadamard64`` (rotated in blocks of 64 channels) and ``shift`` (a constant
        is added to what the main branch rounds).
    shared_by : int
        How many layers read the same X and share one R: each is charged its even share of R, of
        X R^T, of the transforms and of rounding, so that the layers together pay once.
    rounds_x : bool
        Whether rounding X to the activation formats belongs to this call. False for a kernel that
        is timed on codes, as measured GEMMs are.

    Raises
    ------
    AcceleratorError
        If a value breaks its rule; the message has the value, the rule and a fix.
    """

    m: int
    n: int
    k: int
    main: str = "W4A4"
    branch: str | None = None
    rank: int = 0
    fused: bool = True
    out_bits: int = 16
    group: int | None = 64
    scale_bits: int = 16
    p_bits: int | None = None
    partial_bits: int | None = None
    family: str = "int"
    branch_schedule: str | None = None
    transforms: tuple[str, ...] = ()
    shared_by: int = 1
    rounds_x: bool = True
    feedback_rank: int = 0
    feedback_p_bits: int | None = None
    feedback_shared_by: int = 1

    def __repr__(self) -> str:
        told = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        settings = [f"{name}={value!r}" for name, value, usual in told if value != usual]
        return f"GemmWorkload({', '.join(settings)})"

    def __post_init__(self) -> None:
        for name in ("m", "n", "k"):
            self._set_integer(name, minimum=1)
        self._set_integer("rank", minimum=0)
        self._set_integer("feedback_rank", minimum=0)
        if self.group is not None:
            self._set_integer("group", minimum=1)
        self._require_member("out_bits", (8, 16, 32))
        self._require_member("scale_bits", (0, 8, 16, 32))
        for name in ("p_bits", "feedback_p_bits"):
            self._require_member(name, (None, *QUANTIZED_BITS, 16))
        self._require_member("partial_bits", (None, 8, 16, 32, 64))
        self._require_member("family", FAMILIES)
        self._require_member("branch_schedule", (None, *BRANCH_SCHEDULES))
        self._require_member("rounds_x", (True, False), booleans=True)
        self._set_integer("shared_by", minimum=1)
        self._set_integer("feedback_shared_by", minimum=1)
        object.__setattr__(self, "feedback_shared_by", max(self.feedback_shared_by, self.shared_by))
        self._set_transforms()
        parse_precision(self.main)
        self._require_widths_of_the_family()
        if self.branch is not None:
            parse_precision(self.branch)
        elif self.rank > 0:
            raise AcceleratorError(
                f"rank={self.rank} without a branch precision; "
                "give branch such as 'W8A8', or rank=0 for no branch"
            )
        if self.has_branch and self.rank > min(self.n, self.k):
            raise AcceleratorError(
                f"rank={self.rank} must be at most min(n, k) = {min(self.n, self.k)}; "
                "a larger rank costs more than the layer itself"
            )
        if self.feedback_rank > (self.rank if self.has_branch else 0):
            raise AcceleratorError(
                f"feedback_rank={self.feedback_rank} must be at most the rank of the branch, "
                f"{self.rank if self.has_branch else 0}"
            )
        if self.feedback_rank and self.schedule == "given_p":
            raise AcceleratorError(
                "branch_schedule 'given_p' costs P L^T alone, and a residual input forms P first; "
                "use feedback_rank=0 or another schedule"
            )

    def _require_widths_of_the_family(self) -> None:
        if self.family == "int":
            return
        for precision in (self.main, self.branch):
            if precision is None:
                continue
            if any(operand.letter for operand in parse_operands(precision)):
                raise AcceleratorError(
                    f"precision {precision!r}: zero points and 16-bit integers are of the family "
                    f"int, got {self.family!r}"
                )
            if not set(parse_precision(precision)) <= {4, 6, 8, 16}:
                raise AcceleratorError(
                    f"precision {precision!r}: widths of family {self.family!r} are 4, 6, 8 or 16"
                )

    def _set_integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        try:
            whole = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            whole = None
        # Beyond 2**31 byte counts would leave the exact range of float64.
        if whole is None or not minimum <= whole < 2**31:
            raise AcceleratorError(
                f"{name}={value!r} must be a whole number of at least {minimum} and below 2**31"
            )
        object.__setattr__(self, name, whole)

    def _require_member(
        self, name: str, valid: tuple[object, ...], *, booleans: bool = False
    ) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) is not booleans or value not in valid:
            raise AcceleratorError(
                f"{name}={value!r} must be one of {', '.join(str(v) for v in valid)}"
            )

    def _set_transforms(self) -> None:
        given = self.transforms
        names = tuple(given) if isinstance(given, tuple | list) else (given,)
        for name in names:
            known = _TRANSFORM.fullmatch(name) if isinstance(name, str) else None
            if known is None:
                raise AcceleratorError(
                    f"transforms={given!r:.80}: {name!r:.40} must be 'smooth' or 'hadamardB' with "
                    "a block of B channels, such as 'hadamard64', or 'shift'"
                )
            block = int(known[1] or 0)
            if known[1] and (block < 2 or block & (block - 1) or self.k % block):
                raise AcceleratorError(
                    f"transforms={given!r:.80}: a Hadamard block must be a power of two from 2 "
                    f"that divides k={self.k}, got {block}; the largest is {self.k & -self.k}"
                )
        kinds = [name.rstrip("0123456789") for name in names]
        if len(set(kinds)) < len(kinds):
            raise AcceleratorError(f"transforms={given!r:.80}: each kind may appear once")
        object.__setattr__(self, "transforms", names)

    @property
    def vector_ops_per_x(self) -> dict[str, int]:
        """Vector operations per element of X: one to smooth or shift, log2(block) to rotate."""
        ops: dict[str, int] = {}
        for name in self.transforms:
            size = name.removeprefix("hadamard")
            one = {name: 1} if name in ("smooth", "shift") else None
            ops |= one or {"rotate": int(size).bit_length() - 1}
        return ops

    @property
    def reads_wide_x(self) -> bool:
        """Whether X arrives as 16-bit floats.

        A rotation needs all of a block before it rounds; a residual input subtracts from X as it
        was before it was rounded.
        """
        return "rotate" in self.vector_ops_per_x or self.feedback_rank > 0

    @property
    def weight_rank(self) -> int:
        """Components of the branch that read what the main branch reads."""
        return self.rank - self.feedback_rank

    @property
    def has_branch(self) -> bool:
        """Whether a low-rank branch costs anything."""
        return self.branch is not None and self.rank > 0

    @property
    def schedule(self) -> str:
        """How the branch runs: `branch_schedule`, or what `fused` says."""
        return self.branch_schedule or ("fused" if self.fused else "unfused")

    @property
    def main_operands(self) -> tuple[Operand, Operand]:
        """Weights and activations of the main branch."""
        return parse_operands(self.main)

    @property
    def branch_operands(self) -> tuple[Operand, Operand]:
        """Weights and activations of the side branch."""
        return parse_operands(self.branch or "")

    @property
    def p_operand(self) -> Operand:
        """P between the two factors."""
        return self.branch_operands[1] if self.p_bits is None else Operand(self.p_bits)

    @property
    def up_weight_operand(self) -> Operand:
        """What P is multiplied with; beside a residual input, whose L_f has 8 bits, at least those.

        P_f joins P in one sum, which runs in one mode: L_w is widened to L_f.
        """
        w = self.branch_operands[0]
        is_narrow = self.family == "int" and w.bits < 8 and not w.is_unsigned
        return Operand(8) if self.feedback_rank and is_narrow else w

    @property
    def feedback_p_operand(self) -> Operand:
        """P_f of a residual input."""
        bits = self.feedback_p_bits
        return self.p_operand if bits is None else Operand(bits)

    @property
    def main_bits(self) -> tuple[int, int]:
        """Weight and activation bits of the main branch."""
        return parse_precision(self.main)

    @property
    def branch_bits(self) -> tuple[int, int]:
        """Weight and activation bits of the side branch."""
        return parse_precision(self.branch or "")

    @property
    def intermediate_bits(self) -> int:
        """Width of P between the two factors."""
        return self.branch_bits[1] if self.p_bits is None else self.p_bits

    @property
    def macs_main(self) -> int:
        """Multiply-accumulates of X_a W^T."""
        return self.m * self.n * self.k

    @property
    def macs_branch(self) -> int:
        """Multiply-accumulates of both factors, each counted once, and of P_f V."""
        if not self.has_branch:
            return 0
        return self.m * (self.rank * (self.n + self.k) + self.feedback_rank * self.k)

    def grouping(self, bits: int) -> tuple[int | None, int]:
        """Elements per scale (None: one per row) and bits per scale of operands of `bits`."""
        if self.family == "int" or self.scale_bits == 0:
            return self.group, self.scale_bits
        return grouping_of(self.family, bits, self.group)

    def bytes_of(self, rows: int, columns: int, bits: int, letter: str) -> int:
        """Stored bytes of a (rows, columns) operand of `bits` in this workload's family.

        `letter` as in `Operand`: zero points are packed like codes, scales of 16-bit integers take
        32 bits.
        """
        operand = Operand(bits, letter)
        group, scale_bits = self.grouping(bits)
        groups = 1 if group is None else -(-columns // group)
        if letter == "i":
            scale_bits = 32 if scale_bits else 0
            return 2 * rows * columns + rows * groups * scale_bits // 8
        zeros = rows * -(-groups * bits // 8) if operand.stores_zeros and scale_bits else 0
        per_tensor = 4 if self.family == "nvfp" and bits == 4 and scale_bits else 0
        stored = tensor_bytes(rows, columns, bits, group=group, scale_bits=scale_bits)
        return per_tensor + stored + zeros

    def zero_sum_bytes(self, depth: int, w: Operand, a: Operand) -> int:
        """Bytes of the sum of a group's weight codes, which zero points of activations multiply.

        2 where they hold it, else 4; 0 where nothing needs it.
        """
        if not a.needs_correction or w.bits == 16:
            return 0
        group = min(self.grouping(w.bits)[0] or depth, depth)
        largest = group << (w.bits if w.is_unsigned else w.bits - 1)
        return 2 if largest <= 2**15 else 4

    def zero_sums_bytes(self, rows: int, depth: int, w: Operand, a: Operand) -> int:
        """Stored bytes of those sums, of each group of each of `rows` output channels."""
        group = self.grouping(w.bits)[0] or depth
        return rows * -(-depth // group) * self.zero_sum_bytes(depth, w, a)

    def block_bytes_of(self, rows: int, columns: int, bits: int) -> int:
        """Stored bytes of a (rows, columns) operand with one scale per block of rows and columns.

        Blocks are of 64 x 64, or of the groups that the family brings along.
        """
        group, scale_bits = self.grouping(bits)
        if bits == 16 or not scale_bits:
            return self.bytes_of(rows, columns, bits, "")
        size = _FEEDBACK_BLOCK if self.family == "int" or group is None else group
        scales = -(-rows // size) * -(-columns // size)
        per_tensor = 4 if self.family == "nvfp" and bits == 4 else 0
        codes = tensor_bytes(rows, columns, bits, scale_bits=0)
        return per_tensor + codes + -(-scales * scale_bits // 8)

    def _feedback_left_bytes(self, spent: int) -> int:
        """Stored bytes of L_f (N, `spent`): few components of 8-bit integers have blocks like V."""
        w = self.up_weight_operand
        group, _ = self.grouping(w.bits)
        is_plain = self.family == "int" and w.bits == 8 and not w.is_unsigned
        if is_plain and group is not None and spent <= _SHORT_ROW * group:
            return self.block_bytes_of(self.n, spent, w.bits)
        return self.bytes_of(self.n, spent, *w)

    @property
    def deflated_bytes(self) -> int:
        """Bytes of D (M, K) in each of the formats that the branches read it in."""
        formats = {self.main_operands[1]}
        if self.weight_rank:
            formats.add(self.branch_operands[1])
        return sum(self.bytes_of(self.m, self.k, *operand) for operand in formats)

    @property
    def peak_activation_bytes(self) -> int:
        """Bytes of X, P and y together: what must be held somewhere while the layer runs.

        X in the widest of the formats it is read in (the others are made from it), P in its own;
        with a residual input the codes of D beside the 16 bits of X.
        Rows of all images of a batch and of both guidance passes are in `m`.
        """
        formats = [self.main_operands[1]]
        p_bytes = 0
        if self.has_branch:
            formats.append(self.branch_operands[1])
            p_bytes = self.bytes_of(self.m, self.weight_rank, *self.p_operand)
            p_bytes += self.bytes_of(self.m, self.feedback_rank, *self.feedback_p_operand)
            if self.feedback_rank:
                p_bytes += self.deflated_bytes
        if self.reads_wide_x:
            formats.append(Operand(16))
        x_bytes = max(self.bytes_of(self.m, self.k, *operand) for operand in formats)
        return x_bytes + p_bytes + self.m * self.n * self.out_bits // 8

    def weight_bytes(self) -> dict[str, int]:
        """Stored bytes of the main weight, both factors and the smoothing, as packed.

        ``zero_sums`` are the sums of weight codes that zero points of activations need.
        Of what several layers share, this one's part, rounded up.
        """
        w, a = self.main_operands
        parts = {"main": self.bytes_of(self.n, self.k, *w)}
        sums = self.zero_sums_bytes(self.n, self.k, w, a)
        if self.has_branch:
            w, a = self.branch_operands
            own, spent = self.weight_rank, self.feedback_rank
            parts["right"] = self.share_of(self.bytes_of(own, self.k, *w)) if own else 0
            parts["left"] = self.bytes_of(self.n, own, *w) if own else 0
            if spent:
                stored = self.block_bytes_of(spent, self.k, w.bits)
                parts["feedback"] = self.share_of(stored, self.feedback_shared_by)
                parts["feedback_left"] = self._feedback_left_bytes(spent)
            sums += self.share_of(self.zero_sums_bytes(own, self.k, w, a)) if own else 0
            if spent:
                # V^T beside X, and V beside P_f.
                of_v = self.zero_sums_bytes(spent, self.k, w, a)
                of_v += self.zero_sums_bytes(self.k, spent, w, self.feedback_p_operand)
                sums += self.share_of(of_v, self.feedback_shared_by)
            sums += self.zero_sums_bytes(self.n, self.rank, self.up_weight_operand, self.p_operand)
        if sums:
            parts["zero_sums"] = sums
        if "smooth" in self.transforms:
            by = self.feedback_shared_by if self.feedback_rank else self.shared_by
            parts["smooth"] = self.share_of(2 * self.k, by)
        return parts

    def share_of(self, nbytes: int, by: int | None = None) -> int:
        """This layer's part of bytes that `by` layers hold in common, by default `shared_by`."""
        return -(-nbytes // (by or self.shared_by))


def activation_bytes(work: GemmWorkload) -> int:
    """Bytes of the main branch's activations X_a (M, K) as stored."""
    return work.bytes_of(work.m, work.k, *work.main_operands[1])
