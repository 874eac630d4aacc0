"""A layer as the kernels that run it: one with the branch fused, or several.

fused       One kernel. X is read once, at the wider of the two activation widths; the narrower
            copy is derived on chip. P = X_b R^T is computed once per row of X, requantized and
            kept on chip; P L^T is extra depth of the main output tile, so y is written once.
recompute   As fused, but every output tile forms its own P: nothing to share between units, and
            X R^T is paid once per column of tiles (the LoRaQ authors' GPU kernel).
parallel    As fused, with X_b R^T on the side unit of the accelerator while the array works.
down_fused  Two kernels: X_b R^T together with the quantization of X writes P and X_a; main reads
            both and adds P L^T (Nunchaku).
given_p     The second of those alone: P exists already.
unfused     main writes y; a second kernel reads X_b and writes P; a third reads P and y, adds
            P L^T and writes y again, from DRAM unless L2 holds it. Three dispatches.

X arrives in its activation formats: where nothing stands between, the kernel that makes X rounds it
as it writes (its vector work is charged here, the bytes are those of the codes). A rotation stops
that, because a block must be whole before it is rounded: X is then read as 16-bit floats, once, and
every kernel that reads X transforms it, on the vector unit and before its first MAC. A smoothing
alone rides along with the rounding. It could be folded into what precedes the layer (the weight of
a normalization, as before q, k, v and ffn_up, or the rows of the projection before); that is never
assumed: it is charged as a multiplication per element and a stored factor per channel.

A residual input (`GemmWorkload.feedback_rank`) is formed before all this, by two skinny GEMMs, the
second after the first: P_f = X_b V^T of X in 16 bits, then D = X - P_f V, rounded to the formats
that the branches read. Where one kernel runs the layer and L2 holds the rows of X that all units
work on, it forms D of them on chip. Else they are kernels of their own, which write P_f and D; the
second reads X again, unless they are one dispatch and the rows stay. P_f joins P in the branch's
sum: the depth of P L^T is r, not r_w.

Layers that share one R (`shared_by`) run it once, beside each other: each is charged an even share
of X R^T, of R, of the residual input, and of transforming and rounding X. Only `recompute` forms P
in every tile again. Layers with an R each may still share a residual input (`feedback_shared_by`).
"""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from hwmodels.description import Accelerator, Mode, SideUnit
from hwmodels.errors import AcceleratorError
from hwmodels.modes import ModeChoice, Part, mode_of
from hwmodels.operands import Operand
from hwmodels.workload import GemmWorkload

__all__ = ["FusedBranch", "GemmKernel", "split_into_kernels"]

DownPlace = Literal["shared", "per_tile", "side", "elsewhere"]
Depth = TypeVar("Depth", int, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True)
class FusedBranch:
    """The low-rank part of a fused kernel; widths in bits per code.

    `rank` is the depth of P L^T, `down_rank` the components that this kernel's input gives.
    `down_place`: where P comes from. `shared`: the units form it together, once; `per_tile`: each
    output tile forms its own; `side`: the `side_unit`; `elsewhere`: read from DRAM (`p_bytes`).
    """

    rank: int
    down_rank: int
    down_place: DownPlace
    down: ModeChoice
    up: ModeChoice
    down_combines: int
    up_combines: int
    x: Operand
    factor_bits: int
    p_bits: int
    right_bytes: int
    left_bytes: int
    p_bytes: int = 0
    side_unit: SideUnit | None = None

    @property
    def forms_p(self) -> bool:
        """Whether the compute units of the kernel compute X_b R^T."""
        return self.down_place in ("shared", "per_tile")


@dataclass(frozen=True, kw_only=True)
class GemmKernel:
    """One dispatched kernel: out (m, n) = a (m, k) . w (n, k)^T, with a fused branch or none.

    `a` and `w` are the operands, `out_bits` those of y; `*_bytes` are exact DRAM sizes of one pass
    over the operand (of weights with the sums of codes that zero points need); `first_x_bytes` is
    the first pass over X, at the wider of two activation formats; `combines` counts scaled partial
    sums per output element and the corrections of zero points, one for each group; `quantized`
    counts elements rounded on the way (P, and X where the branch reads another format than main)
    or summed for the zero points of weights, `rounded_x` those of X rounded once. `share` is the
    part of this kernel that is this layer's; `is_dispatched` says whether it is started by itself.
    """

    role: Part
    work: GemmWorkload
    m: int
    n: int
    k: int
    choice: ModeChoice
    a: Operand
    w: Operand
    out_bits: int
    partial_bits: int
    combines: int
    first_x_bytes: int
    x_bytes: int
    w_bytes: int
    out_bytes: int
    reread_bytes: int = 0
    quantized: float = 0
    rounded_x: float = 0
    share: float = 1.0
    branch: FusedBranch | None = None
    is_dispatched: bool = True

    @property
    def reads_x(self) -> bool:
        """Whether the activations are X or D, which P L^T and P_f V have not."""
        return self.role not in ("branch_up", "feedback_back")

    @property
    def transform_ops(self) -> dict[str, float]:
        """Vector operations that smooth and rotate X, by part."""
        if not self.reads_x or self.is_fed_by_another:
            return {}
        elements = self.m * self.k * self.x_share
        return {part: elements * ops for part, ops in self.work.vector_ops_per_x.items()}

    @property
    def is_fed_by_another(self) -> bool:
        """Whether another kernel has already transformed and rounded what this one reads."""
        return _is_fed(self.work, self.role)

    @property
    def reads_wide_x(self) -> bool:
        """Whether the first pass over X reads 16-bit floats."""
        return self.work.reads_wide_x and self.reads_x and not self.is_fed_by_another

    @property
    def x_share(self) -> float:
        """This layer's part of transforming and rounding X, in a kernel charged whole."""
        return 1.0 if self.share < 1 else 1 / self.work.shared_by

    @property
    def down_share(self) -> float:
        """This layer's part of forming P inside the kernel: every tile forms its own if it must."""
        if self.branch is not None and self.branch.down_place == "per_tile":
            return 1.0
        return 1 / self.work.shared_by

    @property
    def smooth_bytes(self) -> int:
        """DRAM bytes of the smoothing factors."""
        has_them = "smooth" in self.transform_ops
        return (2 * self.k if self.share < 1 else self.work.share_of(2 * self.k)) * has_them

    @property
    def peak_cycles(self) -> float:
        """Cycles of one compute unit at peak rate for the useful MACs."""
        cycles = self.m * self.n * self.k / self.choice.mode.macs_per_cycle
        if self.branch is not None:
            if self.branch.forms_p:
                low = self.m * self.branch.down_rank
                cycles += self.down_share * low * self.k / self.branch.down.mode.macs_per_cycle
            cycles += self.m * self.branch.rank * self.n / self.branch.up.mode.macs_per_cycle
        return cycles * self.share

    @property
    def modes(self) -> tuple[Mode, ...]:
        """MAC modes the compute units run in this kernel."""
        choices = [self.choice]
        if self.branch is not None:
            choices += [self.branch.down] * self.branch.forms_p + [self.branch.up]
        return tuple(choice.mode for choice in choices)

    @property
    def a_bits(self) -> int:
        """Bits of an activation code."""
        return self.a.bits

    @property
    def w_bits(self) -> int:
        """Bits of a weight code."""
        return self.w.bits

    def a_line_bits(self, depth: Depth) -> Depth:
        """Bits of `depth` consecutive activations of one row, scales and zero points included."""
        return self.line_bits(self.a.bits, depth, self.a.letter)

    def w_line_bits(self, depth: Depth) -> Depth:
        """The same of weights, with the sums of their codes where activations have zero points."""
        codes = self.line_bits(self.w.bits, depth, self.w.letter)
        sum_bytes = self.work.zero_sum_bytes(self.k, self.w, self.a)
        if not sum_bytes:
            return codes
        group, _ = self.work.grouping(self.w.bits)
        return codes + 8 * sum_bytes * _groups(depth, group)

    def line_bits(self, bits: int, depth: Depth, letter: str = "") -> Depth:
        """Bits of `depth` consecutive elements of one row, scales included."""
        if bits == 16 and not letter:  # A float.
            return 16 * depth
        group, scale_bits = self.work.grouping(bits)
        if letter == "i" and scale_bits:
            scale_bits = 32
        beside = scale_bits + bits * (letter == "u")
        return bits * depth + beside * _groups(depth, group) if beside else bits * depth

    @property
    def factor_bytes(self) -> int:
        """DRAM bytes of one pass over the fused factors."""
        return 0 if self.branch is None else self.branch.right_bytes + self.branch.left_bytes


def _groups(depth: Depth, group: int | None) -> Depth | int:
    """Groups of a line of `depth` elements."""
    if group is None:
        return 1
    # Floor division of floats is many times slower, and these are whole.
    return np.ceil(depth / group) if isinstance(depth, np.ndarray) else -(-depth // group)


def split_into_kernels(work: GemmWorkload, hw: Accelerator) -> list[GemmKernel]:
    """Kernels that run `work` on `hw`, the main one first.

    Raises
    ------
    AcceleratorError
        If a precision has no mode, or the schedule needs a side unit that `hw` lacks.
    """
    mode_of(hw, work, "main")  # Refused first, as `hw show` lists it first.
    if not work.has_branch:
        return [_main(work, hw, None)]
    kernels = _layer_kernels(work, hw)
    return kernels + _deflation(work, hw) if work.feedback_rank else kernels


def _layer_kernels(work: GemmWorkload, hw: Accelerator) -> list[GemmKernel]:
    """Main and branch, reading X or D."""
    schedule = work.schedule
    down = [_down(work, hw)] if work.weight_rank else []
    if schedule == "unfused":
        return [_main(work, hw, None), *down, _up(work, hw)]
    if schedule == "down_fused":
        return [_main(work, hw, _branch(work, hw, "elsewhere")), *down]
    places: dict[str, DownPlace] = {
        "recompute": "per_tile",
        "parallel": "side",
        "given_p": "elsewhere",
    }
    if hw.units.organization == "systolic":
        places["recompute"] = "shared"  # The array is one unit: nothing would form P again.
    if schedule == "parallel" and hw.side_unit is None:
        raise AcceleratorError(
            f"branch_schedule 'parallel' needs a side_unit block in the file of {hw.name}; "
            "choose another schedule or describe the unit"
        )
    place = places.get(schedule, "shared") if work.weight_rank else "elsewhere"
    return [_main(work, hw, _branch(work, hw, place))]


def _deflation(work: GemmWorkload, hw: Accelerator) -> list[GemmKernel]:
    """P_f = X V^T, then D = X - P_f V, rounded: once for all layers that share the input."""
    (w, a), p = work.branch_operands, work.feedback_p_operand
    m, k, spent = work.m, work.k, work.feedback_rank
    is_fused, share = work.schedule != "unfused", 1 / work.feedback_shared_by
    inside, stays = _deflates_inside(work, hw), is_fused and _rows_stay(work, hw)
    wide_x = work.bytes_of(m, k, 16, "")
    # A transformed X that does not stay is written once, to be read again as it was transformed.
    copy = wide_x if work.vector_ops_per_x and not stays else 0
    p_bytes = work.bytes_of(m, spent, *p)
    rounded = [each for each in (work.main_operands[1], a) if not each.is_float]
    down = _kernel(
        work, hw, "feedback_down", (m, spent, k), (w, a), p.bits,
        out_bytes=0 if inside else p_bytes + copy, first_x_bytes=0 if inside else wide_x,
        quantized=m * spent, rounded_x=m * k * (not a.is_float), share=share,
    )  # fmt: skip
    back = _kernel(
        work, hw, "feedback_back", (m, k, spent), (w, p), 16,
        out_bytes=0 if inside else work.deflated_bytes, first_x_bytes=0 if is_fused else p_bytes,
        reread_bytes=0 if stays else wide_x,
        rounded_x=m * k * len(set(rounded if work.weight_rank else rounded[:1])), share=share,
    )  # fmt: skip
    # A subtraction per element of X, in the pipeline that combines partial sums.
    back = replace(back, combines=back.combines + 1, is_dispatched=not is_fused)
    return [replace(down, is_dispatched=not inside), back]


def _rows_stay(work: GemmWorkload, hw: Accelerator) -> bool:
    """Whether L2 holds the rows of X, in 16 bits, that all units work on at once."""
    rows = min(work.m, hw.kernel.register_block_m * hw.units.count)
    return 2 * rows * work.k <= hw.memories.l2.capacity_bytes


def _deflates_inside(work: GemmWorkload, hw: Accelerator) -> bool:
    """Whether the kernel that runs the layer forms D of its rows of X itself."""
    is_one = work.schedule not in ("unfused", "down_fused")
    return work.feedback_rank > 0 and is_one and _rows_stay(work, hw)


def _is_fed(work: GemmWorkload, role: Part) -> bool:
    if work.feedback_rank:
        return role in ("main", "branch_down")
    return role == "main" and work.has_branch and work.schedule == "down_fused"


def _main(work: GemmWorkload, hw: Accelerator, branch: FusedBranch | None) -> GemmKernel:
    formats = {work.main_operands[1]}
    quantized = float(_row_sums(work, *work.main_operands))
    is_fed = _is_fed(work, "main")
    if branch is not None and branch.down_place != "elsewhere":
        formats.add(work.branch_operands[1])
        share = 1 if branch.down_place == "per_tile" else work.shared_by
        narrower = 0 if work.feedback_rank else _narrower_x(work)
        quantized += (work.m * work.weight_rank + narrower) / share
    first_x_bytes = _widest_bytes(work, formats)
    if work.feedback_rank:
        # D is there in each format: rounded twice it would be another D.
        first_x_bytes = sum(work.bytes_of(work.m, work.k, *operand) for operand in formats)
        if _deflates_inside(work, hw):
            first_x_bytes = work.bytes_of(work.m, work.k, 16, "")
    return _kernel(
        work, hw, "main", (work.m, work.n, work.k), work.main_operands, work.out_bits,
        out_bytes=_output_bytes(work),
        first_x_bytes=first_x_bytes if work.feedback_rank or not is_fed else None,
        quantized=quantized,
        rounded_x=0 if is_fed else _rounded_x(work, formats) / work.shared_by, branch=branch,
    )  # fmt: skip


def _down(work: GemmWorkload, hw: Accelerator) -> GemmKernel:
    """X R^T as a kernel of its own, which with down_fused also makes X_a for main."""
    p, main, x = work.p_operand, work.main_operands[1], work.branch_operands[1]
    copy, formats, rank = 0, {x}, work.weight_rank
    if work.feedback_rank:
        return _kernel(
            work, hw, "branch_down", (work.m, rank, work.k), work.branch_operands, p.bits,
            out_bytes=work.bytes_of(work.m, rank, *p), quantized=work.m * rank,
            share=1 / work.shared_by,
        )  # fmt: skip
    if work.schedule == "down_fused":
        formats.add(main)
        if main != x or work.reads_wide_x:
            copy = work.bytes_of(work.m, work.k, *main)
    quantized, rounded_x = work.m * work.rank, 0
    if work.schedule == "down_fused" or not work.rounds_x:
        quantized += _narrower_x(work)
    if work.schedule == "down_fused" or work.reads_wide_x or main != x:
        rounded_x = _rounded_x(work, formats)
    return _kernel(
        work, hw, "branch_down", (work.m, work.rank, work.k), work.branch_operands, p.bits,
        out_bytes=work.bytes_of(work.m, work.rank, *p) + copy, quantized=quantized,
        rounded_x=rounded_x, share=1 / work.shared_by,
    )  # fmt: skip


def _up(work: GemmWorkload, hw: Accelerator) -> GemmKernel:
    operands = work.up_weight_operand, work.p_operand
    return _kernel(
        work, hw, "branch_up", (work.m, work.n, work.rank), operands, work.out_bits,
        out_bytes=_output_bytes(work), reread_bytes=_output_bytes(work),
    )  # fmt: skip


def _narrower_x(work: GemmWorkload) -> int:
    """Elements of X that are made on the way from its wider format, where there are two."""
    return work.m * work.k if work.branch_operands[1] != work.main_operands[1] else 0


def _widest_bytes(work: GemmWorkload, formats: set[Operand]) -> int:
    """Bytes of X in the widest of its formats, from which the others are made."""
    return max(work.bytes_of(work.m, work.k, *operand) for operand in formats)


def _row_sums(work: GemmWorkload, w: Operand, a: Operand) -> int:
    """Elements of X that are summed for the zero points of weights, one operation each."""
    return work.m * work.k if w.needs_correction and not a.is_float else 0


def _rounded_x(work: GemmWorkload, formats: set[Operand]) -> int:
    """Elements of X rounded to `formats` from 16 bits, less those that `_narrower_x` counts."""
    if not work.rounds_x:
        return 0
    n_rounded = sum(not operand.is_float for operand in formats) - (len(formats) - 1)
    return work.m * work.k * max(0, n_rounded)


def _kernel(
    work: GemmWorkload,
    hw: Accelerator,
    role: Part,
    shape: tuple[int, int, int],
    operands: tuple[Operand, Operand],
    out_bits: int,
    *,
    out_bytes: int,
    first_x_bytes: int | None = None,
    reread_bytes: int = 0,
    quantized: float = 0,
    rounded_x: float = 0,
    share: float = 1.0,
    branch: FusedBranch | None = None,
) -> GemmKernel:
    m, n, k = shape
    w, a = operands
    choice = mode_of(hw, work, role)
    x_bytes = work.bytes_of(m, k, *a)
    reads_x = role not in ("branch_up", "feedback_down", "feedback_back")
    if work.reads_wide_x and reads_x and not _is_fed(work, role):
        first_x_bytes = work.bytes_of(m, k, 16, "")
    return GemmKernel(
        role=role,
        work=work,
        m=m,
        n=n,
        k=k,
        choice=choice,
        a=a,
        w=w,
        out_bits=out_bits,
        partial_bits=work.partial_bits or max(out_bits, hw.datapath.combine_bits),
        combines=choice.combines(work, k, operands),
        first_x_bytes=x_bytes if first_x_bytes is None else first_x_bytes,
        x_bytes=x_bytes,
        w_bytes=_stored_bytes(work, role, n, k, operands),
        out_bytes=out_bytes,
        reread_bytes=reread_bytes,
        quantized=quantized,
        rounded_x=rounded_x,
        share=share,
        branch=branch,
    )


def _stored_bytes(
    work: GemmWorkload, role: Part, n: int, k: int, operands: tuple[Operand, Operand]
) -> int:
    """DRAM bytes of the weights of a kernel, with the sums of codes that zero points need."""
    w, a = operands
    sums = work.zero_sums_bytes(n, k, w, a)
    if role in ("feedback_down", "feedback_back"):
        return work.block_bytes_of(n, k, w.bits) + sums
    if role == "branch_up" and work.feedback_rank:
        sizes = work.weight_bytes()
        return sizes["left"] + sizes["feedback_left"] + sums
    return work.bytes_of(n, k, *w) + sums


def _branch(work: GemmWorkload, hw: Accelerator, place: DownPlace) -> FusedBranch:
    (w, a), p, up_w = work.branch_operands, work.p_operand, work.up_weight_operand
    down, up = mode_of(hw, work, "branch_down"), mode_of(hw, work, "branch_up")
    sizes = work.weight_bytes()
    is_elsewhere = place == "elsewhere"
    sums = work.zero_sums_bytes(work.weight_rank, work.k, w, a) if work.weight_rank else 0
    up_sums = work.zero_sums_bytes(work.n, work.rank, up_w, p)
    right_bytes = sizes["right"] + work.share_of(sums)
    if place == "per_tile":
        right_bytes = work.bytes_of(work.weight_rank, work.k, *w) + sums
    p_bytes = 0
    if is_elsewhere and work.weight_rank:
        p_bytes = work.bytes_of(work.m, work.weight_rank, *p)
    if work.feedback_rank and not _deflates_inside(work, hw):
        p_bytes += work.bytes_of(work.m, work.feedback_rank, *work.feedback_p_operand)
    return FusedBranch(
        rank=work.rank,
        down_rank=work.weight_rank,
        down_place=place,
        down=down,
        up=up,
        down_combines=down.combines(work, work.k, (w, a)),
        up_combines=up.combines(work, work.rank, (up_w, p)),
        x=work.main_operands[1] if is_elsewhere else a,
        factor_bits=w.bits,
        p_bits=p.bits,
        right_bytes=0 if is_elsewhere else right_bytes,
        left_bytes=sizes["left"] + sizes.get("feedback_left", 0) + up_sums,
        p_bytes=p_bytes,
        side_unit=hw.side_unit if place == "side" else None,
    )


def _output_bytes(work: GemmWorkload) -> int:
    return work.m * work.n * work.out_bits // 8
