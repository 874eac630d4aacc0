"""Time GEMMs on the CUDA GPU at hand and write rows for ``loraq-sim hw validate --measured``.

INT8 (`torch._int_mm`), FP8 (`torch._scaled_mm`) and FP16 products at the shapes of a shipped
model's layers, and the same FP16 product with an unfused low-rank branch of 16 bits (three
kernels: product, down-projection, up-projection added to the output). Each time is the median over
runs of a loop of calls between two CUDA events, so launches overlap as they do in a model.

    python benchmarks/measure_gpu_gemm.py --out h100.csv
    loraq-sim hw validate --measured h100.csv --hw h100

Formats that the GPU or the installed PyTorch does not have are left out, with a note.
"""

import argparse
import csv
import datetime
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import hwmodels

COLUMNS = (
    *("device", "kernel", "a_format", "w_format", "out_format", "M", "K", "N", "tile_mkn"),
    *("time_ms", "notes", "source", "confidence"),
)
# Substrings of the name CUDA reports, and the accelerator file they mean.
DEVICES = {
    "H200": "h200", "H100": "h100", "A100": "a100", "B200": "b200", "T4": "t4",
    "RTX 4090": "rtx4090", "RTX 5090": "sm120", "RTX PRO": "sm120", "MI300X": "mi300x",
    "MI350X": "mi350x", "MI355X": "mi355x",
}  # fmt: skip


def device_key(name: str) -> str:
    """The accelerator of a CUDA device name, or the name itself."""
    return next((key for part, key in DEVICES.items() if part in name), name)


def shapes_of(model: str, resolution: int) -> list[tuple[int, int, int]]:
    """Distinct (m, k, n) of the layers that SVDQuant quantizes, and one large square."""
    entries = hwmodels.load_model(model, resolution).entries
    shapes = {(e.m, e.k, e.n) for e in entries if e.precision == "split"}
    return [*sorted(shapes), (8192, 8192, 8192)]


def median_ms(call: Callable[[], object], repeats: int, calls: int) -> float:
    """Median milliseconds of one call."""
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def kernels(m: int, k: int, n: int, rank: int) -> dict[str, tuple[str, str, Callable]]:
    """Name of kernel: operand format, output format, call that prepares a call."""
    import torch

    def random(rows: int, columns: int) -> "torch.Tensor":
        return torch.randn(rows, columns, device="cuda", dtype=torch.float16)

    def fp16() -> Callable:
        a, w = random(m, k), random(n, k)
        return lambda: a @ w.t()

    def unfused() -> Callable:
        a, w = random(m, k), random(n, k)
        right, left = random(rank, k), random(n, rank)
        return lambda: torch.addmm(a @ w.t(), a @ right.t(), left.t())

    def int8() -> Callable:
        a, w = (torch.randint(-127, 128, (rows, k), device="cuda", dtype=torch.int8)
                for rows in (m, n))  # fmt: skip
        return lambda: torch._int_mm(a, w.t())

    def fp8() -> Callable:
        a, w = (random(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(a, w.t(), one, one, out_dtype=torch.bfloat16)

    return {
        "plain fp16": ("fp16", "fp16", fp16),
        f"unfused rank {rank} fp16 branch": ("fp16", "fp16", unfused),
        "plain int8": ("int8", "int32", int8),
        "plain fp8": ("fp8", "bf16", fp8),
    }


def measure(options: argparse.Namespace) -> list[dict]:
    """Rows of every shape and kernel that runs here."""
    import torch

    name = torch.cuda.get_device_name()
    said = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    rows = []
    for m, k, n in shapes_of(options.model, options.resolution):
        for kernel, (form, out, prepare) in kernels(m, k, n, options.rank).items():
            try:
                time_ms = median_ms(prepare(), options.repeats, options.calls)
            except (RuntimeError, AttributeError) as error:
                print(f"left out {kernel} {m}x{k}x{n}: {str(error)[:100]}", file=sys.stderr)
                continue
            row = {"device": device_key(name), "kernel": kernel, "a_format": form}
            row |= {"w_format": form, "out_format": out, "M": m, "K": k, "N": n, "tile_mkn": ""}
            row |= {"time_ms": f"{time_ms:.6g}", "notes": said, "confidence": "measured"}
            source = "benchmarks/measure_gpu_gemm.py, " + datetime.date.today().isoformat()
            rows.append(row | {"source": source})
            print(f"{kernel:32s} {m:6d} {k:6d} {n:6d} {time_ms:9.4f} ms", file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--model", default="pixart-sigma", help="model whose shapes are timed")
    parser.add_argument("--resolution", type=int, default=1024, help="512 or 1024 pixels")
    parser.add_argument("--rank", type=int, default=32, help="rank of the unfused branch")
    parser.add_argument("--repeats", type=int, default=20, help="timed loops")
    parser.add_argument("--calls", type=int, default=20, help="calls in a loop")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here; nothing was measured", file=sys.stderr)
        return 2
    rows = measure(options)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {options.out}: {len(rows)} rows", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
