"""From a solution and a description to what the cost model charges."""

from types import SimpleNamespace

import pytest

import hwmodels
from hwmodels.loader import SHIPPED
from loraq_sim import machine
from loraq_sim.emulator.datapath import Datapath, Step, datapath_steps
from loraq_sim.errors import InputError
from loraq_sim.split import parse_split

SPLIT = parse_split("W4A4+W8A8r8")


def _stored(**parts):
    return SimpleNamespace(**{"main": 1, "left": 1, "right": 1, "smooth": None} | parts)


@pytest.mark.parametrize(
    ("parts", "transforms"),
    [
        ({}, ()),
        ({"smooth": 1}, ("smooth",)),
        ({"rotation": 64}, ("hadamard64",)),
        ({"smooth": 1, "rotation": 8}, ("smooth", "hadamard8")),
        ({"smooth": 1, "rotation": 8, "left": None}, ("smooth", "hadamard8")),
    ],
)
def test_transforms_are_the_steps_of_the_data_path(parts, transforms):
    assert machine.transforms_of(_stored(**parts), SPLIT, Datapath()) == transforms


@pytest.mark.parametrize("operation", ["gemm", "round", "add", "permute"])
def test_a_step_that_nobody_charges_is_refused(monkeypatch, operation):
    def longer(*arguments, **options):
        steps = datapath_steps(*arguments, **options)
        return (*steps, Step(name="residual", operation=operation, inputs=("y",), result="z"))

    monkeypatch.setattr(machine, "datapath_steps", longer)
    with pytest.raises(InputError, match="does not charge step 'residual' of the data path"):
        machine.transforms_of(_stored(), SPLIT, Datapath())


def test_options_ask_for_the_same_steps():
    asked = machine.transforms_asked(1152, SPLIT, Datapath(), smooth=0.5, rotate="hadamard")
    assert asked == ("smooth", "hadamard128")


def test_a_file_says_how_blocks_are_cut_and_a_preset_where_zero_points_enter(tmp_path):
    text = (SHIPPED / "aie2p.yaml").read_text(encoding="utf-8")
    changed = text.replace(
        "  rounding: conv_even\n", "  rounding: conv_even\n  block_rounding: floor\n"
    )
    path = tmp_path / "cut.yaml"
    path.write_text(changed.replace("name: aie2p", "name: cut", 1), encoding="utf-8")
    cut = hwmodels.load_accelerator(path)
    assert machine.datapath_for(cut).block_rounding == "floor"
    assert machine.datapath_for(cut, {"block_rounding": "conv_even"}).block_rounding == "conv_even"
    assert machine.datapath_for(hwmodels.load_accelerator("aie2p")).block_rounding is None
    assert machine.datapath_for(cut, {"array": "ruy"}).zero_point == "after"
    assert machine.datapath_for(cut, {"array": "onnxruntime"}).zero_point == "initial"
    asked = {"array": "ruy", "zero_point": "initial"}
    assert machine.datapath_for(cut, asked).zero_point == "initial"
