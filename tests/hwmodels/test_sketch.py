"""Sketches: few numbers in, a machine out that says which of its numbers nobody gave."""

import json
import tomllib
from pathlib import Path

import pytest

import hwmodels
from hwmodels import AcceleratorError, GemmWorkload, estimate_cost, load_accelerator
from hwmodels.blocks import key_meanings
from hwmodels.description import Accelerator

MINE = {
    "rows": 8, "columns": 8, "clock": "1.2GHz", "modes": "int8,int4x8", "sram": "2MB",
    "dram": "68GB/s",
}  # fmt: skip
WORK = GemmWorkload(m=4096, n=1152, k=1152, main="W4A4", branch="W8A8", rank=32)


def test_what_was_given_is_there_and_all_else_is_assumed():
    hw = hwmodels.sketch("my_npu", **MINE)
    assert (hw.units.rows, hw.units.columns, hw.units.clock_hz) == (8, 8, 1.2e9)
    assert hw.memories.l2.capacity_bytes == 2_000_000
    assert hw.memories.dram.bandwidth_bytes_per_s == 68e9
    assert [(m.name, m.activation_bits, m.weight_bits) for m in hw.modes] == [
        ("int8", 8, 8), ("int4x8", 8, 4),
    ]  # fmt: skip
    given = {"units.rows", "units.columns", "units.clock_hz", "memories.l2.capacity_bytes",
             "memories.dram.bandwidth_bytes_per_s"}  # fmt: skip
    rows = {row["key"]: row for row in hwmodels.describe(hw)}
    for key in given:
        assert rows[key]["confidence"] == "given"
    widths = ("activation_bits", "weight_bits", "kind", "name")
    for key, row in rows.items():
        if key not in given and not key.endswith(widths) and key != "transforms":
            assert row["confidence"] == "assumed", key
    # 8 x 8 units of 512 MACs at 1.2 GHz.
    assert hwmodels.overview(hw)[0][1]["peak_tops"] == pytest.approx(2 * 64 * 512 * 1.2e-3)


@pytest.mark.parametrize("organization", ["array", "grid", "systolic"])
def test_the_file_of_a_sketch_reads_as_the_sketch(tmp_path, organization):
    modes = ["int8=512", "w4a4,bf16", "fp8", "int16x8", "w2a4"]
    hw = hwmodels.sketch("x.1", organization=organization, modes=modes, rows=16, launch="3.5us")
    path = tmp_path / "x.1.yaml"
    path.write_text(hwmodels.sketch_text(hw), encoding="utf-8")
    read = load_accelerator(path)
    assert read.digest() == hw.digest()
    cost = estimate_cost(WORK, read)
    assert cost.confidence == "assumed"
    assert {mode.name for mode in read.modes} == {"int8", "w4a4", "bf16", "fp8", "int16x8", "w2a4"}
    # What a reader sees: no value without its meaning.
    text = path.read_text(encoding="utf-8")
    about = ("source", "confidence", "name", "title")
    for line in text.splitlines()[3:]:
        key, _, value = line.strip().removeprefix("- ").partition(": ")
        if value and key not in about:
            assert "  # " in line, line


@pytest.mark.parametrize(
    "name", ["units.clock_hz", "dispatch.launch_s", "modes.int8.macs_per_cycle"]
)
def test_a_value_that_is_set_is_not_assumed_any_more(name):
    hw = hwmodels.sketch("mine")
    value = {"units.clock_hz": 9e8, "dispatch.launch_s": 1e-5, "modes.int8.macs_per_cycle": 64}[
        name
    ]
    changed = hwmodels.with_overrides(hw, {name: value})
    assert set(hwmodels.assumed_keys(hw)) - set(hwmodels.assumed_keys(changed)) == {name}


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(AcceleratorError) as caught:
        hwmodels.sketch(
            "My NPU", organization="arry", rows=0, clock="1.2kHz", sram="2 parsecs", dram="68Gb/s",
            modes="int9x,int8=-3,int4x8",
        )  # fmt: skip
    said = str(caught.value)
    for problem in (
        "organization: got 'arry'; did you mean 'array'?", "modes: 'int9x' is none",
        "modes: the rate of int8 must be", "name: got 'My NPU'; a name is made of",
        "rows: input should be greater than or equal to 1, got 0",
        "clock: 1200 Hz is outside the plausible range", "sram: input should be a valid integer",
        "dram: input should be a valid number, got '68Gb/s'; write a number in B/s, or one of B/s",
    ):  # fmt: skip
        assert problem in said
    assert "\n" not in said


def test_a_name_under_assumed_that_is_no_key_is_refused(tmp_path):
    text = hwmodels.sketch_text(hwmodels.sketch("mine"))
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("  - dispatch\n", "  - dispach\n", 1), encoding="utf-8")
    with pytest.raises(
        AcceleratorError, match=r"mine.yaml:6: assumed: 'dispach' is no key .*'dispatch'"
    ):
        load_accelerator(path)


def test_results_rest_on_what_is_assumed_as_far_as_it_moves_them():
    hw = hwmodels.sketch("my_npu", **MINE)
    effects = hwmodels.rests_on(WORK, hw)
    assert effects
    assert set(effects) <= set(hwmodels.assumed_keys(hw))
    key = "dispatch.launch_s"
    base = estimate_cost(WORK, hw).latency_s
    moved = estimate_cost(WORK, hwmodels.with_overrides(hw, {key: hw.dispatch.launch_s * 1.1}))
    slow = hwmodels.with_overrides(hw, {key: 0.01})
    assert (moved.latency_s / base - 1) / 0.1 < 0.1
    assert key not in effects
    # Given once, it is no assumption; assumed and large, it is the one that counts.
    assert key not in hwmodels.rests_on(WORK, slow)
    late = slow.model_copy(update={"assumed": ("dispatch",)})
    effects = hwmodels.rests_on(WORK, late)
    assert next(iter(effects)) == key
    assert effects[key] == pytest.approx(1.0, abs=0.1)
    text = hwmodels.resting_text({key: 0.4, "vector.x": -0.12, "vector.y": 0.05})
    assert text == (
        "rests on assumed dispatch.launch_s (10 % of it moves the latency by 4 %), vector.x (1.2 %)"
    )
    in_energy = hwmodels.rests_on(WORK, hw, of="energy")
    assert list(in_energy.values()) == sorted(in_energy.values(), key=abs, reverse=True)
    key = "energy.dram_pj_per_byte"
    effect = in_energy[key]
    changed = hwmodels.with_overrides(hw, {key: 1.1 * hw.energy.dram_pj_per_byte})
    gained = estimate_cost(WORK, changed).energy_j / estimate_cost(WORK, hw).energy_j - 1
    assert effect == pytest.approx(gained / 0.1, rel=1e-6)
    assert hwmodels.resting_text({key: 0.4}, "energy").endswith("moves the energy by 4 %)")
    assert hwmodels.rests_on(WORK, load_accelerator("aie2")) == {}
    assert hwmodels.resting_text({}) == ""


def test_a_copy_of_a_shipped_file_keeps_its_comments_and_numbers(tmp_path):
    text = hwmodels.shipped_text("xdna1", "mine")
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    mine, theirs = load_accelerator(path), load_accelerator("aie2")
    assert (mine.name, mine.aliases) == ("mine", ())
    assert mine.model_dump(exclude={"name", "aliases"}) == theirs.model_dump(
        exclude={"name", "aliases"}
    )
    assert text.count("#") == text.replace("mine", "aie2").count("#") > 1
    with pytest.raises(AcceleratorError, match="did you mean 'aie2'"):
        hwmodels.shipped_text("aie3", "mine")


def test_every_key_has_a_meaning_and_every_meaning_a_key():
    schema = Accelerator.model_json_schema()
    blocks = {"Accelerator": schema, **schema["$defs"]}
    meanings = key_meanings()
    about = set(meanings["Block"])
    known = {name: set(block["properties"]) for name, block in blocks.items()}
    for name, keys in known.items():
        assert set(meanings[name]) == keys - about, name
    assert set(meanings) == {*known, "Block"}
    # An editor shows them, and takes units where the reader does.
    clock = blocks["Units"]["properties"]["clock_hz"]
    assert clock["description"] == meanings["Units"]["clock_hz"]
    assert clock["type"] == ["number", "string"]
    assert blocks["Units"]["properties"]["rows"]["type"] == "integer"
    json.dumps(schema)
    path = Path(hwmodels.blocks.__file__).with_name("key_meanings.toml")
    assert tomllib.loads(path.read_text(encoding="utf-8")) == meanings
