import numpy as np
import pytest

from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.errors import InputError


@pytest.mark.parametrize(
    ("overflow", "lo", "hi"),
    [("wrap", -128, 127), ("saturate", -128, 127), ("saturate_symmetric", -127, 127)],
)
def test_limits_follow_the_overflow_rule(overflow, lo, hi):
    mac = MacArray(acc_bits=8, overflow=overflow)
    assert (mac.lo, mac.hi) == (lo, hi)


def test_limits_of_64_bits_are_python_integers():
    mac = MacArray(acc_bits=np.int64(64))
    assert (mac.lo, mac.hi) == (-(2**63), 2**63 - 1)


def test_tree_overflow_defaults_to_overflow():
    assert MacArray(overflow="saturate", tree_bits=12).tree_rule == "saturate"
    assert MacArray(overflow="saturate", tree_bits=12, tree_overflow="wrap").tree_rule == "wrap"


def test_text_form_names_what_differs_from_one_plain_accumulator():
    assert str(MacArray()) == "acc32 wrap c1"
    mac = MacArray(
        acc_bits=20, overflow="saturate", products_per_add=8, accumulators=2, tree_bits=16
    )
    assert str(mac) == "acc20 saturate c8 P2 tree16 saturate"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"acc_bits": 7}, "acc_bits must be an integer from 8 to 64, got 7"),
        ({"acc_bits": 65}, "acc_bits must be an integer from 8 to 64, got 65"),
        ({"acc_bits": 16.0}, "acc_bits must be an integer from 8 to 64, got 16.0"),
        ({"acc_bits": "20"}, "acc_bits must be an integer from 8 to 64, got '20'"),
        ({"products_per_add": 0}, "products_per_add must be an integer from 1 to 64, got 0"),
        ({"products_per_add": True}, "products_per_add must be an integer from 1 to 64, got True"),
        ({"accumulators": 65}, "accumulators must be an integer from 1 to 64, got 65"),
        ({"tree_bits": 1}, "tree_bits must be an integer from 2 to 64, got 1"),
        ({"overflow": "saturat"}, "unknown overflow 'saturat'; did you mean 'saturate'"),
        ({"tree_bits": 9, "tree_overflow": "wrp"}, "unknown tree_overflow 'wrp'.*'wrap'"),
        ({"tree_overflow": "wrap"}, "tree_overflow='wrap' has no effect without tree_bits"),
    ],
)
def test_a_field_outside_its_range_is_refused_with_value_and_rule(fields, message):
    with pytest.raises(InputError, match=message):
        MacArray(**fields)
