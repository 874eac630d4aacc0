"""Run two_level.sv in Icarus Verilog, and write its golden vectors.

``python tests/rtl/two_level_rtl.py`` rewrites ``tests/golden/two_level``.
"""

import tempfile
from pathlib import Path

import icarus
import numpy as np

GOLDEN = icarus.GOLDEN / "two_level"
SOURCES = ("mac.sv", "srs.sv", "tile.sv", "two_level.sv", "two_level_testbench.sv")

# name: the column, then the wide accumulator. Defaults as in icarus.py.
CONFIGURATIONS = {
    "gemmini": {"acc_bits": 20, "column_k": 16, "k": 70, "wide_acc_bits": 32},
    "narrow_wrap_column": {"acc_bits": 16, "column_k": 8, "k": 45, "wide_acc_bits": 18},
    "saturating_column": {
        "acc_bits": 16,
        "overflow": "saturate",
        "column_k": 16,
        "k": 60,
        "wide_acc_bits": 18,
        "wide_overflow": "saturate",
    },
    "symmetric_c2_p2_column": {
        "acc_bits": 15,
        "overflow": "saturate_symmetric",
        "c": 2,
        "p": 2,
        "column_k": 9,
        "k": 50,
        "wide_acc_bits": 17,
        "wide_overflow": "saturate_symmetric",
    },
    "tree_column_wide_wrap": {
        "acc_bits": 16,
        "overflow": "saturate",
        "c": 4,
        "tree_bits": 15,
        "tree_overflow": "wrap",
        "column_k": 16,
        "k": 64,
        "wide_acc_bits": 18,
    },
    "int4_column": {
        "a_bits": 4,
        "w_bits": 4,
        "acc_bits": 9,
        "overflow": "saturate",
        "column_k": 32,
        "k": 100,
        "wide_acc_bits": 10,
        "wide_overflow": "saturate",
    },
    "unsigned_wide64": {
        "a_signed": False,
        "acc_bits": 17,
        "overflow": "saturate",
        "c": 3,
        "column_k": 7,
        "k": 24,
        "wide_acc_bits": 64,
        "wide_overflow": "saturate",
    },
}


def configuration(name: str) -> dict:
    """Return one configuration with its defaults."""
    defaults = {key: icarus.DEFAULTS[key] for key in icarus.DEFAULTS if not key.startswith("out")}
    return defaults | {"wide_overflow": "wrap"} | CONFIGURATIONS[name]


def draw_inputs(config: dict, rng: np.random.Generator) -> dict[str, list]:
    """Return codes a, w and initial values of the wide accumulator."""
    wide = {"acc_bits": config["wide_acc_bits"], "overflow": config["wide_overflow"]}
    return icarus.draw_inputs(config | wide, rng)


def simulate(config: dict, inputs: dict[str, list]) -> dict[str, list]:
    """Return what the RTL computes: acc and the counts of the three places."""
    c, column_k = config["c"], config["column_k"]
    parameters = {
        "AW": config["a_bits"],
        "WW": config["w_bits"],
        "A_SIGNED": int(config["a_signed"]),
        "C": c,
        "P": config["p"],
        "ACC": config["acc_bits"],
        "OVERFLOW": icarus.OVERFLOW_CODES[config["overflow"]],
        "TREE": config["tree_bits"] or 0,
        "TREE_OVERFLOW": icarus.OVERFLOW_CODES[config["tree_overflow"] or config["overflow"]],
        "WIDE_ACC": config["wide_acc_bits"],
        "WIDE_OVERFLOW": icarus.OVERFLOW_CODES[config["wide_overflow"]],
        "ROWS": len(inputs["a"]),
        "COLS": len(inputs["w"]),
        "TILES": -(-config["k"] // column_k),
        "CHUNKS": -(-column_k // c),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for operand, bits in (("a", config["a_bits"]), ("w", config["w_bits"])):
            tiles = [tile for row in inputs[operand] for tile in _tiles(row, column_k)]
            icarus.write_operand(folder / f"{operand}.hex", tiles, bits, c)
        starts = [start for row in inputs["init"] for start in row]
        icarus.write_words(folder / "init.hex", starts, config["wide_acc_bits"])
        lines = icarus.run_testbench("two_level_testbench", SOURCES, parameters, folder)
    table = [[int(word, 16) for word in line.split()] for line in lines]
    return {
        "acc": [icarus.from_word(line[0], config["wide_acc_bits"]) for line in table],
        "overflows": [line[1] for line in table],
        "column_overflows": [line[2] for line in table],
        "tree_overflows": [line[3] for line in table],
    }


def _tiles(row: list[int], column_k: int) -> list[list[int]]:
    """Cut a row into tiles of column_k codes; zeros, which add nothing, fill the last."""
    padded = row + [0] * (-len(row) % column_k)
    return [padded[start : start + column_k] for start in range(0, len(padded), column_k)]


def write_golden() -> None:
    """Simulate every configuration and rewrite its golden file."""
    for name in CONFIGURATIONS:
        config = configuration(name)
        inputs = draw_inputs(config, np.random.default_rng(list(name.encode())))
        record = {"rtl_sha256": icarus.sources_digest(SOURCES), "config": config}
        icarus.write_record(GOLDEN / f"{name}.json", record | inputs | simulate(config, inputs))


if __name__ == "__main__":
    write_golden()
