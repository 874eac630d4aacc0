"""Which MAC mode a precision runs in, and what it pays."""

import pytest

from hwmodels import AcceleratorError, describe_modes, load_accelerator
from hwmodels.modes import choose_mode


@pytest.mark.parametrize(
    ("accelerator", "w_bits", "a_bits", "mode", "unpacks"),
    [
        ("aie2", 4, 8, "int8xint4", (False, False)),
        ("aie2", 4, 4, "int8xint4", (False, False)),  # the load widens 4 to 8
        ("aie2", 3, 8, "int8xint4", (False, True)),
        ("aie2", 6, 6, "int8", (True, True)),
        ("aie2", 8, 4, "int8", (False, False)),
        ("aie2", 16, 16, "bf16", (False, False)),
        ("aie2", 4, 16, "bf16", (False, True)),
        ("aie2", 16, 8, "bf16", (True, False)),
        ("a100", 4, 4, "int4", (False, False)),
        ("a100", 4, 8, "int8", (False, True)),
        ("a100", 8, 8, "int8", (False, False)),
        ("a100", 5, 3, "int8", (True, True)),
        ("a100", 16, 16, "fp16", (False, False)),
    ],
)
def test_precisions_run_in_the_cheapest_mode_wide_enough(
    accelerator, w_bits, a_bits, mode, unpacks
):
    choice = choose_mode(load_accelerator(accelerator), w_bits, a_bits)
    assert choice.mode.name == mode
    assert (choice.unpack_activations, choice.unpack_weights) == unpacks


@pytest.mark.parametrize("accelerator", ["aie2", "a100"])
def test_wider_integers_never_run_faster(accelerator):
    hw = load_accelerator(accelerator)
    for w_bits in range(2, 9):
        for a_bits in range(2, 9):
            rate = choose_mode(hw, w_bits, a_bits).mode.macs_per_cycle
            for wider in ((min(w_bits + 1, 8), a_bits), (w_bits, min(a_bits + 1, 8))):
                assert choose_mode(hw, *wider).mode.macs_per_cycle <= rate


def test_the_reason_says_what_is_widened():
    rows = describe_modes(load_accelerator("a100"), "W4A8", "W6A6")
    assert [row["mode"] for row in rows] == ["int8", "int8", "int8"]
    assert "weights widened from 4 to 8 bits unpacked by the vector unit" in rows[0]["reason"]
    assert describe_modes(load_accelerator("aie2"), "W4A8")[0]["reason"] == "native"


def test_a_machine_without_a_wide_enough_mode_says_so():
    hw = load_accelerator("aie2")
    choose_mode(hw, 16, 16)  # A copy must not inherit what was worked out for the original.
    integers = tuple(mode for mode in hw.modes if mode.kind == "int")
    only_integers = hw.model_copy(update={"modes": integers})
    with pytest.raises(AcceleratorError, match="aie2 has no MAC mode wide enough for int W16A16"):
        describe_modes(only_integers, "W16A16")
