"""Run ups.sv, srs.sv and multiplier.sv in Icarus Verilog, and write their golden vectors.

``python tests/rtl/requantize_rtl.py`` rewrites ``tests/golden/requantize``.
"""

import tempfile
from pathlib import Path

import icarus
import numpy as np

GOLDEN = icarus.GOLDEN / "requantize"
SOURCES = ("ups.sv", "srs.sv", "multiplier.sv", "requantize_testbench.sv")
VECTORS = 250

# name: input of the upshift, its accumulator, output of the requantizations.
CONFIGURATIONS = {
    "int8_acc32_to_int8": {"in_bits": 8, "ups_acc_bits": 32, "out_bits": 8},
    "uint8_acc32_to_uint8": {
        "in_bits": 8,
        "in_signed": False,
        "ups_acc_bits": 32,
        "out_bits": 8,
        "out_signed": False,
    },
    "int16_acc32_to_int16": {"in_bits": 16, "ups_acc_bits": 32, "out_bits": 16},
    "uint16_acc64_to_uint16": {
        "in_bits": 16,
        "in_signed": False,
        "ups_acc_bits": 64,
        "out_bits": 16,
        "out_signed": False,
    },
    "int32_acc64_to_int32": {"in_bits": 32, "ups_acc_bits": 64, "out_bits": 32},
    "uint32_acc64_to_uint32": {
        "in_bits": 32,
        "in_signed": False,
        "ups_acc_bits": 64,
        "out_bits": 32,
        "out_signed": False,
    },
    "int4_acc20_to_int4": {"in_bits": 4, "ups_acc_bits": 20, "out_bits": 4},
}
# Width of each field; those marked True are two's complement.
FIELDS = {
    "up_shift": (6, False),
    "wide": (64, True),
    "acc": (32, True),
    "factor": (32, True),
    "exponent": (7, True),
    "shift": (6, False),
}
RESULTS = ("ups_wrap", "ups_after", "ups_before", "srs", "twice", "once")


def configuration(name: str) -> dict:
    """Return one configuration with its defaults."""
    return {"in_signed": True, "out_signed": True} | CONFIGURATIONS[name]


def draw_inputs(config: dict, rng: np.random.Generator) -> dict[str, list]:
    """Return fields of VECTORS vectors: random magnitudes, extremes and ties."""
    bits = {"x": (config["in_bits"], config["in_signed"])}
    bits |= {"zero_point": (config["out_bits"], config["out_signed"])} | FIELDS
    inputs = {name: [_draw(rng, *width) for _ in range(VECTORS)] for name, width in bits.items()}
    inputs["shift"] = [int(s) for s in rng.integers(1, 63, VECTORS)]
    # The multiplier without a sign is that of the single rounding; gemmlowp takes both.
    inputs["factor"] = [
        f if i % 8 == 0 else max(abs(f) % 2**31, 1) for i, f in enumerate(inputs["factor"])
    ]
    # x * 2**exponent must stay within int32.
    inputs["exponent"] = [
        int(rng.integers(-31, min(32 - acc.bit_length(), 31))) if acc.bit_length() < 32 else -3
        for acc in inputs["acc"]
    ]
    inputs["settings"] = [
        {
            "shift": int(rng.integers(-4, 60)),
            "rounding": list(icarus.ROUNDING_CODES)[i % 10],
            "saturation": list(icarus.SATURATION_CODES)[i // 10 % 3],
        }
        for i in range(VECTORS)
    ]
    # Half of the shifts leave a value near the output range, where ties and limits are.
    for i in range(0, VECTORS, 2):
        need = inputs["wide"][i].bit_length() - config["out_bits"]
        inputs["settings"][i]["shift"] = min(max(need + int(rng.integers(0, 3)), -4), 59)
        need = (inputs["acc"][i] * inputs["factor"][i]).bit_length() - config["out_bits"]
        inputs["shift"][i] = min(max(need + int(rng.integers(0, 3)), 1), 62)
    return inputs


def _draw(rng: np.random.Generator, bits: int, signed: bool) -> int:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    kind = rng.integers(4)
    if kind == 0:
        return int(rng.choice([low, high, 0, 1, low + 1, high - 1]))
    # A random magnitude, or one with a single or double bit, which makes ties.
    width = int(rng.integers(1, bits + 1))
    value = int(rng.integers(0, 2**width, dtype=np.uint64)) if kind < 3 else 3 << (width - 1)
    return min(max(-value if signed and rng.random() < 0.5 else value, low), high)


def simulate(config: dict, inputs: dict[str, list]) -> dict[str, list]:
    """Return what the RTL computes, one list per result."""
    parameters = {
        "IN": config["in_bits"],
        "IN_SIGNED": int(config["in_signed"]),
        "UPS_ACC": config["ups_acc_bits"],
        "OUT": config["out_bits"],
        "OUT_SIGNED": int(config["out_signed"]),
        "VECTORS": len(inputs["x"]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        widths = {field: width for field, (width, _) in FIELDS.items()}
        widths |= {"x": config["in_bits"], "zero_point": config["out_bits"]}
        for field, width in widths.items():
            icarus.write_words(folder / f"{field}.hex", inputs[field], width)
        words = [icarus.setting_word(setting) for setting in inputs["settings"]]
        icarus.write_words(folder / "settings.hex", words, 16)
        lines = icarus.run_testbench("requantize_testbench", SOURCES, parameters, folder)
    table = [[int(word, 16) for word in line.split()] for line in lines]
    results = {}
    for name, column in zip(RESULTS, zip(*table, strict=True), strict=True):
        is_ups = name.startswith("ups")
        bits = config["ups_acc_bits"] if is_ups else config["out_bits"]
        signed = is_ups or config["out_signed"]
        results[name] = [icarus.from_word(word, bits) if signed else word for word in column]
    return results


def write_golden() -> None:
    """Simulate every configuration and rewrite its golden file."""
    for name in CONFIGURATIONS:
        config = configuration(name)
        inputs = draw_inputs(config, np.random.default_rng(list(name.encode())))
        record = {"rtl_sha256": icarus.sources_digest(SOURCES), "config": config}
        icarus.write_record(GOLDEN / f"{name}.json", record | inputs | simulate(config, inputs))


if __name__ == "__main__":
    write_golden()
