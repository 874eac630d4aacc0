"""Names of cases: short where nothing else differs, unique always."""

import json

from loraq_sim.results.wording import comparison, context_of, labelled

BASE = {"dump": "d", "accelerator": "a", "layer": "l", "split": "W4A4+W8A8r8", "method": "loraq"}


def labels(*rows):
    return [row["label"] for row in labelled([BASE | row for row in rows])]


def test_a_single_case_is_called_by_its_split():
    assert labels({"preset": "fast", "seed": 3}) == ["W4A4+W8A8r8"]


def test_only_settings_that_differ_within_a_split_are_named():
    rows = ({"split": "W4A4", "method": "rtn"}, {"method": "loraq"}, {"method": "svdquant"})
    assert labels(*rows) == ["W4A4", "W4A4+W8A8r8 (loraq)", "W4A4+W8A8r8 (svdquant)"]


def test_numbers_say_what_they_are():
    assert labels({"seed": 0, "acc_bits": 16}, {"seed": 1, "acc_bits": 20}) == [
        "W4A4+W8A8r8 (acc 16, seed 0)",
        "W4A4+W8A8r8 (acc 20, seed 1)",
    ]
    assert labels({"token_limit": None}, {"token_limit": 64}) == [
        "W4A4+W8A8r8 (all tokens)",
        "W4A4+W8A8r8 (tokens 64)",
    ]


def test_what_two_accelerators_differ_in_is_not_named():
    rows = ({"accelerator": "a", "acc_bits": 32}, {"accelerator": "b", "acc_bits": 48})
    assert labels(*rows) == ["W4A4+W8A8r8"] * 2


def test_other_settings_are_read_from_their_json():
    options = json.dumps({"datapath": {"array": "imma"}, "fused": False})
    assert labels({"options": ""}, {"options": options}) == [
        "W4A4+W8A8r8",
        "W4A4+W8A8r8 (not fused, array imma)",
    ]
    assert labels({"options": ""}, {"options": "{broken"})[1] == "W4A4+W8A8r8 ({broken)"
    assert labels({"options": ""}, {"options": "[1]"})[1] == "W4A4+W8A8r8 ([1])"


def test_contexts_name_the_dump_only_where_there_are_several():
    assert context_of(BASE, several_dumps=False) == "a"
    assert context_of(BASE, several_dumps=True) == "d on a"


def test_ratios_beyond_floats_have_a_size():
    def said(error, of, cost=1.0):
        rows = ({"split": "A", "e": error, "t_s": cost}, {"split": "B", "e": of, "t_s": 1.0})
        return comparison(*rows, ["t_s"], "e")

    assert said(1e-300, 1e300) == "has 1.0e+600× less e than B at the same t"
    assert said(2e-3, 1.0) == "has 500.0× less e than B at the same t"
    assert said(1e-7, 1.0) == "has 1.0e+07× less e than B at the same t"
    assert said(0.5, 1.0, cost=1e308) == "halves the e of B for 1.0e+308× the t"
    assert said(0.0, 1.0) == "has none of the e of B at the same t"
