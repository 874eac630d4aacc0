"""MACs whose precision changes while they run, as published ones are built: exact in every mode."""

from importlib import resources

import numpy as np

# Operands for the array of partial products (8 bits), then for bricks (16 digits a product).
BENCH = """
`timescale 1ns / 1ps
module scalable_testbench;
    reg clk = 0, load;
    reg [1:0] mode;
    reg [1041:0] words [0:CASES*CHUNKS-1];
    reg [511:0] a, w;
    reg [7:0] a8, w8;
    wire signed [19:0] by_array, by_unit;
    wire signed [23:0] by_units, by_places;
    wire [127:0] apart;
    integer t, c, file;
    subword_mac #(.LEVELS(2)) one (
        .clk(clk), .load(load), .mode(mode), .a(a8), .w(w8), .result(by_array));
    fused_mac #(.N(1)) two (
        .clk(clk), .load(load), .mode(mode), .a(a[31:0]), .w(w[31:0]), .result(by_unit));
    fused_mac #(.N(16)) three (
        .clk(clk), .load(load), .mode(mode), .a(a), .w(w), .result(by_units));
    bitwise_mac #(.N(16)) four (
        .clk(clk), .load(load), .mode(mode), .a(a), .w(w), .result(by_places));
    apart_mac five (
        .clk(clk), .load(load), .mode(mode), .a(a[31:0]), .w(w[31:0]), .result(apart));
    initial begin
        $readmemh("words.hex", words);
        file = $fopen("result.hex", "w");
        for (t = 0; t < CASES; t = t + 1) begin
            load = 1;
            for (c = 0; c < CHUNKS; c = c + 1) begin
                {mode, a8, w8, a, w} = words[t * CHUNKS + c];
                #1 clk = 1;
                #1 clk = 0;
                load = 0;
            end
            #1 clk = 1;
            #1 clk = 0;
            $fwrite(file, "%h %h %h %h %h\\n", by_array, by_unit, by_units, by_places, apart);
        end
        $fclose(file);
        $finish;
    end
endmodule
"""
CASES, CHUNKS = 30, 4


def value(code, bits):
    """The two's complement value of the low `bits` of a code."""
    code %= 2**bits
    return code - 2**bits if code >= 2 ** (bits - 1) else code


def unit_sums(a, w, mode):
    """Results of sixteen bricks: all as one, by block of four, and by brick."""
    signed = {0: lambda digit: digit == 3, 1: lambda digit: digit % 2 == 1, 2: lambda digit: True}
    shift = {0: lambda i, j: 2 * (i + j), 1: lambda i, j: 2 * (i % 2 + j % 2), 2: lambda i, j: 0}
    blocks, bricks = [0] * 4, []
    for place in range(16):
        i, j = divmod(place, 4)
        digits = (a >> 2 * place) & 3, (w >> 2 * place) & 3
        x, y = (
            value(digit, 2) if signed[mode](index) else digit
            for digit, index in zip(digits, (i, j), strict=True)
        )
        bricks.append(x * y)
        blocks[2 * (i // 2) + j // 2] += x * y << shift[mode](i, j)
    return sum(blocks), blocks, bricks


def array_sum(a, w, mode):
    """What the array of partial products sums, at its weight: opposite parts meet."""
    width = (8, 4, 2)[mode]
    parts = 8 // width
    total = sum(
        value(a >> width * part, width) * value(w >> width * (parts - 1 - part), width)
        for part in range(parts)
    )
    return total << width * (parts - 1)


def test_every_mode_sums_its_products_exactly(icarus, tmp_path):
    rng = np.random.default_rng(5)
    drawn = [
        (
            case % 3,
            *(int(x) for x in rng.integers(0, 256, 2)),
            *(int.from_bytes(rng.bytes(64), "little") for _ in range(2)),
        )
        for case in range(CASES)
        for _ in range(CHUNKS)
    ]
    words = [mode << 1040 | a8 << 1032 | w8 << 1024 | a << 512 | w for mode, a8, w8, a, w in drawn]
    (tmp_path / "words.hex").write_text("\n".join(f"{word:x}" for word in words))
    bench = tmp_path / "bench.sv"
    bench.write_text(BENCH.replace("CASES", str(CASES)).replace("CHUNKS", str(CHUNKS)))
    rtl = resources.files("loraq_sim.emulator") / "rtl"
    sources = (str(rtl / "mac.sv"), str(rtl / "scalable.sv"), str(bench))
    lines = icarus.run_testbench("scalable_testbench", sources, {}, tmp_path)
    assert len(lines) == CASES
    for case, line in enumerate(lines):
        one, two, three, four, apart = (int(word, 16) for word in line.split())
        chunks = drawn[case * CHUNKS : (case + 1) * CHUNKS]
        mode = chunks[0][0]
        sums = [unit_sums(a % 2**32, w % 2**32, mode) for _, _, _, a, w in chunks]
        assert value(one, 20) == sum(array_sum(a, w, mode) for _, a, w, _, _ in chunks)
        assert value(two, 20) == sum(total for total, _, _ in sums)
        many = sum(
            unit_sums(a >> 32 * k & 0xFFFFFFFF, w >> 32 * k & 0xFFFFFFFF, mode)[0]
            for _, _, _, a, w in chunks
            for k in range(16)
        )
        assert value(three, 24) == value(four, 24) == many
        if mode == 0:
            assert value(apart, 20) == sum(total for total, _, _ in sums)
        for place in range(4) if mode == 1 else ():
            assert value(apart >> 32 * place, 12) == sum(blocks[place] for _, blocks, _ in sums)
        for place in range(16) if mode == 2 else ():
            assert value(apart >> 8 * place, 8) == sum(bricks[place] for _, _, bricks in sums)
