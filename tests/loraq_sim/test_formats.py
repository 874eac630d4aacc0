"""Format strings: what they mean, what they cost, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.formats import ELEMENTS, SCALES, parse_format


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int4/g64", "int4/g64/fp16"),
        ("INT8/Row", "int8/row/fp16"),
        ("int6/tensor", "int6/tensor/fp32"),
        ("uint4/g32/bf16", "uint4/g32/bf16"),
        ("int4/g32/e8m0", "int4/g32/e8m0"),
        (" fp16 ", "fp16"),
        ("mxfp4", "mxfp4"),
        ("mxint8/g32/e8m0", "mxint8"),
        ("mxfp8_e4m3/g16", "mxfp8_e4m3/g16/e8m0"),
        ("nvfp4/g16", "nvfp4"),
        ("bfp16ebs8", "bfp16ebs8"),
    ],
)
def test_parse_format_fills_in_the_default_scale(text, canonical):
    assert str(parse_format(text)) == canonical
    assert parse_format(canonical) == parse_format(text)


def test_parse_format_returns_a_format_as_it_is():
    fmt = parse_format("int4/g64")
    assert parse_format(fmt) is fmt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9/g64", r"unknown element 'int9'; did you mean"),
        ("", r"unknown element ''"),
        ("int4", r"must be element/granularity\[/scale\]; for example int4/g64"),
        ("int4/g0", r"granularity must be tensor, row, gN or bN .* got 'g0'"),
        ("int4/channel", r"got 'channel'"),
        ("int4/g64/fp15", r"unknown scale 'fp15'; did you mean"),
        ("int4/g64/fp16/x", r"must be element/granularity"),
        ("mxfp4/row", r"mxfp4 has groups with e8m0 scales; write 'mxfp4' or"),
        ("nvfp4/g16/e8m0", r"nvfp4 has groups with e4m3 scales"),
        ("mxfp4/g32/e8m0/x", r"mxfp4 has groups"),
        ("fp16/g64", r"fp16 is stored without scales; write 'fp16'"),
        ("int4/g9999999999999", r"granularity must be"),
    ],
)
def test_parse_format_says_what_is_wrong(text, message):
    with pytest.raises(InputError, match=message):
        parse_format(text)


@pytest.mark.parametrize(
    ("text", "shape", "nbytes"),
    [
        # 4 rows of 65 4-bit codes: 33 bytes each; 2 groups of 2-byte scales each.
        ("int4/g64", (4, 65), 4 * 33 + 4 * 2 * 2),
        ("int6/g32", (3, 32), 3 * 24 + 3 * 2),
        ("int3/row/fp32", (5, 10), 5 * 4 + 5 * 4),
        ("int8/tensor", (5, 10), 50 + 4),
        # Blocks of 64 x 64: 2 x 4 of them, those at the ends smaller.
        ("int8/b64", (100, 200), 100 * 200 + 8 * 2),
        ("uint4/b64", (65, 64), 65 * 32 + 2 * 2 + 2 * 1),
        # SANA's K = 5600 leaves a short group of 32: 88 scales a row.
        ("int4/g64", (2240, 5600), 2240 * (2800 + 88 * 2)),
        ("uint4/g64", (4, 128), 4 * 64 + 4 * 2 * 2 + 4 * 1),
        # 17 bytes for 32 elements, the short group included.
        ("mxfp4", (4, 48), 4 * (24 + 2)),
        ("mxfp6_e2m3", (4, 32), 4 * (24 + 1)),
        ("mxint8", (1, 33), 33 + 2),
        ("nvfp4", (4, 32), 4 * (16 + 2) + 4),
        ("bfp16ebs8", (2, 16), 2 * 18),
        ("fp16", (4, 10), 80),
        ("fp32", (4, 10), 160),
    ],
)
def test_storage_bytes_counts_codes_scales_zero_points_and_padding(text, shape, nbytes):
    assert parse_format(text).storage_bytes(shape) == nbytes


def test_integer_codes_are_those_of_the_width_in_the_name():
    signed = {2: (-2, 1), 3: (-4, 3), 4: (-8, 7), 5: (-16, 15), 6: (-32, 31), 7: (-64, 63)}
    signed |= {8: (-128, 127)}
    expected = {f"int{bits}": ends for bits, ends in signed.items()}
    expected |= {f"uint{bits}": (0, hi - lo) for bits, (lo, hi) in signed.items()}
    # Fixed-point block elements leave the code without a negative unused.
    expected |= {"mxint4": (-7, 7), "mxint6": (-31, 31), "mxint8": (-127, 127)}
    expected |= {"bfp16ebs8": (-127, 127), "int16": (-32768, 32767)}
    found = {name: (e.lo, e.hi) for name, e in ELEMENTS.items() if e.is_integer}
    assert found == expected


def test_the_ends_of_scale_formats_are_those_of_their_types():
    float8, bfloat16 = ml_dtypes.finfo(ml_dtypes.float8_e4m3fn), ml_dtypes.finfo(ml_dtypes.bfloat16)
    half, single = np.finfo(np.float16), np.finfo(np.float32)
    # Where the subnormals cannot be divided by in float32, the smallest normal number ends it.
    expected = {
        "fp32": (4, single.smallest_normal, single.max),
        "fp16": (2, half.smallest_subnormal, half.max),
        "bf16": (2, bfloat16.smallest_normal, bfloat16.max),
        "e4m3": (1, float8.smallest_subnormal, float8.max),
        "e8m0": (1, 2.0**-126, 2.0**127),
    }
    found = {name: (s.nbytes, s.smallest, s.largest) for name, s in SCALES.items()}
    assert found == {name: tuple(map(float, ends)) for name, ends in expected.items()}
