"""Decide once how a weight runs on an array, so that a call packs A and computes, and no more.

A call of a millisecond finds caches that other data has passed through: every line of Python on
its way costs several times what it costs in a loop.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds, Norms
from loraq_sim.emulator.packed_weight import Order, Panels, address_of, aligned_empty
from loraq_sim.emulator.tile_plan import Choice, Plan
from loraq_sim.emulator.tile_route import choose_ruled
from loraq_sim.emulator.tile_run import TileJob, kernels_of, plain_arguments, scratch
from loraq_sim.emulator.tile_threads import run_bands
from loraq_sim.kernels.tile_arguments import TileArguments

__all__ = ["run_ready"]

_NO_SAMPLE = (-1, -1, -1)
# Arrays and outputs that one weight is kept ready for.
_KEPT = 256
_MASKS = {False: np.int16(-1), True: np.int16(255)}
_OUT, _OUT_ROW = (TileArguments._fields.index(name) for name in ("out", "out_row"))


class Ready(NamedTuple):
    """A kernel with its packed weight and every argument that no call changes.

    `limits`: what the norms of a sample of rows must exceed for the overflow rule to be needed;
    other calls may prove tiles safe and take the longer way.
    """

    order: Order
    plan: Plan
    panels: Panels
    height: int
    columns: int
    arguments: NDArray[np.int64]
    function: int
    limits: tuple[int, int, int]
    route: str


def run_ready(job: TileJob) -> tuple[NDArray[np.integer], str] | None:
    """Return the job's output and the route, or None where the choice depends on this call."""
    if job.init is not None or job.a.size == 0 or job.weight.codes.size == 0:
        return None
    known = job.weight.ready
    key = (job.mac, job.unsigned, job.path, job.output)
    if key not in known:
        if len(known) >= _KEPT:
            known.clear()
        known[key] = _prepare(job)
    ready = known[key]
    if ready is None:
        return None
    m, n = job.a.shape[0], job.weight.shape[0]
    row_panels = -(-m // ready.height)
    shape = (row_panels * ready.height, ready.columns)
    out = aligned_empty(shape, job.output.dtype)
    band = _Band(job, ready, ready.order.apply(job.a).view(np.int8), address_of(out))
    if not all(run_bands(job.threads, job.work, row_panels, band.run)):
        return None
    return (out if shape == (m, n) else np.ascontiguousarray(out[:m, :n])), ready.route


class _Band(NamedTuple):
    job: TileJob
    ready: Ready
    codes: NDArray[np.int8]
    out: int

    def run(self, first: int, stop: int) -> bool:
        from loraq_sim.kernels.run_blocks import run_blocks

        ready, height = self.ready, self.ready.height
        arguments = ready.arguments.copy()
        arguments[_OUT] = self.out + first * height * arguments[_OUT_ROW]
        return run_blocks(
            self.codes[first * height : stop * height],
            ready.plan.packing,
            _MASKS[self.job.unsigned],
            height,
            ready.limits,
            height,
            scratch(stop - first, ready.plan.dwords),
            arguments,
            ready.function,
        )


def _prepare(job: TileJob) -> Ready | None:
    """Decide for any activations of this dtype, or return None."""
    mac, limits = job.mac, _NO_SAMPLE
    plain = kernels_of(job)["exact"].shape
    choice, route = Choice("exact", Order(plain.layout, 0, 1)), "exact"
    if mac.tree_bits is not None:
        return None
    if mac.overflow != "wrap" or mac.acc_bits > 32:
        bounds = Bounds.of_codes(255 if job.unsigned else 128, job.weight.norms, None)
        if bounds.reach >= 2**31:
            return None
        if not bounds.accumulator_fits(mac):
            if mac.overflow == "wrap" or mac.accumulators > 1 or mac.acc_bits > 31:
                return None
            found = choose_ruled(job)
            limits = _limits(job.weight.norms, plain.width, mac.hi)
            if found is None or limits is None:
                return None
            choice, route = found, "tiles"
    kernel, plan, panels, arguments = plain_arguments(job, choice)
    return Ready(
        order=choice.order,
        plan=plan,
        panels=panels,
        height=kernel.shape.rows,
        columns=len(panels.w) * kernel.shape.width,
        arguments=np.array(arguments, np.int64),
        function=kernel.address,
        limits=limits,
        route=route,
    )


def _limits(w: Norms, width: int, room: int) -> tuple[int, int, int] | None:
    """Norms that rows of A must exceed for no bound of any tile to stay within `room`."""
    top, l1, l2 = w.calmest_panel(width)
    if top == 0:  # a panel of zeros is safe under any activations
        return None
    return room // l1, room // top, room * room // l2
