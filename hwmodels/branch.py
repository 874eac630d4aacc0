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
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hwmodels.description import Accelerator, Mode
from hwmodels.errors import AcceleratorError
from hwmodels.modes import ModeChoice, choose_mode
from hwmodels.workload import GemmWorkload

__all__ = ["FusedBranch", "GemmKernel", "split_into_kernels"]

DownPlace = Literal["shared", "per_tile", "side", "elsewhere"]


@dataclass(frozen=True, kw_only=True)
class FusedBranch:
    """The low-rank part of a fused kernel; widths in bits per code.

    `down_place`: where P comes from. `shared`: the units form it together, once; `per_tile`: each
    output tile forms its own; `side`: the side unit; `elsewhere`: read from DRAM (`p_bytes`).
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


@dataclass(frozen=True, kw_only=True)
class GemmKernel:
    """One dispatched kernel: out (m, n) = a (m, k) . w (n, k)^T, with a fused branch or none.

    `a_bits`, `w_bits` and `out_bits` are bits per code; `*_bytes` are exact DRAM sizes of one pass
    over the operand; `first_x_bytes` is the first pass over X, at the wider of two activation
    formats; `combines` counts scaled partial sums per output element; `quantized` counts elements
    rounded on the way (P, and X where the branch reads another format than main).
    """

    role: str
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
    quantized: int = 0
    branch: FusedBranch | None = None

    @property
    def peak_cycles(self) -> float:
        """Cycles of one compute unit at peak rate for the useful MACs."""
        cycles = self.m * self.n * self.k / self.choice.mode.macs_per_cycle
        if self.branch is not None:
            low = self.m * self.branch.rank
            if self.forms_p:
                cycles += low * self.k / self.branch.down.mode.macs_per_cycle
            cycles += low * self.n / self.branch.up.mode.macs_per_cycle
        return cycles

    @property
    def modes(self) -> tuple[Mode, ...]:
        """MAC modes the compute units run in this kernel."""
        choices = [self.choice]
        if self.branch is not None:
            choices += [self.branch.down] * self.forms_p + [self.branch.up]
        return tuple(choice.mode for choice in choices)

    @property
    def forms_p(self) -> bool:
        """Whether the compute units of this kernel compute X_b R^T."""
        return self.branch is not None and self.branch.down_place in ("shared", "per_tile")

    def line_bits(self, bits: int, depth: NDArray | int) -> NDArray | int:
        """Bits of `depth` consecutive elements of one row, scales included."""
        if bits == 16:
            return 16 * depth
        group, scale_bits = self.work.grouping(bits)
        scales = 1 if group is None else np.ceil(depth / group)
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
    if not work.has_branch:
        return [_main(work, hw, None)]
    schedule = work.schedule
    if schedule == "unfused":
        return [_main(work, hw, None), _down(work, hw), _up(work, hw)]
    if schedule == "down_fused":
        return [_main(work, hw, _branch(work, hw, "elsewhere")), _quantize_and_down(work, hw)]
    places = {"recompute": "per_tile", "parallel": "side", "given_p": "elsewhere"}
    if hw.units.organization == "systolic":
        places["recompute"] = "shared"  # The array is one unit: nothing would form P again.
    if schedule == "parallel" and hw.side_unit is None:
        raise AcceleratorError(
            f"branch_schedule 'parallel' needs a side_unit block in the file of {hw.name}; "
            "choose another schedule or describe the unit"
        )
    return [_main(work, hw, _branch(work, hw, places.get(schedule, "shared")))]


def _main(work: GemmWorkload, hw: Accelerator, branch: FusedBranch | None) -> GemmKernel:
    widest = work.main_bits[1]
    if branch is not None and branch.down_place != "elsewhere":
        widest = max(widest, work.branch_bits[1])
    return _kernel(
        work, hw, "main", (work.m, work.n, work.k), work.main_bits, work.out_bits,
        out_bytes=_output_bytes(work), first_x_bytes=work.bytes_of(work.m, work.k, widest),
        quantized=_quantized_beside_main(work, branch), branch=branch,
    )  # fmt: skip


def _down(work: GemmWorkload, hw: Accelerator) -> GemmKernel:
    p_bits = work.intermediate_bits
    return _kernel(
        work, hw, "branch_down", (work.m, work.rank, work.k), work.branch_bits, p_bits,
        out_bytes=work.bytes_of(work.m, work.rank, p_bits), quantized=_branch_quantized(work),
    )  # fmt: skip


def _quantize_and_down(work: GemmWorkload, hw: Accelerator) -> GemmKernel:
    """X R^T in the kernel that rounds X to main's format, if that is another one."""
    p_bits, main_bits = work.intermediate_bits, work.main_bits[1]
    copy = 0 if main_bits == work.branch_bits[1] else work.bytes_of(work.m, work.k, main_bits)
    return _kernel(
        work, hw, "branch_down", (work.m, work.rank, work.k), work.branch_bits, p_bits,
        out_bytes=work.bytes_of(work.m, work.rank, p_bits) + copy,
        quantized=_branch_quantized(work),
    )  # fmt: skip


def _up(work: GemmWorkload, hw: Accelerator) -> GemmKernel:
    bits = (work.branch_bits[0], work.intermediate_bits)
    return _kernel(
        work, hw, "branch_up", (work.m, work.n, work.rank), bits, work.out_bits,
        out_bytes=_output_bytes(work), reread_bytes=_output_bytes(work),
    )  # fmt: skip


def _quantized_beside_main(work: GemmWorkload, branch: FusedBranch | None) -> int:
    outside = branch is None or branch.down_place == "elsewhere"
    return 0 if outside else _branch_quantized(work)


def _branch_quantized(work: GemmWorkload) -> int:
    """Elements the branch rounds: P, and X into a second format."""
    has_own_x = work.branch_bits[1] != work.main_bits[1]
    return work.m * work.rank + (work.m * work.k if has_own_x else 0)


def _kernel(
    work: GemmWorkload,
    hw: Accelerator,
    role: str,
    shape: tuple[int, int, int],
    bits: tuple[int, int],
    out_bits: int,
    *,
    out_bytes: int,
    first_x_bytes: int | None = None,
    reread_bytes: int = 0,
    quantized: int = 0,
    branch: FusedBranch | None = None,
) -> GemmKernel:
    m, n, k = shape
    w_bits, a_bits = bits
    choice = choose_mode(hw, w_bits, a_bits, work.family)
    x_bytes = work.bytes_of(m, k, a_bits)
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
        branch=branch,
    )


def _branch(work: GemmWorkload, hw: Accelerator, place: DownPlace) -> FusedBranch:
    w_bits, a_bits = work.branch_bits
    p_bits = work.intermediate_bits
    down = choose_mode(hw, w_bits, a_bits, work.family)
    up = choose_mode(hw, w_bits, p_bits, work.family)
    sizes = work.weight_bytes()
    is_elsewhere = place == "elsewhere"
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
        right_bytes=0 if is_elsewhere else sizes["right"],
        left_bytes=sizes["left"],
        p_bytes=work.bytes_of(work.m, work.rank, p_bits) if is_elsewhere else 0,
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
