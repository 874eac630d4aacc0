"""Bytes that a kernel moves, counted by hand: passes over X and W, panels, copies, shares."""

import math

import pytest

from hwmodels import AcceleratorError, GemmWorkload, estimate_cost, load_accelerator
from hwmodels.overrides import with_overrides

AIE2 = load_accelerator("aie2")
H100 = load_accelerator("h100")
TILE = (64, 64, 64)


def _main(hw, tile=None, **fields):
    return estimate_cost(GemmWorkload(**fields), hw, tile_mkn=tile).kernels[0]


@pytest.mark.parametrize(("n", "passes"), [(256, 1), (512, 2), (1024, 4)])
def test_a_second_format_of_x_is_read_once_copied_and_read_again(n, passes):
    # 4 columns of 64 outputs. X has 8 bits for the branch and 4 for main; its copy of 4 bits is
    # written in the first pass and read in all others, where that is less than reading 8 again.
    fields = {"m": 512, "k": 256, "main": "W4A4", "branch": "W8A8", "rank": 16}
    dram = _main(AIE2, TILE, n=n, **fields).dram
    wide, narrow = 512 * (256 + 4 * 2), 512 * (128 + 4 * 2)
    assert dram.x_reads == passes
    assert dram.activations == (wide if passes == 1 else min(passes * wide, wide + passes * narrow))


DATAFLOWS = {
    # 8 columns of 32 and 5 rows of 32: what stays is read once.
    "systolic": (8, 1),
    "systolic@output_stationary": (8, 5),
    "systolic@input_stationary": (1, 5),
}


@pytest.mark.parametrize("name", DATAFLOWS)
def test_an_operand_that_stays_in_the_array_is_read_once(name):
    no_panels = with_overrides(load_accelerator(name), {"memories.l2.panel_fraction": 0})
    dram = _main(no_panels, m=160, n=256, k=96, main="W8A8").dram
    assert (dram.x_reads, dram.w_reads) == DATAFLOWS[name]
    assert dram.weights == DATAFLOWS[name][1] * 256 * (96 + 2 * 2)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
@pytest.mark.parametrize(("m", "n", "rank"), [(4096, 1500, 0), (1500, 4096, 0), (3000, 480, 16)])
def test_a_panel_of_weights_leaves_room_for_p(fraction, m, n, rank):
    array = load_accelerator("systolic@output_stationary")
    hw = with_overrides(array, {"memories.l2.panel_fraction": fraction})
    k = 1024
    fields = {"m": m, "n": n, "k": k, "main": "W8A8", "branch": "W8A8", "rank": rank}
    dram = _main(hw, group=None, **fields).dram
    room, row = fraction * 2**21, k + 2  # codes and the one scale of a row
    p_row = rank + 2 if rank else 0
    x_rows, w_rows = room // (row + p_row), (room - m * p_row) // (row + p_row)
    x_bytes, w_bytes = m * row, n * row + (rank * row + n * p_row if rank else 0)
    options = {
        "activations resident": x_bytes + math.ceil(m / x_rows) * w_bytes,
        "weights resident": math.ceil(n / w_rows) * x_bytes + w_bytes,
    }
    assert dram.policy == min(options, key=options.get)
    assert dram.activations + dram.weights + dram.factors == options[dram.policy]


@pytest.mark.parametrize("transforms", [(), ("smooth",), ("hadamard64", "smooth")])
@pytest.mark.parametrize("schedule", ["fused", "unfused", "recompute"])
def test_dram_is_busy_with_the_bytes_that_are_counted(schedule, transforms):
    work = GemmWorkload(
        m=1024, n=1024, k=512, main="W4A4", branch="W8A8", rank=32, branch_schedule=schedule,
        transforms=transforms,
    )  # fmt: skip
    for kernel in estimate_cost(work, AIE2, tile_mkn=TILE).kernels:
        seconds = kernel.dram.total / AIE2.memories.dram.sustained_bytes_per_s
        assert kernel.busy_s["dram"] == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "mnk", [(4096, 1152, 1152), (64, 4608, 1152), (3000, 700, 500), (300, 4608, 1152)]
)
@pytest.mark.parametrize("main", ["W4A4", "W8A8"])
def test_the_search_promises_no_more_than_its_tile_keeps(mnk, main):
    # No panels on aie2: every tile the search takes can be asked for.
    work = GemmWorkload(**dict(zip("mnk", mnk, strict=True)), main=main)
    found = estimate_cost(work, AIE2)
    asked = estimate_cost(work, AIE2, tile_mkn=found.tile_mkn)
    assert found.latency_s == pytest.approx(asked.latency_s, rel=1e-12)
    assert found.dram_bytes <= asked.dram_bytes


def test_y_that_is_read_back_comes_out_of_l2():
    fields = {"m": 256, "n": 256, "k": 256, "main": "W8A8", "branch": "W8A8", "rank": 64}
    up = estimate_cost(GemmWorkload(**fields, fused=False), AIE2, tile_mkn=TILE).kernels[2]
    # P and L, one pass each of 64 codes and a scale, and y of 16 bits.
    nbytes = 256 * (64 + 2) + 256 * (64 + 2) + 256 * 256 * 2
    assert up.busy_s["l2"] == pytest.approx(nbytes / 96 / 1e9, rel=1e-12)


def test_a_rotated_x_enters_as_16_bit_floats_once():
    fields = {"m": 512, "n": 1024, "k": 256, "main": "W4A4"}
    plain = _main(AIE2, TILE, **fields)
    rotated = _main(AIE2, TILE, **fields, transforms=("hadamard64",))
    more = 512 * (2 * 256 - (128 + 4 * 2))
    seconds = rotated.busy_s["l2"] - plain.busy_s["l2"]
    assert seconds == pytest.approx(more / 96 / 1e9, rel=1e-9)


def test_a_shared_kernel_moves_an_even_part_rounded_up():
    fields = {"m": 100, "n": 64, "k": 128, "main": "W4A8", "branch": "W8A8", "rank": 9}
    alone, shared = (
        estimate_cost(GemmWorkload(**fields, fused=False, shared_by=by), AIE2, tile_mkn=TILE)
        for by in (1, 7)
    )
    for name in ("activations", "weights", "output"):
        whole = getattr(alone.kernels[1].dram, name)
        assert whole % 7
        assert getattr(shared.kernels[1].dram, name) == whole // 7 + 1


def test_a_side_unit_that_serves_several_layers_is_busy_for_each_in_turn():
    fields = {"m": 4096, "n": 1152, "k": 1152, "main": "W4A8", "branch": "W8A8", "rank": 64}
    kernel = _main(H100, **fields, branch_schedule="parallel", shared_by=4)
    macs = 4096 * 64 * 1152 / 4
    assert kernel.busy_s["side"] == pytest.approx(macs / 33792 / 1.83e9, rel=1e-12)


def test_rounding_x_for_several_layers_is_charged_to_each_in_part():
    fields = {"m": 256, "n": 128, "k": 256, "main": "W4A4", "branch": "W4A4", "rank": 16}
    fields |= {"scale_bits": 0, "out_bits": 8}
    alone, shared = (_main(AIE2, TILE, **fields, shared_by=by) for by in (1, 4))
    # X and P, to 4 bits both; integers without scales combine nothing.
    rounded = 256 * 256 + 256 * 16
    saved = alone.energy_parts_j["vector"] - shared.energy_parts_j["vector"]
    pj = AIE2.energy.quantize_pj_per_element
    assert saved == pytest.approx(0.75 * rounded * pj * 1e-12, rel=1e-9)


def test_a_tile_that_forms_its_own_p_reads_all_of_r_for_each_layer():
    fields = {"m": 512, "n": 512, "k": 512, "main": "W8A8", "branch": "W8A8", "rank": 64}
    alone, shared = (
        estimate_cost(GemmWorkload(**fields, branch_schedule="recompute", shared_by=by), H100)
        for by in (1, 3)
    )
    for name in ("l1", "l2", "compute"):
        assert shared.busy_s[name] == alone.busy_s[name]
    assert shared.utilization * shared.latency_s == alone.utilization * alone.latency_s


def test_what_idles_idles_while_every_kernel_runs():
    fields = {"m": 256, "n": 256, "k": 256, "main": "W8A8", "branch": "W8A8", "rank": 64}
    cost = estimate_cost(GemmWorkload(**fields, fused=False), H100)
    static = H100.energy.static_w * cost.latency_s
    assert cost.parts["energy_j"]["static"] == pytest.approx(static, rel=1e-12)


@pytest.mark.parametrize(("k", "level"), [(752, "l1"), (753, "l2")])
def test_reserved_bytes_of_l1_hold_no_layer(k, level):
    # 16 cores of 63 KiB: 512 x 512 outputs and two operands of 512 x 752 bytes fill them.
    fields = {"m": 512, "n": 512, "k": k, "main": "W8A8", "out_bits": 8, "scale_bits": 0}
    assert estimate_cost(GemmWorkload(**fields), AIE2).fits_in == level


def test_a_tile_may_fill_l1_to_the_last_byte():
    # 1 KiB reserved, two buffers of 64 x 64 bytes for each operand, and sums of 32 bits.
    nbytes = 1024 + 2 * 2 * 64 * 64 + 64 * 64 * 4
    fields = {"m": 256, "n": 256, "k": 256, "main": "W8A8", "scale_bits": 0}
    exact = with_overrides(AIE2, {"memories.l1.capacity_bytes": nbytes})
    assert _main(exact, TILE, **fields).tile_mkn == TILE
    short = with_overrides(AIE2, {"memories.l1.capacity_bytes": nbytes - 1})
    with pytest.raises(AcceleratorError, match=f"tile 64x64x64 needs {nbytes} bytes"):
        _main(short, TILE, **fields)


def test_sums_of_32_bits_may_fill_the_registers():
    fields = {"m": 512, "n": 512, "k": 512, "main": "W8A8", "scale_bits": 0}
    assert _main(H100, (128, 32, 256), **fields).tile_mkn == (128, 32, 256)
    with pytest.raises(AcceleratorError, match=r"the 147456 bytes of sums of tile 192x32x192 do n"):
        _main(H100, (192, 32, 192), **fields)


def test_a_p_that_is_given_is_read_with_every_pass_over_x():
    fields = {"m": 512, "n": 1024, "k": 256, "main": "W8A8", "branch": "W8A8", "rank": 32}
    dram = _main(AIE2, TILE, **fields, branch_schedule="given_p").dram
    assert dram.x_reads == 4
    assert dram.p == 4 * 512 * (32 + 2)


def test_p_that_every_tile_forms_again_takes_energy_every_time():
    fields = {"m": 512, "n": 1024, "k": 512, "main": "W8A8", "branch": "W8A8", "rank": 64}
    kernel = _main(H100, (128, 32, 256), **fields, branch_schedule="recompute")
    (mode,) = {mode.energy_pj_per_mac for mode in H100.modes if mode.name == kernel.modes["main"]}
    # 1024 outputs in tiles of 256: four times X R^T, once P L^T.
    macs = 4 * 512 * 64 * 512 + 512 * 64 * 1024
    assert kernel.energy_parts_j["mac_branch"] == pytest.approx(macs * mode * 1e-12, rel=1e-12)


def test_an_operand_comes_in_no_faster_than_its_streams():
    """A matrix times one row on XDNA2: 8 streams carry the weights, whatever DRAM could do."""
    hw = load_accelerator("aie2p")
    dram = hw.memories.dram
    work = GemmWorkload(m=1, n=16384, k=2048, main="W16A16", group=None, rounds_x=False)
    cost = estimate_cost(work, hw, kernel="gemv")
    streams_s = 16384 * 2048 * 2 / 8 / dram.stream_bytes_per_s
    assert cost.busy_s["dram"] == pytest.approx(streams_s, rel=1e-9)
    assert cost.busy_s["dram"] > 1.5 * work.weight_bytes()["main"] / dram.sustained_bytes_per_s
    # Energy and bytes are those that move.
    free = hw.model_copy(
        update={
            "memories": hw.memories.model_copy(
                update={"dram": dram.model_copy(update={"stream_bytes_per_s": None})}
            )
        }
    )
    faster = estimate_cost(work, free, kernel="gemv")
    assert faster.latency_s < cost.latency_s
    assert faster.dram_bytes == cost.dram_bytes


def test_the_power_limit_slows_a_full_chip_and_no_other():
    hw = load_accelerator("mi300x")
    unlimited = with_overrides(hw, {"units.power_fraction": 1.0})
    full = GemmWorkload(m=8192, n=8192, k=8192, main="W8A8", family="mxfp", group=None)
    few = GemmWorkload(m=128, n=1280, k=8192, main="W8A8", family="mxfp", group=None)
    slow, fast = (estimate_cost(full, each, kernel="hipblaslt") for each in (hw, unlimited))
    parts = slow.parts["latency_s"]["main"], fast.parts["latency_s"]["main"]
    assert parts[0] == pytest.approx(parts[1] / hw.units.power_fraction, rel=1e-9)
    slow, fast = (estimate_cost(few, each, kernel="ck_scaled") for each in (hw, unlimited))
    assert slow.units_share < hw.units.power_fraction
    assert slow.latency_s == fast.latency_s


@pytest.mark.parametrize(("rows", "columns"), [(2, 8), (4, 4), (8, 2)])
def test_units_take_turns_along_the_rows_and_columns_of_the_array(rows, columns):
    array = {"units.rows": rows, "units.columns": columns, "memories.l2.panel_fraction": 0}
    hw = with_overrides(AIE2, array)

    def turns(m, n):
        return _main(hw, TILE, m=64 * m, n=64 * n, k=4096, main="W8A8").busy_s["compute"]

    # One tile of 64 x 64 for each of 16 units, however they lie, takes as long as one tile alone.
    one = turns(1, 1)
    assert turns(rows, columns) == pytest.approx(one, rel=0.01)
    assert turns(3 * rows, columns) == pytest.approx(3 * one, rel=0.01)
    assert turns(rows, columns + 1) == pytest.approx(2 * one, rel=0.01)
