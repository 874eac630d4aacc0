"""Broken accelerator files: one line with file, line, key, rule, value and the nearest name."""

import re
from pathlib import Path

import pytest

from hwmodels import AcceleratorError, load_accelerator, synthesized_array, with_overrides
from hwmodels.loader import MAX_FILE_BYTES, SHIPPED

GOOD = (SHIPPED / "aie2.yaml").read_text(encoding="utf-8")


def _line_of(text, needle):
    return next(i for i, line in enumerate(text.splitlines(), 1) if needle in line)


def _write(tmp_path, text):
    path = tmp_path / "chip.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_copy_of_a_shipped_file_loads_from_a_path(tmp_path):
    path = _write(tmp_path, GOOD)
    assert load_accelerator(path).digest() == load_accelerator("aie2").digest()
    assert load_accelerator(str(path)).name == "aie2"


BROKEN = [
    ("capacity_bytes: 65536", "capacity_byte: 65536",
     "unknown key 'memories.l1.capacity_byte'; did you mean 'capacity_bytes'?"),
    ("  clock_hz: 1.0e9", "  clock_ghz: 1.0",
     "unknown key 'units.clock_ghz'; did you mean 'clock_hz'?"),
    ("energy:\n  node_nm: 7", "powers: 3\nenergy:\n  node_nm: 7", "unknown key 'powers'"),
    ("  rows: 4\n", "", "missing key 'units.rows'"),
    ("  launch_s: 130.0e-6", "  launch_s: fast",
     "dispatch.launch_s: input should be a valid number, got 'fast'"),
    ("  rows: 4\n", "  rows: 0\n", "units.rows: input should be greater than or equal to 1, got 0"),
    ("  rows: 4\n", "  rows: '4'\n", "units.rows: input should be a valid integer, got '4'"),
    ("  rows: 4\n", "  rows: 4.5\n", "units.rows: input should be a valid integer"),
    ("  rows: 4\n", "  rows: true\n", "units.rows: input should be a valid integer, got True"),
    ("  rows: 4\n", "  rows:\n", "units.rows: input should be a valid integer, got None"),
    ("  clock_hz: 1.0e9", "  clock_hz: -1.0e9", "units.clock_hz: input should be greater than 0"),
    ("  clock_hz: 1.0e9", "  clock_hz: 1.2",
     "units.clock_hz: 1.2 Hz is outside the plausible range, 100000 to 1e+11 Hz; 1.2 GHz would be"),
    ("bandwidth_bytes_per_s: 17.0e9", "bandwidth_bytes_per_s: 17",
     "memories.dram.bandwidth_bytes_per_s: 17 B/s is outside the plausible range"),
    ("  clock_hz: 1.0e9", "  clock_hz: .nan", "units.clock_hz: input should be a finite number"),
    ("  clock_hz: 1.0e9", "  clock_hz: .inf", "units.clock_hz: input should be a finite number"),
    ("organization: array", "organization: arrray",
     "units.organization: got 'arrray'; did you mean 'array'? Known: array, grid"),
    ("overflow: wrap", "overflow: warp", "datapath.overflow: got 'warp'; did you mean 'wrap'?"),
    ("rounding: conv_even", "rounding: nearest_even", "datapath.rounding: got 'nearest_even'"),
    ("macs_per_cycle: 512", "macs_per_cycle: many",
     "modes[0].macs_per_cycle: input should be a valid integer, got 'many'"),
    ("  - name: int8\n", "  - name: int8xint4\n",
     "modes must have distinct names, int8xint4 appears twice"),
    ("reserved_bytes: 1024", "reserved_bytes: 65536",
     "memories.l1: reserved_bytes must be below capacity_bytes"),
    ("partials: l1", "partials: registers",
     "kernel: partials 'registers' needs accumulator_capacity_bytes"),
    ("  clock_hz: 1.0e9", "  clock_hz: 1.0e9\n  dataflow: weight_stationary",
     "units: dataflow is needed for organization 'systolic' and for no other"),
    ("organization: array", "organization: systolic",
     "units: dataflow is needed for organization 'systolic' and for no other"),
    ("kind: int\n    activation_bits: 8\n    weight_bits: 4",
     "kind: float\n    activation_bits: 8\n    weight_bits: 4",
     "modes[0]: a float mode narrower than 16 bits needs families, such as [mxfp]"),
    ("macs_per_cycle: 512", "macs_per_cycle: 512\n    sustained_fraction: 1.5",
     "modes[0].sustained_fraction: input should be less than or equal to 1, got 1.5"),
    ("macs_per_cycle: 512", "macs_per_cycle: 512\n    families: [intt]", "modes[0].families"),
    ("modes.int8xint4.macs_per_cycle: 256", "modes.int8xint4.macs: 256",
     "variant 'emulated_int4': unknown key 'modes.int8xint4.macs' of an accelerator file"),
    ("modes.int8xint4.macs_per_cycle: 256", "modes.int8xint4.macs_per_cycle: 0",
     "variant 'emulated_int4': aie2: modes[0].macs_per_cycle: input should be greater"),
    ("  - name: hawk_point", "  - name: emulated_int4",
     "variants must have distinct names, emulated_int4 appears twice"),
    ("  energy_pj_per_mac: 0.30\n  source: >-\n    The four", "  source: >-\n    The four",
     "missing key 'side_unit.energy_pj_per_mac'"),
    ("confidence: vendor", "confidence: sure", "modes[1].confidence: got 'sure'"),
    ("panel_fraction: 0\n", "panel_fraction: 1.5\n",
     "memories.l2.panel_fraction: input should be less than or equal to 1, got 1.5"),
    ("aliases: [xdna1, npu1]", "aliases: [xdna1, 'no spaces please']",
     "aliases[1]: string should match"),
    ("  columns: 4\n", "  columns: 4\n  columns: 5\n", "duplicate key 'units.columns'; keep one"),
    ("  columns: 4\n", "  columns: !!python/object/apply:os.system ['false']\n", "is not allowed"),
    ("  columns: 4\n", "  columns: [4\n", "not valid YAML"),
    ("  columns: 4\n", "\tcolumns: 4\n", "not valid YAML"),
    ("aliases: [xdna1, npu1]", "aliases: &a [xdna1, *a]", "aliases (&name, *name) are not allowed"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BROKEN, ids=[case[2][:40] for case in BROKEN])
def test_broken_files_say_where_what_and_how(tmp_path, old, new, message):
    assert old in GOOD
    path = _write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(AcceleratorError, match=re.escape(message)) as caught:
        load_accelerator(path)
    assert re.match(re.escape(str(path)) + r":\d+: ", str(caught.value))
    assert "\n" not in str(caught.value)


def test_the_line_is_the_line_of_the_wrong_key(tmp_path):
    text = GOOD.replace("bandwidth_bytes_per_cycle: 96", "bandwidth_bytes_per_cycle: none", 1)
    path = _write(tmp_path, text)
    line = _line_of(text, "bandwidth_bytes_per_cycle: none")
    with pytest.raises(AcceleratorError, match=f"chip.yaml:{line}: memories.l2.bandwidth_bytes"):
        load_accelerator(path)


def test_a_block_without_a_source_is_refused(tmp_path):
    start = GOOD.index("dispatch:")
    text = GOOD[:start] + "dispatch:\n  launch_s: 1.0e-6\n  confidence: estimate\n"
    text += GOOD[GOOD.index("datapath:") :]
    with pytest.raises(AcceleratorError, match="missing key 'dispatch.source'"):
        load_accelerator(_write(tmp_path, text))


def test_several_problems_are_counted(tmp_path):
    text = GOOD.replace("  rows: 4\n", "  rows: 0\n", 1).replace(
        "overflow: wrap", "overflow: no", 1
    )
    with pytest.raises(AcceleratorError, match=r"\(and 1 more problems?\)"):
        load_accelerator(_write(tmp_path, text))


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(AcceleratorError, match="must be a mapping of keys to values"):
        load_accelerator(_write(tmp_path, text))


def test_an_alias_bomb_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    with pytest.raises(AcceleratorError, match="aliases .* are not allowed"):
        load_accelerator(_write(tmp_path, "\n".join(lines)))


def test_deep_nesting_is_refused(tmp_path):
    with pytest.raises(AcceleratorError, match="nested too deeply|not valid YAML"):
        load_accelerator(_write(tmp_path, "a: " + "[" * 20000 + "]" * 20000))


def test_a_huge_file_is_refused_unread(tmp_path):
    path = _write(tmp_path, "# " + "x" * MAX_FILE_BYTES)
    with pytest.raises(AcceleratorError, match="may have 65536 bytes"):
        load_accelerator(path)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(AcceleratorError, match=r"cannot read accelerator file .*gone.yaml"):
        load_accelerator(tmp_path / "gone.yaml")
    with pytest.raises(AcceleratorError, match="is a directory"):
        load_accelerator(Path(tmp_path))


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "chip.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(AcceleratorError, match="not UTF-8 text"):
        load_accelerator(path)


def _from_gates(text):
    """aie2's file with its integer energies taken from synthesis."""
    text = text.replace("units:\n", "array: {from: synthesis, node_nm: 7}\n\nunits:\n", 1)
    return re.sub(r"(kind: int(?:.|\n)*?)    energy_pj_per_mac: [\d.]+\n", r"\1", text)


def test_energies_of_modes_may_come_from_synthesis(tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text(_from_gates(GOOD), encoding="utf-8")
    hw = load_accelerator(path)
    for changes in ({}, {"datapath.acc_bits": 16}, {"array.node_nm": 28}):
        changed = with_overrides(hw, changes)
        for mode in changed.modes:
            if mode.kind == "int":
                gates = synthesized_array(
                    changed.datapath,
                    a_bits=mode.activation_bits,
                    w_bits=mode.weight_bits,
                    node_nm=changed.array.node_nm,
                )
                assert mode.energy_pj_per_mac == gates.energy_pj_per_mac
            else:
                assert mode.energy_pj_per_mac == 0.89


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("node_nm: 7}", "node_nm: 6}", "array.node_nm: no figures for a node of 6 nm; known: 45"),
        ("from: synthesis", "from: wishes", "array.from"),
        ("from: synthesis, ", "", "missing key 'array.from'"),
        ("kind: int\n", "kind: int\n    energy_pj_per_mac: 0.1\n", "comes from synthesis"),
        ("activation_bits: 8", "activation_bits: 99", "a_bits must be a whole number from 2 to 16"),
    ],
)
def test_an_array_from_synthesis_that_cannot_be_is_one_line(tmp_path, old, new, said):
    path = tmp_path / "paper.yaml"
    path.write_text(_from_gates(GOOD).replace(old, new, 1), encoding="utf-8")
    with pytest.raises(AcceleratorError) as raised:
        load_accelerator(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
