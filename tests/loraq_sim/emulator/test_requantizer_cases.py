"""Random layers with every requantizer, operands of every width and zero points, against integers.

50,000 cases; a seeded sample of 2 % runs with every test run, all of them where
``LORAQ_SIM_ALL_CASES=1``. The oracle knows Python integers and Fractions only.
"""

import math
import os
from fractions import Fraction

import numpy as np

from loraq_sim.emulator.gemm import emulate_gemm_requantize
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.requantizers import (
    REQUANTIZE_RULES,
    DoubleScale,
    FixedPoint,
    FloatSteps,
    NvdlaStages,
    Srs,
    XmosTransform,
)

CASES = 50_000
SAMPLE = 1_000 if os.environ.get("LORAQ_SIM_ALL_CASES") != "1" else CASES
DTYPES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1)}
DEPTHS = (0, 1, 2, 3, 7, 8, 16, 31, 64)


def up(x):
    return math.floor(x + Fraction(1, 2))


def away(x):
    whole = math.floor(abs(x) + Fraction(1, 2))
    return whole if x >= 0 else -whole


def clip(x, lo, hi):
    return min(max(x, lo), hi)


def accumulated(products, start, mac):
    """One accumulator: chunks added in order, each add wrapped or clamped."""
    half = 1 << (mac.acc_bits - 1)

    def held(x):
        if mac.overflow == "wrap":
            return (x + half) % (2 * half) - half
        return clip(x, -half + (mac.overflow == "saturate_symmetric"), half - 1)

    total = start
    for first in range(0, len(products), mac.products_per_add):
        total = held(total + sum(products[first : first + mac.products_per_add]))
    return total


def single(x):
    """A Fraction rounded to float32, ties to even."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(x / unit) * unit


def requantized(x, draw):
    """What the drawn requantizer makes of one accumulator, before zero point and clamp."""
    rule, p = draw["rule"], draw["parameters"]
    if rule == "srs":
        return round(Fraction(x, 2 ** p["shift"]))
    if rule == "float":
        return round(single(single(Fraction(x)) * Fraction(float(p["scale"]))))
    if rule == "double":
        return away(Fraction(float(np.float64(x) * np.float64(p["scale"]))))
    if rule == "nvdla":
        x = clip(away(Fraction(x, 2 ** p["truncate"])), -(2**31), 2**31 - 1)
        x = clip(
            away(Fraction((x + p["bias"]) * p["multiplier"], 2 ** p["shift"])), -(2**31), 2**31 - 1
        )
        return clip(x, -(2**16), 2**16 - 1)
    if rule == "xmos":
        v = clip(up(Fraction(x, 2 ** p["initial_shift"])), -32767, 32767)
        v = clip(up(Fraction(v * p["multiplier"], 2**14)), -32767, 32767)
        v = clip(v + p["bias"], -32767, 32767)
        return up(Fraction(v, 256))
    m, s = p["multiplier"], p["shift"]
    if rule == "single_rounding":
        return clip(up(Fraction(x * m, 2**s)), -(2**31), 2**31 - 1)
    if rule == "reduced_multiplier":
        return clip(
            up(Fraction(x * min((m + 2**15) >> 16, 32767), 2 ** (s - 16))), -(2**31), 2**31 - 1
        )
    high = up(Fraction(x * m, 2**31))
    return (away if rule == "gemmlowp" else up)(Fraction(high, 2 ** (s - 31)))


def drawn_rule(rng, reach):
    """A requantizer for sums of up to `reach` and what the oracle needs of it."""
    rule = str(rng.choice(REQUANTIZE_RULES))
    bits = int(rng.choice([8, 16])) if rule != "xmos" else 8
    signed = bool(rng.integers(2)) or rule in ("xmos", "nvdla")
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    plain = rule in ("srs", "nvdla", "xmos")
    zero = 0 if plain else int(rng.integers(lo, hi + 1))
    clamp = None
    if rule != "srs" and rng.integers(3) == 0:
        clamp = tuple(sorted(int(v) for v in rng.integers(lo, hi + 1, 2)))
    output = {"out_bits": bits, "signed": signed, "clamp": clamp, "zero_point": zero}
    # From saturating scales to ones that leave nothing.
    fall = int(rng.integers(0, max(reach.bit_length(), 1) + 3))
    if rule == "srs":
        parameters = {"shift": fall}
        kind = Srs(shift=fall, out_bits=bits, signed=signed)
    elif rule in ("float", "double"):
        scale = 2.0**-fall * (1.0 if rng.integers(2) else rng.uniform(0.5, 1.5))
        scale = np.float32(scale) if rule == "float" else scale
        parameters = {"scale": scale}
        steps = (("multiply", scale),)
        kind = (
            FloatSteps(steps=steps, **output)
            if rule == "float"
            else DoubleScale(scale=scale, **output)
        )
    elif rule == "nvdla":
        truncate = int(rng.integers(0, 12))
        parameters = {
            "truncate": truncate,
            "bias": int(rng.integers(-5000, 5001)),
            "multiplier": int(rng.integers(-(2**15), 2**15)),
            "shift": int(rng.integers(0, 40)),
        }
        kind = NvdlaStages(**parameters, **output)
    elif rule == "xmos":
        parameters = {
            "initial_shift": int(rng.integers(0, 20)),
            "multiplier": int(rng.integers(-(2**15), 2**15)),
            "bias": int(rng.integers(-(2**15), 2**15)),
        }
        kind = XmosTransform(**parameters, clamp=clamp)
    else:
        multiplier = 2**30 if rng.integers(3) == 0 else int(rng.integers(2**30, 2**31))
        parameters = {"multiplier": multiplier, "shift": 31 + fall}
        kind = FixedPoint(by=rule, **parameters, **output)
    lo, hi = (lo, hi) if clamp is None else clamp
    return kind, {"rule": rule, "parameters": parameters, "zero": zero, "lo": lo, "hi": hi}


def drawn_case(seed):
    rng = np.random.default_rng([20261126, seed])
    kind = str(rng.choice(list(DTYPES)))
    w_kind = str(rng.choice(["int8", "uint8"]))
    k, m, n = int(rng.choice(DEPTHS)), 2, 3
    (a_lo, a_hi), (w_lo, w_hi) = DTYPES[kind], DTYPES[w_kind]
    a, w = (
        (rng.integers(lo, hi + 1, shape) if rng.integers(4) else rng.choice([lo, hi], shape))
        for lo, hi, shape in ((a_lo, a_hi, (m, k)), (w_lo, w_hi, (n, k)))
    )
    zeros = {
        "a_zero": rng.integers(a_lo, a_hi + 1, () if rng.integers(2) else (m,)),
        "w_zero": rng.integers(w_lo, w_hi + 1, () if rng.integers(2) else (n,)),
        "zero_point": str(rng.choice(["initial", "after"])),
    }
    narrow = {"overflow": "saturate", "acc_bits": int(rng.integers(18, 33))}
    mac = MacArray(
        **({"acc_bits": 32} if rng.integers(3) else narrow),
        products_per_add=int(rng.choice([1, 2, 4, 8])),
    )
    bias = rng.integers(-2000, 2001, n)
    return rng, (a.astype(kind), w.astype(w_kind)), zeros, mac, bias


def test_random_layers_are_what_integers_and_fractions_make_of_them():
    chosen = range(CASES) if SAMPLE == CASES else range(0, CASES, CASES // SAMPLE)
    seen, refused = set(), 0
    for seed in chosen:
        rng, (a, w), zeros, mac, bias = drawn_case(seed)
        exact = np.zeros((len(a), len(w)), object)
        after = zeros["zero_point"] == "after"
        a_zero = np.broadcast_to(zeros["a_zero"], len(a))
        w_zero = np.broadcast_to(zeros["w_zero"], len(w))
        half = 1 << (mac.acc_bits - 1)
        for i, j in np.ndindex(exact.shape):
            u, v = [int(x) for x in a[i]], [int(x) for x in w[j]]
            plain = [p * q for p, q in zip(u, v, strict=True)]
            meant = sum(
                (p - int(a_zero[i])) * (q - int(w_zero[j])) for p, q in zip(u, v, strict=True)
            )
            correction = meant - sum(plain)
            start = int(bias[j]) + (0 if after else correction)
            held = accumulated(
                plain,
                clip(start, -half, half - 1)
                if mac.overflow != "wrap"
                else (start + half) % (2 * half) - half,
                mac,
            )
            exact[i, j] = held + (correction if after else 0)
        reach = max(abs(int(x)) for x in exact.reshape(-1))
        requantizer, draw = drawn_rule(rng, reach)
        if reach >= (2**33 if draw["rule"] == "nvdla" else 2**31):
            refused += 1
            continue
        got = emulate_gemm_requantize(a, w, mac, requantizer, bias=bias, **zeros)
        want = [
            [clip(requantized(int(x), draw) + draw["zero"], draw["lo"], draw["hi"]) for x in row]
            for row in exact
        ]
        np.testing.assert_array_equal(got, want, err_msg=f"case {seed}: {draw} {mac} {zeros}")
        seen.add((draw["rule"], a.dtype.name))
    assert len(seen) == len(REQUANTIZE_RULES) * len(DTYPES)
    assert refused < len(chosen) // 20
