"""Split names are read for what they say, and never refused."""

import pytest

from loraq_sim.reporting.labels import main_and_branch, main_weight_bits


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ("W4A4", ("W4A4", "none")),
        ("W4A4+W8A8r64", ("W4A4", "W8A8")),
        ("W4A8+W6A6@fp16r32", ("W4A8", "W6A6")),
    ],
)
def test_split_names_its_main_and_branch_precision(split, parts):
    assert main_and_branch(split) == parts


@pytest.mark.parametrize(
    ("split", "bits"), [("W4A4", 4), ("W16A16", 16), ("W4A8+W8A8r64", 4), ("mxfp4 g32", None)]
)
def test_split_names_the_bits_of_its_main_weights(split, bits):
    assert main_weight_bits(split) == bits
