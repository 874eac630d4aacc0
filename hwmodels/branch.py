"""A layer as the kernels that run it: one with the branch fused, or three without.

Fused: one kernel. X is read once, at the wider of the two activation widths; the narrower copy is
derived on chip. P = X_b R^T is computed once per row of X, requantized and kept on chip; P L^T is
extra depth of the main output tile, so y is written once.
Unfused: main writes y; a second kernel reads X_b and writes P; a third reads P and y, adds P L^T
and writes y again. Three dispatches.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.description import Accelerator
from hwmodels.modes import ModeChoice, choose_mode
from hwmodels.workload import GemmWorkload

__all__ = ["FusedBranch", "GemmKernel", "split_into_kernels"]


@dataclass(frozen=True, kw_only=True)
class FusedBranch:
    """The low-rank part of a fused kernel; widths in bits per code."""

    rank: int
    down: ModeChoice
    up: ModeChoice
    down_combines: int
    up_combines: int
    x_bits: int
    factor_bits: int
    p_bits: int
    shares_x: bool
    right_bytes: int
    left_bytes: int


@dataclass(frozen=True, kw_only=True)
class GemmKernel:
    """One dispatched kernel: out (m, n) = a (m, k) . w (n, k)^T, with a fused branch or none.

    `a_bits`, `w_bits` and `out_bits` are bits per code; `*_bytes` are exact DRAM sizes of one pass
    over the operand; `first_x_bytes` is the first pass over X, at the wider of two activation
    formats; `combines` counts scaled partial sums per output element; `quantized` counts elements
    rounded on the way (P, and X where the branch reads another format than main).
    """

    role: str
    m: int
    n: int
    k: int
    choice: ModeChoice
    a_bits: int
    w_bits: int
    out_bits: int
    group: int | None
    scale_bits: int
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
            cycles += low * self.k / self.branch.down.mode.macs_per_cycle
            cycles += low * self.n / self.branch.up.mode.macs_per_cycle
        return cycles

    def line_bits(self, bits: int, depth: NDArray | int) -> NDArray | int:
        """Bits of `depth` consecutive elements of one row, scales included."""
        if bits == 16:
            return 16 * depth
        scales = 1 if self.group is None else np.ceil(depth / self.group)
        return bits * depth + self.scale_bits * scales

    @property
    def factor_bytes(self) -> int:
        """DRAM bytes of one pass over both fused factors."""
        return 0 if self.branch is None else self.branch.right_bytes + self.branch.left_bytes


def split_into_kernels(work: GemmWorkload, hw: Accelerator) -> list[GemmKernel]:
    """Kernels that run `work` on `hw`, in order."""
    if not work.has_branch:
        return [_main(work, hw, None)]
    if work.fused:
        return [_main(work, hw, _fused_branch(work, hw))]
    w_bits, a_bits = work.branch_bits
    p_bits = work.intermediate_bits
    down = _kernel(
        work, hw, "branch_down", (work.m, work.rank, work.k), (w_bits, a_bits), p_bits,
        out_bytes=work.bytes_of(work.m, work.rank, p_bits), quantized=_branch_quantized(work),
    )  # fmt: skip
    up = _kernel(
        work, hw, "branch_up", (work.m, work.n, work.rank), (w_bits, p_bits), work.out_bits,
        out_bytes=_output_bytes(work), reread_bytes=_output_bytes(work),
    )  # fmt: skip
    return [_main(work, hw, None), down, up]


def _main(work: GemmWorkload, hw: Accelerator, branch: FusedBranch | None) -> GemmKernel:
    widest = work.main_bits[1]
    if branch is not None:
        widest = max(widest, work.branch_bits[1])
    return _kernel(
        work, hw, "main", (work.m, work.n, work.k), work.main_bits, work.out_bits,
        out_bytes=_output_bytes(work), first_x_bytes=work.bytes_of(work.m, work.k, widest),
        quantized=0 if branch is None else _branch_quantized(work), branch=branch,
    )  # fmt: skip


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
    choice = choose_mode(hw, w_bits, a_bits)
    x_bytes = work.bytes_of(m, k, a_bits)
    return GemmKernel(
        role=role,
        m=m,
        n=n,
        k=k,
        choice=choice,
        a_bits=a_bits,
        w_bits=w_bits,
        out_bits=out_bits,
        group=work.group,
        scale_bits=work.scale_bits,
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


def _fused_branch(work: GemmWorkload, hw: Accelerator) -> FusedBranch:
    w_bits, a_bits = work.branch_bits
    p_bits = work.intermediate_bits
    down, up = choose_mode(hw, w_bits, a_bits), choose_mode(hw, w_bits, p_bits)
    sizes = work.weight_bytes()
    return FusedBranch(
        rank=work.rank,
        down=down,
        up=up,
        down_combines=_combines(work, down, work.k),
        up_combines=_combines(work, up, work.rank),
        x_bits=a_bits,
        factor_bits=w_bits,
        p_bits=p_bits,
        shares_x=a_bits == work.main_bits[1],
        right_bytes=sizes["right"],
        left_bytes=sizes["left"],
    )


def _combines(work: GemmWorkload, choice: ModeChoice, depth: int) -> int:
    """Scaled additions per output element: one per group of an integer GEMM, none for float."""
    if choice.mode.kind == "float" or work.scale_bits == 0:
        return 0
    return 1 if work.group is None else -(-depth // work.group)


def _output_bytes(work: GemmWorkload) -> int:
    return work.m * work.n * work.out_bits // 8
