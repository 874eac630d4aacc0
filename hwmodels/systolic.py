"""Cycles of one systolic array, in closed form.

An operand stays in the rows x columns elements while another streams through in T steps:

    cycles = ceil(D1 / rows) * ceil(D2 / columns) * (T + load + rows + columns - 2) - 1

    weight stationary   D1, D2, T = K, N, M    load = rows
    input stationary    D1, D2, T = K, M, N    load = rows
    output stationary   D1, D2, T = M, N, K    load = 0

as SCALE-Sim 3.0.0 counts, with which all three agree exactly: each fold loads its operand (rows),
skews in and drains (rows + columns - 2); loads do not overlap the fold before. Outputs that stay
have nothing to load. The paper (Samajdar et al., ISPASS 2020) counts 2 rows there too, as if the
sums were shifted out row by row before the next fold; version 3.0.0 does not. Partial sums of folds
along K stay in the accumulators beside the array and never go to DRAM. The branch runs as folds of
its own after the main product.
"""

import numpy as np

from hwmodels.branch import GemmKernel
from hwmodels.description import Accelerator, Dataflow, Mode
from hwmodels.kernel_cycles import BusyCycles, Phase, conversion_cycles, make_phase
from hwmodels.traffic import Tiles

__all__ = ["systolic_busy_cycles", "systolic_cycles"]


def systolic_cycles(
    m: int, n: int, k: int, *, rows: int, columns: int, dataflow: Dataflow = "weight_stationary"
) -> int:
    """Cycles of x (m, k) times w (n, k) transposed on a rows x columns array."""
    folded: dict[Dataflow, tuple[int, int, int, int]] = {
        "weight_stationary": (k, n, m, rows),
        "output_stationary": (m, n, k, 0),
        "input_stationary": (k, m, n, rows),
    }
    down, across, steps, load = folded[dataflow]
    return -(-down // rows) * -(-across // columns) * (steps + load + rows + columns - 2) - 1


def systolic_busy_cycles(
    hw: Accelerator, kernel: GemmKernel, tiles: Tiles, dataflow: Dataflow
) -> BusyCycles:
    """Busy cycles of the array: main product, then both factors where the branch is fused."""
    units = hw.units

    def phase(mode: Mode, m: int, n: int, k: int, combines: int, share: float = 1.0) -> Phase:
        counted = systolic_cycles(
            m, n, k, rows=units.rows, columns=units.columns, dataflow=dataflow
        )
        # SCALE-Sim numbers its cycles from 0: one element alone would beat its own peak by one.
        cycles = max(counted, m * n * k / units.count)
        rate = mode.sustained_macs_per_cycle
        return make_phase(hw, np.array([share * cycles / rate]), share * m * n * combines)

    branch = kernel.branch
    phases: dict[str, Phase] = {
        kernel.role: phase(kernel.choice.mode, kernel.m, kernel.n, kernel.k, kernel.combines)
    }
    if branch is not None and branch.forms_p:
        phases["branch_down"] = phase(
            branch.down.mode,
            kernel.m,
            branch.down_rank,
            kernel.k,
            branch.down_combines,
            kernel.down_share,
        )
    if branch is not None:
        phases["branch_up"] = phase(
            branch.up.mode, kernel.m, kernel.n, branch.rank, branch.up_combines
        )
    added = 0.0
    if kernel.reread_bytes and hw.vector.add_elements_per_cycle is not None:
        added = kernel.m * kernel.n / hw.vector.add_elements_per_cycle
    conversion = conversion_cycles(hw, kernel, tiles, np.ones(1))
    return BusyCycles(phases=phases, tile=np.array([added]), conversion=conversion)
