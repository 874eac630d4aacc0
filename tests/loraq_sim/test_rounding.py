import pytest

from loraq_sim.errors import InputError
from loraq_sim.formats import (
    Rounding,
    Saturation,
    parse_rounding,
    parse_saturation,
    rounding_code,
    rounding_from_code,
)


def test_names_parse_to_their_modes():
    assert [parse_rounding(mode.value) for mode in Rounding] == list(Rounding)
    assert [parse_saturation(mode.value) for mode in Saturation] == list(Saturation)


# llvm-aie aie2p_defines.h and AMD UG1583 (AIE-ML), Vitis Libraries table 67 (AIE1).
@pytest.mark.parametrize(
    ("mode", "aie_ml", "aie1"),
    [("floor", 0, 0), ("positive_inf", 9, 2), ("symmetric_zero", 10, 5), ("conv_even", 12, 6)],
)
def test_codes_differ_between_generations(mode, aie_ml, aie1):
    assert rounding_code(mode, "aie-ml") == aie_ml
    assert rounding_code(mode, "aie1") == aie1


@pytest.mark.parametrize(("generation", "n_modes"), [("aie-ml", 10), ("aie1", 8)])
def test_codes_and_modes_are_inverses(generation, n_modes):
    modes = []
    for code in range(16):
        try:
            mode = rounding_from_code(code, generation)
        except InputError:
            continue
        assert rounding_code(mode, generation) == code
        modes.append(mode)
    assert len(set(modes)) == n_modes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_rounding("flor"), "unknown rounding 'flor'; did you mean 'floor'"),
        (lambda: parse_saturation("clamp"), "unknown saturation 'clamp'"),
        (lambda: rounding_code("floor", "aie3"), "unknown AI Engine generation 'aie3'"),
        (lambda: rounding_code("symmetric_floor", "aie1"), "aie1 has no rounding mode"),
        (lambda: rounding_from_code(5, "aie-ml"), "rounding code 5 is reserved on aie-ml"),
    ],
)
def test_unknown_names_and_codes_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
