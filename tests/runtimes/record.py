"""Write golden vectors: a few layers and what each installed runtime made of them.

    python tests/runtimes/record.py [--cases N] [--check N] [NAME ...]

`--check N` compares N layers with each runtime instead and writes nothing. Names are those of
`COMPARISONS`; without any, all whose modules import.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from comparisons import COMPARISONS, golden_record, our_codes  # noqa: E402
from layer_cases import layer_case  # noqa: E402

FOLDER = HERE.parent / "golden" / "runtimes"
SEED = 20261126


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--check", type=int, default=0)
    chosen = parser.parse_args()
    for name, comparison in COMPARISONS.items():
        if chosen.names and name not in chosen.names:
            continue
        if any(importlib.util.find_spec(module) is None for module in comparison.needs):
            say(f"{name}: {', '.join(comparison.needs)} not installed")
        elif chosen.check:
            say(f"{name}: {mismatches(comparison, chosen.check)}")
        else:
            write(name, comparison, chosen.cases)


def mismatches(comparison, count):
    """Outputs compared and outputs that differ, as a line."""
    rng = np.random.default_rng(SEED)
    outputs = wrong = 0
    for _ in range(count):
        case = layer_case(rng, out_dtype=comparison.out, **comparison.layers)
        codes = comparison.call(case)
        outputs += codes.size
        wrong += int((codes != our_codes(comparison, case)).sum())
    return f"{count} layers, {outputs} outputs, {wrong} mismatches"


def write(name, comparison, count):
    """One file of `count` small layers, all kinds among them."""
    rng = np.random.default_rng(SEED)
    kinds = ("ties", "near", "random", "extremes", "tiny", "near")
    layers = []
    for i in range(count):
        options = {"kind": kinds[i % len(kinds)], "sizes": (6, 12, 8)} | comparison.layers
        case = layer_case(rng, out_dtype=comparison.out, **options)
        layers.append(golden_record(case, comparison.call(case)))
    versions = {
        module: importlib.metadata.version(module.replace("_", "-")) for module in comparison.needs
    }
    record = {"comparison": name, "versions": versions, "layers": layers}
    path = FOLDER / f"{name.replace(' ', '_')}.json"
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    say(f"{path}: {path.stat().st_size} bytes")


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
