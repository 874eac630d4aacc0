"""Speed of the emulated GEMM; the command line prints the same table anywhere.

python benchmarks/emulator_speed.py        # prints it, writes benchmarks/emulator_speed.md
"""

import os
import subprocess
import sys
from pathlib import Path

# Before NumPy loads in the child: peers use one thread, as the emulator does.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

if __name__ == "__main__":
    out = Path(__file__).with_suffix(".md")
    call = ["loraq-sim", "bench", "emulator", "--out", str(out), *sys.argv[1:]]
    sys.exit(subprocess.call(call))
