"""The tile that synthesis prices, against the emulator: any column, any group sum, bit for bit."""

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.requantize import srs

SOURCES = ("mac.sv", "srs.sv", "tile.sv", "tile_testbench.sv")
COLUMNS = 3


def draw_configuration(seed):
    """A tile nobody chose: widths, signs, tree, accumulators and rules."""
    rng = np.random.default_rng(seed)
    rules = ("wrap", "saturate", "saturate_symmetric")
    overflow = str(rng.choice(rules))
    tree_bits = int(rng.integers(4, 20)) if rng.random() < 0.4 else None
    a_bits = int(rng.choice([2, 3, 4, 6, 8, 16]))
    return {
        "a_bits": a_bits,
        "w_bits": int(rng.choice([2, 3, 4, 5, 8])),
        "a_signed": a_bits == 16 or bool(rng.random() < 0.7),
        "w_signed": bool(rng.random() < 0.8),
        "c": int(rng.choice([1, 2, 3, 5, 8, 13])),
        "p": int(rng.choice([1, 1, 2, 3, 4])),
        "acc_bits": int(rng.integers(8, 40)),
        "overflow": overflow,
        "tree_bits": tree_bits,
        "tree_overflow": str(rng.choice(rules)) if tree_bits else None,
        "out_bits": int(rng.choice([4, 8, 16])),
        "out_signed": bool(rng.random() < 0.7),
        "k": int(rng.integers(1, 70)),
        "zero_point": bool(rng.random() < 0.7),
        # All ten rounding modes are built, or one.
        "only": int(rng.choice([0, 1, 2, 3, 8, 9, 10, 11, 12, 13])) if rng.random() < 0.3 else None,
    }


def simulate_tile(icarus, config, inputs, folder):
    """Accumulators and outputs of the RTL, (rows, COLUMNS) and per setting."""
    c = config["c"]
    rules = icarus.OVERFLOW_CODES
    parameters = {
        "COLUMNS": COLUMNS,
        "AW": config["a_bits"],
        "WW": config["w_bits"],
        "A_SIGNED": int(config["a_signed"]),
        "W_SIGNED": int(config["w_signed"]),
        "C": c,
        "P": config["p"],
        "ACC": config["acc_bits"],
        "OVERFLOW": rules[config["overflow"]],
        "TREE": config["tree_bits"] or 0,
        "TREE_OVERFLOW": rules[config["tree_overflow"] or config["overflow"]],
        "ZERO_POINT": int(config["zero_point"]),
        "OUT": config["out_bits"],
        "OUT_SIGNED": int(config["out_signed"]),
        "MODES": 0x3F0F if config["only"] is None else 1 << config["only"],
        "ROWS": len(inputs["a"]),
        "CHUNKS": -(-config["k"] // c),
        "SETTINGS": len(config["srs"]),
    }
    icarus.write_operand(folder / "a.hex", inputs["a"], config["a_bits"], c)
    icarus.write_operand(folder / "w.hex", inputs["w"], config["w_bits"], c)
    starts = [start for row in inputs["init"] for start in row]
    icarus.write_words(folder / "init.hex", starts, config["acc_bits"])
    words = [icarus.setting_word(setting) for setting in config["srs"]]
    icarus.write_words(folder / "settings.hex", words, 16)
    lines = icarus.run_testbench("tile_testbench", SOURCES, parameters, folder)
    table = [[int(word, 16) for word in line.split()] for line in lines]
    acc = [icarus.from_word(line[0], config["acc_bits"]) for line in table]
    bits = config["out_bits"]
    out = [
        [icarus.from_word(word, bits) if config["out_signed"] else word for word in column]
        for column in zip(*(line[1:] for line in table), strict=True)
    ]
    return acc, out


def assert_tile_agrees(icarus, seed, folder):
    config = draw_configuration(seed)
    # Shifts beyond the accumulator's width, too: guard and sticky bits are then its sign.
    shifts = [0, 1, config["acc_bits"] // 2, config["acc_bits"] + 3, 59, -4]
    config["srs"] = [
        {"shift": shifts[i % len(shifts)], "rounding": mode, "saturation": saturation}
        for i, (mode, code) in enumerate(icarus.ROUNDING_CODES.items())
        for saturation in icarus.SATURATION_CODES
        if config["only"] in (None, code)
    ]
    inputs = icarus.draw_inputs(config, np.random.default_rng(seed + 1000))
    inputs = {key: rows[:6] for key, rows in inputs.items()}
    inputs["w"] = inputs["w"][:COLUMNS]
    inputs["init"] = [row[:COLUMNS] for row in inputs["init"]]
    acc, out = simulate_tile(icarus, config, inputs, folder)

    mac = MacArray(
        acc_bits=config["acc_bits"],
        overflow=config["overflow"],
        products_per_add=config["c"],
        accumulators=config["p"],
        tree_bits=config["tree_bits"],
        tree_overflow=config["tree_overflow"],
    )
    a = np.array(inputs["a"], np.int16 if config["a_signed"] else np.uint8)
    w = np.array(inputs["w"], np.int8 if config["w_signed"] else np.uint8)
    init = np.array(inputs["init"], np.int64) if config["zero_point"] else None
    expected = emulate_gemm(a, w, mac, init=init)
    np.testing.assert_array_equal(expected.reshape(-1), acc, err_msg=str(config))
    for setting, given in zip(config["srs"], out, strict=True):
        want = srs(expected, out_bits=config["out_bits"], signed=config["out_signed"], **setting)
        np.testing.assert_array_equal(want.reshape(-1), given, err_msg=f"{config} {setting}")


@pytest.mark.parametrize("seed", range(16))
def test_a_tile_gives_what_the_emulator_gives(seed, icarus, tmp_path):
    assert_tile_agrees(icarus, seed, tmp_path)


def test_a_tile_runs_in_verilator(in_verilator, icarus_module, tmp_path):
    assert_tile_agrees(icarus_module, 4, tmp_path)


def test_a_group_sum_shifts_and_clamps_as_exact_integers_do(simulator, icarus_module, tmp_path):
    bench = tmp_path / "combine_testbench.sv"
    bench.write_text(COMBINE_BENCH)
    rng = np.random.default_rng(3)
    cases = 0
    for acc, shifts, wide, rule in [(12, 3, 16, 1), (20, 0, 22, 2), (16, 4, 18, 0), (24, 4, 40, 1)]:
        # A climb to the highest value, then a fall to the lowest.
        partial = rng.integers(0, 2 ** (acc - 1), 60)
        partial[20:] = -1 - partial[20:]
        shift = rng.integers(0, 2**shifts, 60)
        icarus_module.write_words(tmp_path / "partial.hex", partial.tolist(), acc)
        icarus_module.write_words(tmp_path / "shift.hex", shift.tolist(), 8)
        sources = ("mac.sv", "tile.sv", "srs.sv", str(bench))
        parameters = {"ACC": acc, "SHIFTS": shifts, "WIDE": wide, "OVERFLOW": rule}
        lines = icarus_module.run_testbench("combine_testbench", sources, parameters, tmp_path)
        top = 2 ** (wide - 1) - 1
        bottom = -top if rule == 2 else -top - 1
        total, expected = 0, []
        for value, by in zip(partial.tolist(), shift.tolist(), strict=True):
            total += value << by
            if rule == 0:
                total = (total + 2 ** (wide - 1)) % 2**wide - 2 ** (wide - 1)
            total = max(bottom, min(top, total))
            expected.append(total)
        assert [icarus_module.from_word(int(line, 16), wide) for line in lines] == expected
        cases += any(value in (top, bottom) for value in expected) or rule == 0
    assert cases >= 3, "no sum met its limit"


COMBINE_BENCH = """
`timescale 1ns / 1ps
module combine_testbench #(parameter ACC = 1, SHIFTS = 0, WIDE = 1, OVERFLOW = 0);
    localparam BITS = (SHIFTS > 0) ? SHIFTS : 1;
    reg clk = 0, load = 1, add = 0;
    reg [ACC-1:0] partials [0:59];
    reg [7:0] shifts [0:59];
    reg signed [ACC-1:0] partial;
    reg [BITS-1:0] shift;
    wire signed [WIDE-1:0] result;
    wire exceeds;
    integer i, file;
    combine #(.ACC(ACC), .SHIFTS(SHIFTS), .WIDE(WIDE), .OVERFLOW(OVERFLOW)) sum (
        .clk(clk), .load(load), .init({WIDE{1'b0}}), .add(add), .partial(partial), .shift(shift),
        .result(result), .exceeds(exceeds)
    );
    initial begin
        $readmemh("partial.hex", partials);
        $readmemh("shift.hex", shifts);
        file = $fopen("result.hex", "w");
        #1 clk = 1;
        #1 clk = 0; load = 0; add = 1;
        for (i = 0; i < 60; i = i + 1) begin
            partial = partials[i];
            shift = shifts[i][BITS-1:0];
            #1 clk = 1;
            #1 clk = 0;
            $fwrite(file, "%h\\n", result);
        end
        $fclose(file);
        $finish;
    end
endmodule
"""
