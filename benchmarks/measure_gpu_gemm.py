"""Time GEMMs and attention on the CUDA GPU at hand: rows for ``hw validate`` and ``hw fit``.

Shapes of every shipped model's layers in the precisions that PyTorch has: bf16, fp8
(`torch._scaled_mm`) and int8 (`torch._int_mm`); the bf16 product with an unfused low-rank branch of
16 bits (three kernels), and with the residual input (P of a part of the branch taken from X before
the main product); attention (`scaled_dot_product_attention`). First everything is computed on small
operands, on the CPU and then on the GPU, and compared with float64: a kernel that is wrong is not
timed. Each time is the median over runs of a loop of calls between two CUDA events, so launches
overlap as they do in a model and weights are warm where L2 holds them.

    python benchmarks/measure_gpu_gemm.py --check                 on the CPU alone, seconds
    python benchmarks/measure_gpu_gemm.py --out h100.csv          at most 8 minutes
    loraq-sim hw validate --measured h100.csv --hw h100
    loraq-sim hw fit h100.csv --hw h100 --kernel cublas

Attention goes to a file of its own beside it (``h100_attention.csv``). Formats that the GPU or the
installed PyTorch does not have are left out with a note; what the time did not allow is counted.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hwmodels

COLUMNS = (
    *("device", "family", "kernel", "a_format", "w_format", "out_format", "M", "K", "N"),
    *("tile_mkn", "time_ms", "weights", "launch", "notes", "source", "confidence"),
)
ATTENTION_COLUMNS = (
    *("device", "family", "kernel", "format", "heads", "queries", "keys", "head_size", "causal"),
    *("time_ms", "notes", "source", "confidence"),
)
# Substrings of the name CUDA reports, and the accelerator file they mean.
DEVICES = {
    "H200": "h200", "H100": "h100", "A100": "a100", "B200": "b200", "L40S": "l40s", "T4": "t4",
    "RTX 4090": "rtx4090", "RTX 5090": "sm120", "RTX PRO 6000": "rtx_pro_6000",
    "MI300X": "mi300x", "MI350X": "mi350x", "MI355X": "mi355x",
}  # fmt: skip
# What PyTorch calls each product: by these words families of kernels know their rows.
_CALLS = {"bf16": "torch matmul", "int8": "torch._int_mm", "fp8": "torch._scaled_mm"}
_CHECK_SIZES = (48, 64, 32)  # m, k, n: what _int_mm and _scaled_mm take
_TOLERANCE = {"bf16": 2e-2, "fp8": 2e-2, "int8": 0.0, "attention": 2e-2}
"""Largest error over the largest output: bf16 outputs have 8 bits; integers are exact. fp8 is
compared on the codes that were multiplied, so only its bf16 output rounds."""


def device_key(name: str) -> str:
    """The accelerator of a CUDA device name, or the name itself."""
    return next((key for part, key in DEVICES.items() if part in name), name)


def shapes_of(resolution: int) -> list[tuple[int, int, int]]:
    """Distinct (m, k, n) of split layers of all shipped models, and squares; small ones first."""
    shapes = {(s, s, s) for s in (1024, 2048, 4096, 8192)}
    for name in hwmodels.list_models():
        for entry in hwmodels.load_model(name, resolution).entries:
            if entry.op == "gemm" and entry.precision == "split":
                shapes.add((entry.m, entry.k, entry.n))
    shapes |= {(m, k, n) for m in (1, 16, 64, 256) for k, n in ((4096, 4096), (3072, 12288))}
    return sorted(shapes, key=lambda s: s[0] * s[1] * s[2])


def attention_of(resolution: int) -> list[tuple[int, int, int, int]]:
    """Distinct (heads, queries, keys, head size) of all shipped models."""
    found = set()
    for name in hwmodels.list_models():
        for entry in hwmodels.load_model(name, resolution).entries:
            if entry.op == "attention":
                found.add((entry.batch, entry.m, entry.n, entry.k))
    return sorted(found, key=lambda s: s[0] * s[1] * s[2])


Prepared = tuple[Callable[[], Any], Callable[[], Any]]
"""A call, and its result in float64 on the CPU."""


def kernels(m: int, k: int, n: int, rank: int, device: str) -> dict[str, tuple[str, str, Any]]:
    """Name of kernel: operand format, output format, function that prepares call and reference."""
    import torch

    def random(rows: int, columns: int) -> Any:
        generator = torch.Generator(device="cpu").manual_seed(rows * 7919 + columns)
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
        return values.to(device=device, dtype=torch.bfloat16)

    def wide(x: Any) -> Any:
        return x.cpu().double()

    def bf16() -> Prepared:
        a, w = random(m, k), random(n, k)
        return lambda: a @ w.t(), lambda: wide(a) @ wide(w).t()

    def unfused() -> Prepared:
        a, w, right, left = random(m, k), random(n, k), random(rank, k), random(n, rank)
        return (
            lambda: torch.addmm(a @ w.t(), a @ right.t(), left.t()),
            lambda: wide(a) @ wide(w).t() + wide(a) @ wide(right).t() @ wide(left).t(),
        )

    def residual() -> Prepared:
        # X loses what V carries already: D = X - P V, as the residual input does before main.
        a, w, v, left = random(m, k), random(n, k), random(rank, k) / k**0.5, random(n, rank)

        def call() -> Any:
            p = a @ v.t()
            return torch.addmm((a - p @ v) @ w.t(), p, left.t())

        def reference() -> Any:
            p = wide(a) @ wide(v).t()
            return (wide(a) - p @ wide(v)) @ wide(w).t() + p @ wide(left).t()

        return call, reference

    def int8() -> Prepared:
        generator = torch.Generator(device="cpu").manual_seed(m + n)
        a, w = (
            torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8).to(device)
            for rows in (m, n)
        )
        return lambda: torch._int_mm(a, w.t()), lambda: wide(a) @ wide(w).t()

    def fp8() -> Prepared:
        a, w = (random(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
        one = torch.ones((), device=device)
        return (
            lambda: torch._scaled_mm(a, w.t(), one, one, out_dtype=torch.bfloat16),
            lambda: wide(a.float()) @ wide(w.float()).t(),
        )

    return {
        "plain bf16": ("bf16", "bf16", bf16),
        f"unfused rank {rank} bf16 branch": ("bf16", "bf16", unfused),
        f"unfused, residual input, rank {rank} bf16 branch": ("bf16", "bf16", residual),
        "plain int8": ("int8", "int32", int8),
        "plain fp8": ("fp8", "bf16", fp8),
    }


def attention(heads: int, queries: int, keys: int, size: int, device: str) -> Prepared:
    """One call of attention in bf16, and its reference."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(heads + queries + keys)

    def random(length: int) -> Any:
        values = torch.randn(1, heads, length, size, generator=generator, dtype=torch.float32)
        return values.to(device=device, dtype=torch.bfloat16)

    q, k, v = random(queries), random(keys), random(keys)

    def reference() -> Any:
        scores = q.cpu().double() @ k.cpu().double().transpose(-1, -2) / size**0.5
        return torch.softmax(scores, dim=-1) @ v.cpu().double()

    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), reference


def error_of(call: Callable[[], Any], reference: Callable[[], Any]) -> float:
    """Largest error of a call over its largest output."""
    expected = reference()
    difference = (call().cpu().double() - expected).abs().max()
    return float(difference / expected.abs().max())


def check(rank: int, device: str) -> dict[str, float]:
    """Error of every kernel that runs on `device`; raises where one is wrong."""
    m, k, n = _CHECK_SIZES
    errors = {}
    for name, (form, _, prepare) in kernels(m, k, n, min(rank, 16), device).items():
        try:
            errors[name] = error_of(*prepare())
        except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
            print(f"not on {device}: {name}: {str(error)[:90]}", file=sys.stderr)
            continue
        if errors[name] > _TOLERANCE[form]:
            raise SystemExit(f"{name} is wrong on {device}: error {errors[name]:.2g}")
    errors["attention"] = error_of(*attention(2, 48, 40, 32, device))
    if errors["attention"] > _TOLERANCE["attention"]:
        raise SystemExit(f"attention is wrong on {device}: error {errors['attention']:.2g}")
    return errors


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


def clock_mhz() -> str:
    """Clock of the multiprocessors as nvidia-smi reports it, and the driver; empty without it."""
    query = "clocks.sm,driver_version"
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    clock, _, driver = said.splitlines()[0].partition(",")
    return f"{clock.strip()} MHz, driver {driver.strip()}"


def measure(
    options: argparse.Namespace, until: float, name: str, device: str = "cuda"
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """(is attention, row) of every shape and kernel that runs on `device`, until the time is up.

    `name` is what the maker calls the device.
    """
    import torch

    said = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    about = {"device": device_key(name), "confidence": "measured"}
    about["source"] = "benchmarks/measure_gpu_gemm.py, " + datetime.date.today().isoformat()
    left_out = 0
    works: list[tuple[str, tuple[int, ...]]] = [
        ("attention", shape) for shape in attention_of(options.resolution)
    ]
    works += [("gemm", shape) for shape in shapes_of(options.resolution)]
    for what, shape in works:
        if time.monotonic() > until:
            left_out += 1
            continue
        if what == "attention":
            heads, queries, keys, size = shape
            time_ms = median_ms(attention(*shape, device)[0], options.repeats, options.calls)
            row = {"family": "", "kernel": "scaled_dot_product_attention", "format": "bf16"}
            row |= {"heads": heads, "queries": queries, "keys": keys, "head_size": size}
            row |= {"causal": "no", "time_ms": f"{time_ms:.6g}", "notes": f"{said}, {clock_mhz()}"}
            yield True, about | row
            continue
        m, k, n = shape
        for kernel, (form, out, prepare) in kernels(m, k, n, options.rank, device).items():
            if kernel.startswith("plain int8") and m <= 16:
                continue  # _int_mm takes more than 16 rows.
            try:
                time_ms = median_ms(prepare()[0], options.repeats, options.calls)
            except (RuntimeError, AttributeError, ValueError) as error:
                print(f"left out {kernel} {m}x{k}x{n}: {str(error)[:100]}", file=sys.stderr)
                continue
            row = {"family": "", "kernel": kernel, "a_format": form, "w_format": form}
            row |= {"out_format": out, "M": m, "K": k, "N": n, "tile_mkn": ""}
            row |= {"time_ms": f"{time_ms:.6g}", "weights": "warm", "launch": "stream"}
            yield False, about | row | {"notes": f"{_CALLS[form]}, {said}, {clock_mhz()}"}
            print(f"{kernel:32s} {m:6d} {k:6d} {n:6d} {time_ms:9.4f} ms", file=sys.stderr)
    if left_out:
        print(f"left out {left_out} of {len(works)} shapes: the time was up", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--check", action="store_true", help="only compare kernels, on the CPU")
    parser.add_argument("--resolution", type=int, default=1024, help="512 or 1024 pixels")
    parser.add_argument("--rank", type=int, default=32, help="rank of branch and residual input")
    parser.add_argument("--repeats", type=int, default=7, help="timed loops")
    parser.add_argument("--calls", type=int, default=10, help="calls in a loop")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long")
    options = parser.parse_args()
    import torch

    until = time.monotonic() + 60 * options.minutes - 15  # A shape may take seconds.
    for name, error in check(options.rank, "cpu").items():
        print(f"cpu {name}: error {error:.2g}", file=sys.stderr)
    if options.check:
        return 0
    if options.out is None:
        parser.error("--out is needed to measure")
    if not torch.cuda.is_available():
        print("no CUDA GPU here; nothing was measured", file=sys.stderr)
        return 2
    check(options.rank, "cuda")
    rows = list(measure(options, until, torch.cuda.get_device_name()))
    beside = options.out.with_name(f"{options.out.stem}_attention.csv")
    for path, columns, is_attention in (
        (options.out, COLUMNS, False),
        (beside, ATTENTION_COLUMNS, True),
    ):
        own = [row for kind, row in rows if kind is is_attention]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(own)
        print(f"wrote {path}: {len(own)} rows", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
