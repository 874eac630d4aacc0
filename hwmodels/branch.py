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

Layers that share one R (`shared_by`) run it once, beside each other: each is charged an even share
of X R^T, of R, and of transforming and rounding X. Only `recompute` forms P in every tile again.
"""

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from hwmodels.description import Accelerator, Mode, SideUnit
from hwmodels.errors import AcceleratorError
from hwmodels.modes import ModeChoice, Part, mode_of
from hwmodels.workload import GemmWorkload

__all__ = ["FusedBranch", "GemmKernel", "split_into_kernels"]

DownPlace = Literal["shared", "per_tile", "side", "elsewhere"]
Depth = TypeVar("Depth", int, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True)
class FusedBranch:
    """The low-rank part of a fused kernel; widths in bits per code.

    `down_place`: where P comes from. `shared`: the units form it together, once; `per_tile`: each
    output tile forms its own; `side`: the `side_unit`; `elsewhere`: read from DRAM (`p_bytes`).
    """

    rank: int
    down_place: DownPlace
    down: ModeChoice
    up: ModeChoice
    down_combines: int
    up_combines: int
    x_bits: int
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

    `a_bits`, `w_bits` and `out_bits` are bits per code; `*_bytes` are exact DRAM sizes of one pass
    over the operand; `first_x_bytes` is the first pass over X, at the wider of two activation
    formats; `combines` counts scaled partial sums per output element; `quantized` counts elements
    rounded on the way (P, and X where the branch reads another format than main), `rounded_x` those
    of X rounded once. `share` is the part of this kernel that is this layer's.
    """

    role: Part
    work: GemmWorkload
    m: int
    n: int
    k: int
    choice: ModeChoice
    a_bits: int
    w_bits: int
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

    @property
    def reads_x(self) -> bool:
        """Whether the activations are X, which P L^T has not."""
        return self.role != "branch_up"

    @property
    def transform_ops(self) -> dict[str, float]:
        """Vector operations that smooth and rotate X, by part."""
        if not self.reads_x or self.is_fed_by_another:
            return {}
        elements = self.m * self.k * self.x_share
        return {part: elements * ops for part, ops in self.work.vector_ops_per_x.items()}

    @property
    def is_fed_by_another(self) -> bool:
        """Whether the down-projection's kernel has already transformed and rounded X for main."""
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
            low = self.m * self.branch.rank
            if self.branch.forms_p:
                cycles += self.down_share * low * self.k / self.branch.down.mode.macs_per_cycle
            cycles += low * self.n / self.branch.up.mode.macs_per_cycle
        return cycles * self.share

    @property
    def modes(self) -> tuple[Mode, ...]:
        """MAC modes the compute units run in this kernel."""
        choices = [self.choice]
        if self.branch is not None:
            choices += [self.branch.down] * self.branch.forms_p + [self.branch.up]
        return tuple(choice.mode for choice in choices)

    def line_bits(self, bits: int, depth: Depth) -> Depth:
        """Bits of `depth` consecutive elements of one row, scales included."""
        if bits == 16:
            return 16 * depth
        group, scale_bits = self.work.grouping(bits)
        scales = 1 if group is None else -(-depth // group)
        return bits * depth + scale_bits * scales

    @property
    def factor_bytes(self) -> int:
        """DRAM bytes of one pass over the fused factors."""
        return 0 if self.branch is None else self.branch.right_bytes + self.branch.left_bytes


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
    schedule = work.schedule
    if schedule == "unfused":
        return [_main(work, hw, None), _down(work, hw), _up(work, hw)]
    if schedule == "down_fused":
        return [_main(work, hw, _branch(work, hw, "elsewhere")), _down(work, hw)]
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
    return [_main(work, hw, _branch(work, hw, places.get(schedule, "shared")))]


def _is_fed(work: GemmWorkload, role: Part) -> bool:
    return role == "main" and work.has_branch and work.schedule == "down_fused"


def _main(work: GemmWorkload, hw: Accelerator, branch: FusedBranch | None) -> GemmKernel:
    formats = {work.main_bits[1]}
    quantized = 0.0
    if branch is not None and branch.down_place != "elsewhere":
        formats.add(work.branch_bits[1])
        share = 1 if branch.down_place == "per_tile" else work.shared_by
        quantized = (work.m * work.rank + _narrower_x(work)) / share
    is_fed = _is_fed(work, "main")
    return _kernel(
        work, hw, "main", (work.m, work.n, work.k), work.main_bits, work.out_bits,
        out_bytes=_output_bytes(work),
        first_x_bytes=work.bytes_of(work.m, work.k, max(formats)) if not is_fed else None,
        quantized=quantized,
        rounded_x=0 if is_fed else _rounded_x(work, formats) / work.shared_by, branch=branch,
    )  # fmt: skip


def _down(work: GemmWorkload, hw: Accelerator) -> GemmKernel:
    """X R^T as a kernel of its own, which with down_fused also makes X_a for main."""
    p_bits, (main_bits, x_bits) = work.intermediate_bits, (work.main_bits[1], work.branch_bits[1])
    copy, formats = 0, {x_bits}
    if work.schedule == "down_fused":
        formats.add(main_bits)
        if main_bits != x_bits or work.reads_wide_x:
            copy = work.bytes_of(work.m, work.k, main_bits)
    quantized, rounded_x = work.m * work.rank, 0
    if work.schedule == "down_fused" or not work.rounds_x:
        quantized += _narrower_x(work)
    if work.schedule == "down_fused" or work.reads_wide_x or main_bits != x_bits:
        rounded_x = _rounded_x(work, formats)
    return _kernel(
        work, hw, "branch_down", (work.m, work.rank, work.k), work.branch_bits, p_bits,
        out_bytes=work.bytes_of(work.m, work.rank, p_bits) + copy, quantized=quantized,
        rounded_x=rounded_x, share=1 / work.shared_by,
    )  # fmt: skip


def _up(work: GemmWorkload, hw: Accelerator) -> GemmKernel:
    bits = (work.branch_bits[0], work.intermediate_bits)
    return _kernel(
        work, hw, "branch_up", (work.m, work.n, work.rank), bits, work.out_bits,
        out_bytes=_output_bytes(work), reread_bytes=_output_bytes(work),
    )  # fmt: skip


def _narrower_x(work: GemmWorkload) -> int:
    """Elements of X that are made on the way from its wider format, where there are two."""
    return work.m * work.k if work.branch_bits[1] != work.main_bits[1] else 0


def _rounded_x(work: GemmWorkload, formats: set[int]) -> int:
    """Elements of X rounded to `formats` from 16 bits, less those that `_narrower_x` counts."""
    if not work.rounds_x:
        return 0
    n_rounded = sum(bits < 16 for bits in formats) - (len(formats) - 1)
    return work.m * work.k * max(0, n_rounded)


def _kernel(
    work: GemmWorkload,
    hw: Accelerator,
    role: Part,
    shape: tuple[int, int, int],
    bits: tuple[int, int],
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
    w_bits, a_bits = bits
    choice = mode_of(hw, work, role)
    x_bytes = work.bytes_of(m, k, a_bits)
    if work.reads_wide_x and role != "branch_up" and not _is_fed(work, role):
        first_x_bytes = work.bytes_of(m, k, 16)
    return GemmKernel(
        role=role,
        work=work,
        m=m,
        n=n,
        k=k,
        choice=choice,
        a_bits=a_bits,
        w_bits=w_bits,
        out_bits=out_bits,
        partial_bits=work.partial_bits or max(out_bits, hw.datapath.combine_bits),
        combines=_combines(work, choice, k),
        first_x_bytes=x_bytes if first_x_bytes is None else first_x_bytes,
        x_bytes=x_bytes,
        w_bytes=work.bytes_of(n, k, w_bits),
        out_bytes=out_bytes,
        reread_bytes=reread_bytes,
        quantized=quantized,
        rounded_x=rounded_x,
        share=share,
        branch=branch,
    )


def _branch(work: GemmWorkload, hw: Accelerator, place: DownPlace) -> FusedBranch:
    w_bits, a_bits = work.branch_bits
    p_bits = work.intermediate_bits
    down, up = mode_of(hw, work, "branch_down"), mode_of(hw, work, "branch_up")
    sizes = work.weight_bytes()
    is_elsewhere = place == "elsewhere"
    right_bytes = sizes["right"]
    if place == "per_tile":
        right_bytes = work.bytes_of(work.rank, work.k, w_bits)
    return FusedBranch(
        rank=work.rank,
        down_place=place,
        down=down,
        up=up,
        down_combines=_combines(work, down, work.k),
        up_combines=_combines(work, up, work.rank),
        x_bits=work.main_bits[1] if is_elsewhere else a_bits,
        factor_bits=w_bits,
        p_bits=p_bits,
        right_bytes=0 if is_elsewhere else right_bytes,
        left_bytes=sizes["left"],
        p_bytes=work.bytes_of(work.m, work.rank, p_bits) if is_elsewhere else 0,
        side_unit=hw.side_unit if place == "side" else None,
    )


def _combines(work: GemmWorkload, choice: ModeChoice, depth: int) -> int:
    """Scaled additions per output element: one per group, none where the mode scales itself."""
    groupings = [work.grouping(bits) for bits in (choice.w_bits, choice.a_bits) if bits < 16]
    if choice.scales_itself or not any(scale_bits for _, scale_bits in groupings):
        return 0
    groups = [group for group, _ in groupings if group is not None]
    return -(-depth // min(groups)) if groups else 1


def _output_bytes(work: GemmWorkload) -> int:
    return work.m * work.n * work.out_bits // 8
