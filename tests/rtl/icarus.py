"""Run the MAC and SRS of this folder in a simulator, and write the golden vectors.

``python tests/rtl/icarus.py`` simulates every configuration and rewrites ``tests/golden``. Inputs
are drawn from a seeded generator with many extreme codes; outputs come from the simulator alone.
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
GOLDEN = FOLDER.parent / "golden"
SOURCES = ("mac.sv", "srs.sv", "testbench.sv")
# Which simulator runs the testbenches: icarus, or verilator, which compiles for seconds.
SIMULATOR = "icarus"
LIBRARY = None
OVERFLOW_CODES = {"wrap": 0, "saturate": 1, "saturate_symmetric": 2}
SATURATION_CODES = {"none": 0, "saturate": 1, "symmetric": 3}
ROUNDING_CODES = {
    "floor": 0,
    "ceil": 1,
    "symmetric_floor": 2,
    "symmetric_ceil": 3,
    "negative_inf": 8,
    "positive_inf": 9,
    "symmetric_zero": 10,
    "symmetric_inf": 11,
    "conv_even": 12,
    "conv_odd": 13,
}
ROWS, COLS = 21, 10

# name: operand bits, accumulator, output. Defaults: signed operands, one product per add, one
# accumulator, exact tree, signed 8-bit output. Shifts are spread over the rounding modes.
CONFIGURATIONS = {
    "aie2_int8": {"acc_bits": 32, "c": 8, "k": 64, "shifts": [11, 12]},
    "wrap_acc16": {"acc_bits": 16, "k": 24, "shifts": [0, 5, 9]},
    "wrap_acc20_p4": {"acc_bits": 20, "c": 2, "p": 4, "k": 49, "shifts": [4, 10]},
    "saturate_acc16": {"acc_bits": 16, "overflow": "saturate", "k": 24, "shifts": [1, 8]},
    "saturate_acc18_c2": {
        "acc_bits": 18,
        "overflow": "saturate",
        "c": 2,
        "k": 41,
        "shifts": [7, 10],
    },
    "saturate_acc17_c4_p2": {
        "acc_bits": 17,
        "overflow": "saturate",
        "c": 4,
        "p": 2,
        "k": 50,
        "shifts": [8, 9],
    },
    "saturate_acc20_c16": {
        "acc_bits": 20,
        "overflow": "saturate",
        "c": 16,
        "k": 130,
        "out_bits": 16,
        "shifts": [3, 6],
    },
    "symmetric_acc17_c3": {
        "acc_bits": 17,
        "overflow": "saturate_symmetric",
        "c": 3,
        "k": 31,
        "shifts": [6, 9],
    },
    "symmetric_acc15_p3": {
        "acc_bits": 15,
        "overflow": "saturate_symmetric",
        "p": 3,
        "k": 22,
        "shifts": [2, 7],
    },
    "int4_acc8": {
        "a_bits": 4,
        "w_bits": 4,
        "acc_bits": 8,
        "overflow": "saturate",
        "k": 30,
        "out_bits": 4,
        "shifts": [0, 3],
    },
    "int6_acc13_c5_p3": {
        "a_bits": 6,
        "w_bits": 6,
        "acc_bits": 13,
        "overflow": "saturate",
        "c": 5,
        "p": 3,
        "k": 47,
        "out_bits": 6,
        "shifts": [5, 7],
    },
    "int8_by_int4_acc14": {
        "w_bits": 4,
        "acc_bits": 14,
        "overflow": "saturate",
        "c": 8,
        "k": 60,
        "shifts": [4, 6],
    },
    "unsigned_acc20_c8": {
        "a_signed": False,
        "acc_bits": 20,
        "overflow": "saturate",
        "c": 8,
        "k": 72,
        "out_signed": False,
        "shifts": [9, 11],
    },
    "unsigned_both_acc22_c4": {
        "a_signed": False,
        "w_signed": False,
        "acc_bits": 22,
        "overflow": "saturate",
        "c": 4,
        "k": 90,
        "shifts": [10, 13],
    },
    "int16_by_int8_acc40_p2": {
        "a_bits": 16,
        "acc_bits": 40,
        "c": 4,
        "p": 2,
        "k": 50,
        "out_bits": 16,
        "shifts": [12, 20],
    },
    "int16_by_uint4_acc24": {
        "a_bits": 16,
        "w_bits": 4,
        "w_signed": False,
        "acc_bits": 24,
        "overflow": "saturate_symmetric",
        "c": 2,
        "k": 61,
        "shifts": [9, 15],
    },
    "tree15_wrap_acc20": {
        "acc_bits": 20,
        "overflow": "saturate",
        "c": 8,
        "tree_bits": 15,
        "tree_overflow": "wrap",
        "k": 70,
        "shifts": [8, 11],
    },
    "tree14_saturate_acc16_p4": {
        "acc_bits": 16,
        "c": 4,
        "p": 4,
        "tree_bits": 14,
        "tree_overflow": "saturate_symmetric",
        "k": 60,
        "shifts": [6, 8],
    },
    "saturate_acc8_c64_p5": {
        "acc_bits": 8,
        "overflow": "saturate",
        "c": 64,
        "p": 5,
        "k": 330,
        "shifts": [-4, 1],
    },
    "saturate_acc32_init": {
        "acc_bits": 32,
        "overflow": "saturate",
        "k": 12,
        "out_bits": 32,
        "shifts": [-2, 0, 2],
    },
    "wrap_acc48_p2": {"acc_bits": 48, "p": 2, "k": 12, "out_bits": 16, "shifts": [31, 36]},
    "saturate_acc64_init": {
        "acc_bits": 64,
        "overflow": "saturate",
        "c": 2,
        "k": 12,
        "out_bits": 32,
        "shifts": [32, 59],
    },
}
DEFAULTS = {
    "a_bits": 8,
    "w_bits": 8,
    "a_signed": True,
    "w_signed": True,
    "overflow": "wrap",
    "c": 1,
    "p": 1,
    "tree_bits": None,
    "tree_overflow": None,
    "out_bits": 8,
    "out_signed": True,
}


def configuration(name: str) -> dict:
    """Return one configuration with its defaults and SRS settings (all ten rounding modes)."""
    config = DEFAULTS | CONFIGURATIONS[name]
    shifts, saturations = config.pop("shifts"), list(SATURATION_CODES)
    config["srs"] = [
        {
            "shift": shifts[i % len(shifts)],
            "rounding": rounding,
            "saturation": saturations[(i + len(name)) % 3],
        }
        for i, rounding in enumerate(ROUNDING_CODES)
    ]
    return config


def draw_inputs(config: dict, rng: np.random.Generator) -> dict[str, list]:
    """Return codes a, w and initial values; rows mix random codes, extremes and constants."""
    top = 2 ** config["a_bits"]
    low = -top // 2 if config["a_signed"] else 0
    a = draw_codes(rng, ROWS, config["k"], low, low + top - 1)
    half = 2 ** (config["w_bits"] - 1)
    least = -half if config["w_signed"] else 0
    w = draw_codes(rng, COLS, config["k"], least, least + 2 * half - 1)
    limit = 2 ** (config["acc_bits"] - 1) - 1
    lowest = -limit if config["overflow"] == "saturate_symmetric" else -limit - 1
    starts = [0, 0, 0, 1, -1, limit, lowest, limit // 2, lowest + 1]
    init = [[starts[rng.integers(len(starts))] for _ in range(COLS)] for _ in range(ROWS)]
    return {"a": a.tolist(), "w": w.tolist(), "init": init}


def draw_codes(rng: np.random.Generator, rows: int, k: int, low: int, high: int) -> np.ndarray:
    """Return codes (rows, k): extremes, alternation, a ramp, then random and extreme mixed."""
    codes = rng.integers(low, high + 1, (rows, k))
    codes[0], codes[1], codes[2] = low, high, np.where(np.arange(k) % 2, low, high)
    codes[3] = np.arange(k) % (high - low + 1) + low
    extreme = rng.choice([low, high], (rows, k))
    codes[4::2] = np.where(rng.random((rows, k)) < 0.5, codes, extreme)[4::2]
    return codes


def simulate(config: dict, inputs: dict[str, list]) -> dict[str, list]:
    """Return what the RTL computes: acc, overflows, tree_overflows, and out per SRS setting."""
    rows, cols = len(inputs["a"]), len(inputs["w"])
    chunks = -(-config["k"] // config["c"])
    parameters = {
        "AW": config["a_bits"],
        "WW": config["w_bits"],
        "A_SIGNED": int(config["a_signed"]),
        "W_SIGNED": int(config["w_signed"]),
        "C": config["c"],
        "P": config["p"],
        "ACC": config["acc_bits"],
        "OVERFLOW": OVERFLOW_CODES[config["overflow"]],
        "TREE": config["tree_bits"] or 0,
        "TREE_OVERFLOW": OVERFLOW_CODES[config["tree_overflow"] or config["overflow"]],
        "OUT": config["out_bits"],
        "OUT_SIGNED": int(config["out_signed"]),
        "ROWS": rows,
        "COLS": cols,
        "CHUNKS": chunks,
        "SETTINGS": len(config["srs"]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_operand(folder / "a.hex", inputs["a"], config["a_bits"], config["c"])
        write_operand(folder / "w.hex", inputs["w"], config["w_bits"], config["c"])
        starts = [start for row in inputs["init"] for start in row]
        write_words(folder / "init.hex", starts, config["acc_bits"])
        write_words(folder / "settings.hex", [setting_word(s) for s in config["srs"]], 16)
        lines = run_testbench("testbench", SOURCES, parameters, folder)
    return _parse(lines, config)


def run_testbench(
    top: str, sources: tuple[str, ...], parameters: dict[str, int], folder: Path
) -> list[str]:
    """Build and run a testbench in `folder`, which holds its hex files; return its result lines."""
    paths = [str(FOLDER / source) for source in sources]
    if SIMULATOR == "verilator":
        flags = [f"-G{key}={value}" for key, value in parameters.items()]
        build = ["verilator", "--binary", "--timing", "-Wno-lint", "-Wno-TIMESCALEMOD"]
        build += ["--top-module", top]
        start = ["obj_dir/bench"]
        if LIBRARY is not None:
            shutil.copytree(LIBRARY, folder / "obj_dir", dirs_exist_ok=True)
        # The compiler's notes may hold any word: only its exit status counts.
        built = subprocess.run(
            [*build, "-o", "bench", *flags, *paths],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise RuntimeError(f"verilator failed:\n{built.stdout}{built.stderr}")
    else:
        flags = [f"-P{top}.{key}={value}" for key, value in parameters.items()]
        build = ["iverilog", "-g2012", "-Wall", "-s", top, "-o", "bench.vvp"]
        start = ["vvp", "-n", "bench.vvp"]
        run_tool([*build, *flags, *paths], folder)
    run_tool(start, folder)
    return (folder / "result.hex").read_text().splitlines()


def run_tool(command: list[str], folder: Path) -> None:
    """Run one tool of the simulator; RuntimeError with what it said if anything went wrong."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or "error" in done.stderr or "WARNING" in done.stdout:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def setting_word(srs: dict) -> int:
    """Return saturation, rounding and shift of an SRS packed in 16 bits."""
    saturation, rounding = SATURATION_CODES[srs["saturation"]], ROUNDING_CODES[srs["rounding"]]
    return saturation << 14 | rounding << 10 | srs["shift"] % 128


def write_operand(path: Path, codes: list[list[int]], bits: int, c: int) -> None:
    """Write rows of codes in words of c codes, the first in the low bits, zeros at row ends."""
    words = []
    for row in codes:
        padded = row + [0] * (-len(row) % c)
        for start in range(0, len(padded), c):
            chunk = padded[start : start + c]
            words.append(sum((code % 2**bits) << (bits * i) for i, code in enumerate(chunk)))
    write_words(path, words, bits * c)


def write_words(path: Path, words: list[int], bits: int) -> None:
    """Write words of `bits` bits as $readmemh hex, two's complement, one a line."""
    digits = -(-bits // 4)
    path.write_text("".join(f"{word % 2**bits:0{digits}x}\n" for word in words))


def _parse(lines: list[str], config: dict) -> dict[str, list]:
    table = [[int(word, 16) for word in line.split()] for line in lines]
    out_bits, signed = config["out_bits"], config["out_signed"]
    return {
        "acc": [from_word(line[0], config["acc_bits"]) for line in table],
        "overflows": [line[1] for line in table],
        "tree_overflows": [line[2] for line in table],
        "out": [
            [from_word(word, out_bits) if signed else word for word in column]
            for column in zip(*(line[3:] for line in table), strict=True)
        ],
    }


def from_word(word: int, bits: int) -> int:
    """Return the two's complement value of a word."""
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def sources_digest(sources: tuple[str, ...] = SOURCES) -> str:
    """Return the sha256 of the Verilog sources, which golden files carry."""
    return hashlib.sha256(b"".join((FOLDER / s).read_bytes() for s in sources)).hexdigest()


def write_record(path: Path, record: dict) -> None:
    """Write a golden file, one list per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_golden() -> None:
    """Simulate every configuration and rewrite its golden file, one list per line."""
    for name in CONFIGURATIONS:
        config = configuration(name)
        # Seeded by name, so that a new configuration leaves the other files as they are.
        inputs = draw_inputs(config, np.random.default_rng(list(name.encode())))
        record = {"rtl_sha256": sources_digest(), "config": config}
        record |= inputs | simulate(config, inputs)
        write_record(GOLDEN / f"{name}.json", record)


if __name__ == "__main__":
    write_golden()
