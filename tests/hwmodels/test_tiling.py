"""Tiles a user may ask for."""

import numpy as np
import pytest

from hwmodels import AcceleratorError, GemmWorkload, estimate_cost, load_accelerator

AIE2 = load_accelerator("aie2")


def _cost(tile, hw=AIE2, **fields):
    work = {"m": 4032, "n": 4032, "k": 4032, "main": "W8A8", "group": None, "scale_bits": 0}
    work |= {"out_bits": 8, "partial_bits": 8} | fields
    return estimate_cost(GemmWorkload(**work), hw, tile_mkn=tile)


def test_a_legal_tile_costs_what_a_hand_count_says():
    # 81 passes of 49 blocks of 16 x 16; each takes 4032 cycles and, per slice of 112 of K, 7 and
    # 3.7 per 64 bytes of partial sums; the tile drains at 4 bytes a cycle. 130 us to start, 1 us
    # to DRAM, and the first slices of 112 x 112 bytes at 4 bytes a cycle.
    cycles = 81 * (49 * (4032 + 36 * (7 + 3.7 * 4)) + 112 * 112 / 4) + 112 * 112 / 4
    hand_s = cycles / 1e9 + 130e-6 + 1e-6
    assert _cost((112, 112, 112)).latency_s == pytest.approx(hand_s, rel=1e-12)


@pytest.mark.parametrize("tile", [(16, 8, 16), (64, 64, 64), np.array([64, 8, 64]), [20, 8, 24]])
def test_whole_multiples_of_the_instruction_are_costed(tile):
    assert _cost(tile).tile_mkn == tuple(tile)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((0, 64, 64), r"tile_mkn=\(0, 64, 64\) must be three whole numbers"),
        ((-16, 64, 64), r"tile_mkn=\(-16, 64, 64\) must be three whole numbers .* of at least 1"),
        ((64, 64.5, 64), r"must be three whole numbers"),
        ((64, True, 64), r"must be three whole numbers"),
        ((64, 64), r"must be three whole numbers"),
        ("64x64x64", r"must be three whole numbers"),
        (64, r"must be three whole numbers"),
        ((64, 2**40, 64), r"must be three whole numbers"),
        ((10, 8, 16), r"m=10 is no multiple of 4, instruction_m of mode int8 of aie2; use 8 or 12"),
        ((64, 7, 64), r"k=7 is no multiple of 8, instruction_k of mode int8 of aie2; use 8$"),
        ((20, 64, 20), r"n=20 is no multiple of 8, instruction_n of mode int8"),
        ((1000, 64, 64), r"tile 1000x64x64 needs 201216 bytes, more than memories.l1.capacity_byt"),
        # DMA: 10 bits of wrap, 14 of length, words of 4 bytes.
        (
            (64, 4104, 64),
            r"4104 activations of 8 bits are 1026 words, .*wrap_max_words=1023 .*4092$",
        ),
        (
            (1024, 8, 8),
            r"8 activations of 8 bits: m=1024 lines are more than memories.dma.wrap_max",
        ),
        ((8, 64, 1028), r"n=1028 is no multiple of 8"),
        ((8, 128, 1016), r"n=1016 lines are 32512 words, more than one transfer, .*words=16383"),
    ],
    ids=str,
)
def test_other_tiles_are_refused_with_the_value_and_the_rule(tile, message):
    with pytest.raises(AcceleratorError, match=message):
        _cost(tile)


def test_the_modes_of_a_fused_branch_count_too():
    fields = {"main": "W4A8", "branch": "W8A8", "rank": 32}
    with pytest.raises(AcceleratorError, match="k=8 is no multiple of 16, instruction_k of mode"):
        _cost((64, 8, 64), **fields)
    with pytest.raises(AcceleratorError, match="n=20 is no multiple of 8, instruction_n of mode"):
        _cost((64, 16, 20), **fields)


def test_sums_beyond_the_registers_and_systolic_arrays_are_named():
    with pytest.raises(AcceleratorError, match="do not fit in kernel.accumulator_capacity_bytes"):
        _cost((1024, 32, 1024), load_accelerator("h100"))
    with pytest.raises(AcceleratorError, match="is a systolic array, whose tile is the array"):
        _cost((16, 16, 16), load_accelerator("systolic"))


def test_lines_that_do_not_fill_words_are_refused_with_the_next_that_do():
    six = {"main": "W6A6"}
    message = (
        r"8 activations of 6 bits are no whole words of memories.dma.word_bytes=4 of aie2; use k=16"
    )
    with pytest.raises(AcceleratorError, match=message):
        _cost((64, 8, 64), **six)
    assert _cost((64, 16, 64), **six).latency_s > 0
    # GPUs say nothing of descriptors.
    assert _cost((64, 64, 64), load_accelerator("h100"), main="W6A6").latency_s > 0


def test_padded_rows_are_said_and_rows_beyond_a_step_refused():
    fields = {"tile": None, "m": 64, "n": 64, "main": "W8A8"}
    assert _cost(**fields, k=1152).padding == ""
    assert (
        _cost(**fields, k=1153).padding == "rows of X (1153 x 8 bit) are padded to words of 4 bytes"
    )
    narrow = fields | {"n": 63, "out_bits": 16}
    assert "X (1153 x 8 bit) and y (63 x 16 bit)" in _cost(**narrow, k=1153).padding
    assert _cost(**fields, k=1153, hw=load_accelerator("h100")).padding == ""
    assert _cost(**fields, k=4 * 2**20).latency_s > 0
    with pytest.raises(
        AcceleratorError, match="are 1048577 words, more than memories.dma.step_max"
    ):
        _cost(**fields, k=4 * 2**20 + 1)
