"""Every part of two costs, worked out by hand from the numbers of the YAML files.

Nothing here calls the model but for the result to compare: the arithmetic is written out, with the
tile given, so that a part that is dropped, doubled or taken from another operand shows at once.
Floats: the hand count and the model differ in the order of a few operations; 1e-12 is ample.
"""

import pytest

from hwmodels import GemmWorkload, estimate_cost, load_accelerator
from hwmodels.overrides import with_overrides


@pytest.fixture(scope="module")
def aie2():
    """256 x 256 -> 128, W4A8 with a W6A6 branch of rank 32: one tile on each of 4 x 4 cores."""
    work = GemmWorkload(m=256, n=128, k=256, main="W4A8", branch="W6A6", rank=32)
    return estimate_cost(work, load_accelerator("aie2"), tile_mkn=(64, 64, 32))


def check(parts, expected):
    assert {name: value for name, value in parts.items() if value} == {
        name: pytest.approx(value, rel=1e-12) for name, value in expected.items()
    }


# A core's tile: 64 x 32 outputs, 4 x 2 register blocks of 16 x 16; K in 4 slices of 64.
AIE2_BLOCKS = 4 * 2
# Between slices a block's sums go to L1 and back: 7 cycles and 3.7 per 64 bytes. A sum has the
# 32 bits of the fp32 combine, not the 16 of y: 16 * 16 * 4 / 64 = 16 times 64 bytes.
AIE2_SLICE = 7 + 3.7 * 16
AIE2_DRAM_BYTES = {
    "activations": 256 * (256 + 4 * 2),  # 8-bit codes, the wider of 8 and 6; 4 scales of 2 bytes
    "weights": 128 * (128 + 4 * 2),
    "factors": 32 * (192 + 4 * 2) + 128 * (24 + 2),  # R (32, 256) and L (128, 32) of 6 bits
    "output": 256 * 128 * 2,
}
AIE2_NS = {
    # int8xint4: 256 MACs of a block's depth step at 512 a cycle; loads of 24 bytes at 64 hide.
    "main": AIE2_BLOCKS * (256 * 0.5 + 4 * AIE2_SLICE),
    # P has 256 x 32 elements, 512 a core or 2 blocks, at one depth step a cycle.
    "branch_down": 2 * (256 * 1.0 + 4 * AIE2_SLICE),
    "branch_up": AIE2_BLOCKS * (32 * 1.0 + 1 * AIE2_SLICE),
    # Group sums, 16 a cycle after the MACs: 4 groups of main, 4 of X R^T, 1 of P L^T.
    "combine": (2048 * 4 + 512 * 4 + 2048 * 1) / 16,
    "tile": 64 * 32 * 2 / 4,  # y of a tile leaves at 4 bytes a cycle
}


def test_aie2_latency(aie2):
    paced = sum(AIE2_DRAM_BYTES.values()) / 17.0  # ns at 17 GB/s: all of it, the factors too
    busy = sum(AIE2_NS.values())
    assert busy < paced
    expected = AIE2_NS | {
        "stall": paced - busy,
        # 1 us to DRAM, then the first slice of X: 64 rows of 64 bytes and a scale, 4 bytes a cycle.
        "fill": 1000 + 64 * (64 + 2) / 4,
        "dispatch": 130_000,
    }
    check(aie2.parts["latency_s"], {name: ns * 1e-9 for name, ns in expected.items()})
    assert aie2.latency_s == pytest.approx((131_000 + 1056 + paced) * 1e-9, rel=1e-12)
    assert aie2.bound == "dispatch"


def test_a_fused_branch_slows_the_macs_of_main_by_what_the_file_says():
    halved = with_overrides(load_accelerator("aie2"), {"kernel.fused_rate_fraction": 0.5})
    fields = {"m": 256, "n": 128, "k": 256, "main": "W4A8"}
    alone = estimate_cost(GemmWorkload(**fields), halved, tile_mkn=(64, 64, 32))
    fused = GemmWorkload(**fields, branch="W6A6", rank=32)
    beside = estimate_cost(fused, halved, tile_mkn=(64, 64, 32))
    assert alone.parts["latency_s"]["main"] == pytest.approx(AIE2_NS["main"] * 1e-9, rel=1e-12)
    slower = AIE2_BLOCKS * (256 * 1.0 + 4 * AIE2_SLICE)
    assert beside.parts["latency_s"]["main"] == pytest.approx(slower * 1e-9, rel=1e-12)


def test_aie2_resources(aie2):
    # The vector unit: unpacking 64 a cycle, rounding 16 a cycle, on each core.
    unpacked = 256 * 256 / 16 + 32 * 256 / 4  # X_b, a sixteenth; R, a quarter of the columns
    unpacked += 64 * 32 + 32 * 32  # P and L, of 6 bits too, in each tile
    rounded = 256 * 32 + 256 * 256 + 256 * 256  # P, and X to 8 and to 6 bits
    # L1 has a channel for X and P and one for W, L and R.
    x_stream = 64 * ((256 + 8) + (24 + 2))
    w_stream = 32 * ((128 + 8) + (24 + 2)) + 32 * 256 / 4 * 6.25 / 8  # R has 6.25 bits, scales in
    l2_read = 256 * (264 + 26) + 128 * (136 + 26) + 32 * 200
    check(
        aie2.busy_s,
        {
            "compute": sum(AIE2_NS.values()) * 1e-9,
            "vector": (unpacked / 64 + rounded / 16 / 16) * 1e-9,
            "l1": x_stream / 4 * 1e-9,
            "l2": l2_read / 96 * 1e-9,
            "dram": sum(AIE2_DRAM_BYTES.values()) / 17e9,
        },
    )
    assert w_stream < x_stream


def test_aie2_bytes_and_roofline(aie2):
    check(aie2.parts["dram_bytes"], AIE2_DRAM_BYTES)
    check(
        aie2.parts["weight_bytes"],
        {"main": 128 * 136, "right": 32 * 200, "left": 128 * 26},
    )
    # 16 cores at 512 and 256 MACs a cycle take less than the bytes: X, W, R, L and y once.
    macs_ns = (256 * 128 * 256 / 512 + 256 * 32 * (256 + 128) / 256) / 16
    bytes_ns = sum(AIE2_DRAM_BYTES.values()) / 17
    assert macs_ns < bytes_ns
    assert aie2.roofline_latency_s == pytest.approx(bytes_ns * 1e-9, rel=1e-12)
    assert aie2.utilization == pytest.approx(macs_ns * 1e-9 / aie2.latency_s, rel=1e-12)


def test_aie2_energy(aie2):
    main, down, up = 256 * 128 * 256, 256 * 32 * 256, 256 * 32 * 128
    dram = sum(AIE2_DRAM_BYTES.values())
    # A register block of 16 reads each operand once for 16 MACs, at the width of the mode.
    operands = main * (8 / 16 + 4 / 16) / 8 + (down + up) * (8 / 16 + 8 / 16) / 8
    fills = 16 * (64 * 290 + 32 * 162 + 32 * 256 / 4 * 6.25 / 8)
    sums = 2 * 256 * 128 * 4 * (4 + 1)  # written and read, in 4 slices of K and 1 of the rank
    l2 = 256 * 290 + 128 * 162 + 32 * 200
    picojoules = {
        "mac_main": main * 0.18,
        "mac_branch": (down + up) * 0.30,
        "vector": 1.7 * (256 * 128 * 4 + 256 * 32 * 4 + 256 * 128 * 1)
        + 0.3 * (256 * 32 + 2 * 256 * 256),
        "l1": 1.15 * (operands + fills + sums),
        "l2": 1.6 * (l2 + dram),  # what is read, and all that DRAM filled or drained
        "dram": 163 * dram,
        "unpack": 0.1 * 16 * (256 * 256 / 16 + 32 * 256 / 4 + 64 * 32 + 32 * 32),
        "static": 0.5 * aie2.latency_s * 1e12,
    }
    check(aie2.parts["energy_j"], {name: pj * 1e-12 for name, pj in picojoules.items()})


@pytest.fixture(scope="module")
def h100():
    """512 x 512 -> 384, NVFP4 weights on MXFP8 activations, rank 16 with P in fp16: 24 tiles."""
    work = GemmWorkload(
        m=512, n=384, k=512, main="W4A8", branch="W8A8", rank=16, family="nvfp", p_bits=16
    )
    return estimate_cost(work, load_accelerator("h100"), tile_mkn=(128, 64, 64))


# fp8 runs in the family cutlass_scaled, which has no kernels with a branch of its own: the rate of
# fp8, what it gets of DRAM, how far that hides behind the MACs, what a kernel takes once and what
# its clusters see of L2 (4/3 of 4472 B a cycle) is all it changes here. These are fitted, so they
# are read; what is made of them is counted by hand.
_FAMILIES = {family.name: family for family in load_accelerator("h100").kernels}
FITTED = _FAMILIES["cutlass_scaled"].set
H100_START_S, H100_OVERLAP = FITTED["kernel.start_s"], FITTED["kernel.overlap_fraction"]
H100_DRAM = 3.35e12 * FITTED["memories.dram.sustained_fraction"]
# A tile of 128 x 64 on one of 132 multiprocessors: 2 register blocks of 64 x 64.
# Sustained MACs a cycle.
FP8, FP16 = 4096 * FITTED["modes.fp8.sustained_fraction"], 2048 * 0.78
H100_DRAM_BYTES = {
    "activations": 512 * (512 + 16),  # MXFP8: a byte per 32 elements
    "weights": 4 + 384 * (256 + 32),  # NVFP4: a byte per 16 elements, one float per tensor
    "factors": 16 * (512 + 16) + 384 * (16 + 1),
    "output": 512 * 384 * 2,
}
H100_DOWN_SHARE = 512 * 16 / 132  # elements of P a multiprocessor forms
H100_CYCLES = {
    "main": 2 * 512 * 64 * 64 / FP8,
    "branch_down": H100_DOWN_SHARE * 512 / FP8,
    "branch_up": 2 * 16 * 64 * 64 / FP16,
    # Scaling, 64 a cycle beside the MACs, is what lasts longer: one sum per 16 elements, the
    # smaller of the two groups; one per 32 in X R^T; none in P L^T, whose floats are scaled.
    "combine": (128 * 64 * 32 / 64 - 2 * 512 * 64 * 64 / FP8)
    + H100_DOWN_SHARE * (16 / 64 - 512 / FP8),
    "tile": 700 + 128 * 64 * 2 / 64,
}
# Bytes into L1: X with P, W with L, and R once for each of 4 rows of tiles.
H100_STREAM = 128 * (528 + 32) + 64 * ((256 + 32) + (16 + 1)) + 4 * 16 * 512 / 132 * 8.25 / 8


def test_h100_family(h100):
    assert (h100.kernel, h100.confidence) == ("cutlass_scaled", "extrapolated")
    family = _FAMILIES["cutlass_scaled"]
    assert family.set.keys() == {
        *("memories.l2.bandwidth_bytes_per_cycle", "memories.dram.sustained_fraction"),
        *("modes.fp8.sustained_fraction", "kernel.overlap_fraction", "kernel.start_s"),
        *("kernel.split_k_max", "kernel.tile_m_min_rows"),
    }
    # Outside its range a family is trusted for twice its worst error, 0.3 at least.
    spread = max(0.3, 2 * family.worst_error)
    assert h100.latency_high_s == pytest.approx(h100.latency_s * (1 + spread), rel=1e-12)
    assert h100.latency_low_s == pytest.approx(
        max(h100.roofline_latency_s, h100.latency_s * (1 - spread)), rel=1e-12
    )


def test_h100_latency(h100):
    expected = H100_CYCLES | {
        # 0.27 us to DRAM, then 64 of K of both operands through the one channel of 64 bytes; and
        # what a kernel of the family takes once.
        "fill": (0.27e-6 + H100_START_S) * 1.83e9 + (128 * (64 + 2) + 64 * (32 + 4)) / 64,
        "dispatch": 3e-6 * 1.83e9,
        # The longest of the memories, L1's channel here, beside what hides of it.
        "stall": (1 - H100_OVERLAP) * H100_STREAM / 64,
    }
    check(h100.parts["latency_s"], {name: c / 1.83e9 for name, c in expected.items()})
    assert h100.latency_s == pytest.approx(sum(expected.values()) / 1.83e9, rel=1e-12)


def test_h100_resources(h100):
    unpacked = 64 * 512 + 64 * 16  # W from 4 to 8 bits, L from 8 to the 16 of P
    rounded = (512 * 16 + 512 * 512) / 132  # P, and X to the one format both branches read
    l2_read = 6 * 512 * 560 + 4 * 384 * 305 + 4 * 16 * 528
    busy = {
        "compute": sum(H100_CYCLES.values()) / 1.83e9,
        "vector": (unpacked / 256 + rounded / 64) / 1.83e9,
        "l1": H100_STREAM / 64 / 1.83e9,
        "l2": l2_read / 5963 / 1.83e9,
        "dram": sum(H100_DRAM_BYTES.values()) / H100_DRAM,
    }
    check(h100.busy_s, busy)
    assert max(busy, key=busy.get) == "compute"


def test_h100_bytes_and_roofline(h100):
    check(h100.parts["dram_bytes"], H100_DRAM_BYTES)
    check(
        h100.parts["weight_bytes"],
        {"main": 4 + 384 * 288, "right": 16 * 528, "left": 384 * 17},
    )
    # The most any family gets of DRAM.
    most = max(f.set.get("memories.dram.sustained_fraction", 0) for f in _FAMILIES.values())
    bytes_s = sum(H100_DRAM_BYTES.values()) / (3.35e12 * most)
    # Peak rates, not the sustained ones.
    cycles = 512 * 384 * 512 / 4096 + 512 * 16 * 512 / 4096 + 512 * 16 * 384 / 2048
    macs_s = cycles / 132 / 1.83e9
    assert macs_s < bytes_s
    assert h100.roofline_latency_s == pytest.approx(bytes_s, rel=1e-12)
    assert h100.utilization == pytest.approx(macs_s / h100.latency_s, rel=1e-12)


def test_h100_energy(h100):
    main, down, up = 512 * 384 * 512, 512 * 16 * 512, 512 * 16 * 384
    dram = sum(H100_DRAM_BYTES.values())
    operands = (main + down) * (8 / 64 + 8 / 64) / 8 + up * (16 / 64 + 16 / 64) / 8
    right = 4 * 16 * 512 * 8.25 / 8
    fills = 132 * (128 * 560 + 64 * 305) + right  # sums stay in registers
    l2 = 6 * 512 * 560 + 4 * 384 * 305 + 4 * 16 * 528
    picojoules = {
        "mac_main": main * 0.42,
        "mac_branch": down * 0.42 + up * 1.1,
        "vector": 1.2 * (512 * 384 * 32 + 512 * 16 * 16) + 0.22 * (512 * 16 + 512 * 512),
        "l1": 0.9 * (operands + fills),
        "l2": 5.6 * (l2 + dram),
        "dram": 35 * dram,
        "unpack": 0.07 * 132 * (64 * 512 + 64 * 16),
        "static": 80 * h100.latency_s * 1e12,
    }
    check(h100.parts["energy_j"], {name: pj * 1e-12 for name, pj in picojoules.items()})
