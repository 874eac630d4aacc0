"""Which MAC mode a precision runs in, and what it pays."""

import itertools

import pytest

from hwmodels import (
    AcceleratorError,
    describe_modes,
    idle_keys,
    list_accelerators,
    load_accelerator,
    unreachable_modes,
    with_overrides,
)
from hwmodels.loader import SHIPPED
from hwmodels.modes import choose_mode
from loraq_sim.machine import cost_split
from loraq_sim.split import parse_split

SPLITS = ("W4A4", "W4A8", "W6A6", "W8A8", "W16A16", "W4A16", "W16A8")
BRANCHES = ("W4A4", "W8A8", "W4A8", "W16A16", "W16A8", "W8A16")


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
    rows = describe_modes(load_accelerator("a100"), "W4A8", branch="W6A6")
    assert [row["mode"] for row in rows] == ["int8", "int8", "fp16"]
    assert [row["precision"] for row in rows] == ["W4A8", "W6A6", "W6A16"]  # P is fp16 there.
    assert "weights widened from 4 to 8 bits unpacked by the vector unit" in rows[0]["reason"]
    assert describe_modes(load_accelerator("aie2"), "W4A8")[0]["reason"] == "native"


def test_a_machine_without_a_wide_enough_mode_says_so():
    hw = load_accelerator("aie2")
    choose_mode(hw, 16, 16)  # A copy must not inherit what was worked out for the original.
    integers = tuple(mode for mode in hw.modes if mode.kind == "int")
    only_integers = hw.model_copy(update={"modes": integers})
    message = "aie2 has no MAC mode wide enough for int W16A16"
    with pytest.raises(AcceleratorError, match=message):
        choose_mode(only_integers, 16, 16)
    (row,) = describe_modes(only_integers, "W16A16")
    assert (row["mode"], row["reason"].startswith(message)) == ("refused", True)


def _machines_to_refuse():
    """Every shipped machine with P as the branch and as fp16, with all and with narrow modes."""
    for name in list_accelerators():
        hw = load_accelerator(name)
        for p_format in ("branch", "fp16"):
            changed = with_overrides(hw, {"datapath.p_format": p_format})
            narrow = tuple(m for m in hw.modes if max(m.activation_bits, m.weight_bits) <= 8)
            yield changed
            if narrow:
                yield changed.model_copy(update={"modes": narrow})


@pytest.mark.parametrize("family", ["int", "mxint", "mxfp", "nvfp"])
def test_what_show_calls_native_is_what_cost_accepts(family):
    n_refused = 0
    texts = [*SPLITS, *(f"{a}+{b}r8" for a, b in itertools.product(SPLITS[:4], BRANCHES))]
    for hw in _machines_to_refuse():
        for text in texts:
            split = parse_split(text, family=family)
            rows = describe_modes(hw, split.main, branch=split.branch, family=family)
            refused = [row for row in rows if row["mode"] == "refused"]
            if refused:
                n_refused += 1
                with pytest.raises(AcceleratorError) as caught:
                    cost_split(64, 64, 64, split, hw)
                assert str(caught.value) == refused[0]["reason"], (hw.name, text)
            else:
                modes = cost_split(64, 64, 64, split, hw)[1].modes
                assert list(modes.values()) == [row["mode"] for row in rows], (hw.name, text)
    assert n_refused > 100


def test_a_p_wider_than_the_machine_names_the_key_that_makes_it_so():
    hw = with_overrides(load_accelerator("aie2"), {"datapath.p_format": "fp16"})
    eight = hw.model_copy(update={"modes": tuple(m for m in hw.modes if m.kind == "int")})
    with pytest.raises(
        AcceleratorError, match=r"as datapath.p_format says, where the branch has 8"
    ):
        cost_split(64, 64, 64, parse_split("W4A8+W8A8r8"), eight)
    row = describe_modes(eight, "W4A8", branch="W8A8")[2]
    assert (row["precision"], row["mode"]) == ("W8A16", "refused")
    assert "datapath.p_format" in row["reason"]
    assert "p_format branch keeps it at 8" in row["reason"]


@pytest.mark.parametrize("w_bits", [4, 8])
def test_block_floating_point_runs_where_the_mode_scales_itself(w_bits):
    # A group sum of 32 products costs a 16-lane add on XDNA2: as long as its 512-wide MACs.
    choice = choose_mode(load_accelerator("aie2p"), w_bits, 8, "mxint")
    assert (choice.mode.name, choice.scales_itself) == ("bfp16", True)
    assert choose_mode(load_accelerator("aie2p"), w_bits, 8, "int").mode.name == "int8"


@pytest.mark.parametrize("name", list_accelerators())
def test_every_shipped_mode_is_reached_by_a_split(name):
    assert unreachable_modes(load_accelerator(name)) == {}


INT16 = """  - name: int16xint16
    kind: int
    activation_bits: 16
    weight_bits: 16
    accumulator_bits: 64
    macs_per_cycle: 64
    instruction_m: 4
    instruction_k: 4
    instruction_n: 8
    energy_pj_per_mac: 0.5
    source: AM020
    confidence: vendor
"""


def test_a_mode_no_split_reaches_is_named_with_its_line(tmp_path, caplog):
    text = (SHIPPED / "aie2.yaml").read_text(encoding="utf-8")
    at = text.index("  - name: bf16")
    path = tmp_path / "int16.yaml"
    path.write_text(text[:at] + INT16 + text[at:], encoding="utf-8")
    line = text[:at].count("\n") + 1
    with caplog.at_level("WARNING", logger="hwmodels"):
        hw = load_accelerator(path)
    assert f"int16.yaml:{line}: mode int16xint16 is reached by no split: weights of 16 bits" in (
        caplog.text
    )
    assert set(unreachable_modes(hw)) == {"int16xint16"}
    assert (
        "weights of 16 bits are fp16 or bf16 in every split"
        in (idle_keys(hw)["modes.int16xint16.energy_pj_per_mac"])
    )
