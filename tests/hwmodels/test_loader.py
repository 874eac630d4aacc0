"""Broken accelerator files: one line with file, line, key, rule, value and the nearest name."""

import re
from pathlib import Path

import pytest

from hwmodels import (
    AcceleratorError,
    implausible,
    list_accelerators,
    load_accelerator,
    parse_value,
    synthesized_array,
    with_overrides,
)
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
     "aliases[1]: got 'no spaces please'; a name is made of small letters"),
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


def test_all_problems_are_said_at_once_each_with_its_line(tmp_path):
    changes = (
        ("  rows: 4\n", "  rows: 0\n"), ("overflow: wrap", "overflow: no"),
        ("capacity_bytes: 65536", "capacity_byte: 65536"),
        ("  clock_hz: 1.0e9", "  clock_hz: 1 GB"),
        ("    source: >-\n      AM020 v1.4 (June", "    note: >-\n      AM020 v1.4 (June"),
    )  # fmt: skip
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(AcceleratorError) as caught:
        load_accelerator(_write(tmp_path, text))
    said = str(caught.value)
    assert "\n" not in said
    for needle, problem in (
        ("  rows: 0", "units.rows: input should be greater than or equal to 1, got 0"),
        ("overflow: no", "datapath.overflow: got 'no'"),
        ("capacity_byte:", "unknown key 'memories.l1.capacity_byte'"),
        ("clock_hz: 1 GB", "units.clock_hz: input should be a valid number, got '1 GB'; write a"),
    ):
        line = _line_of(text, needle)
        assert f"line {line}: {problem}" in said or f":{line}: {problem}" in said
    # A misspelt key is not also missing; a key that is not nearly one of the block's is both.
    assert "missing key 'memories.l1.capacity_bytes'" not in said
    assert "unknown key 'variants[0].note'" in said
    assert "missing key 'variants[0].source'" in said


def test_problems_of_variants_and_families_are_said_together(tmp_path):
    text = GOOD.replace("units.clock_hz: 1.6e9", "units.clock_hz: 1.6", 1)
    # Of the family that is refitted whenever rows come in: whatever its value.
    text, found = re.subn(r"(name: iron_gemm\b.*?)kernel\.overlap_fraction:", r"\1kernel.overlap:",
                          text, count=1, flags=re.DOTALL)  # fmt: skip
    assert found == 1
    with pytest.raises(AcceleratorError) as caught:
        load_accelerator(_write(tmp_path, text))
    assert "variant 'hawk_point'" in str(caught.value)
    assert "kernels.iron_gemm: unknown key 'kernel.overlap'" in str(caught.value)


WRITTEN = [
    ("clock_hz: 1.0e9", "clock_hz: 1 GHz"), ("capacity_bytes: 65536", "capacity_bytes: 64KiB"),
    ("capacity_bytes: 2097152", "capacity_bytes: 2 MiB"),
    ("bandwidth_bytes_per_s: 17.0e9", "bandwidth_bytes_per_s: 17 GB/s"),
    ("launch_s: 130.0e-6", "launch_s: 130 us"), ("launch_s: 130.0e-6", "launch_s: 0.13ms"),
    ("latency_s: 1.0e-6", "latency_s: 1\u00b5s"),
    ("energy_pj_per_mac: 0.18", "energy_pj_per_mac: 180 fJ"),
    ("macs_per_cycle: 512", "macs_per_cycle: 512 MAC/cycle"), ("acc_bits: 32", "acc_bits: 32 bits"),
    ("dram_pj_per_byte: 163", "dram_pj_per_byte: 163 pJ/B"), ("static_w: 0.5", "static_w: 500 mW"),
    ("sustained_fraction: 1.0", "sustained_fraction: 100 %"), ("node_nm: 7", "node_nm: 7nm"),
    ("wrap_max_words: 1023", "wrap_max_words: 1023 words"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), WRITTEN, ids=[new for _, new in WRITTEN])
def test_units_are_read_as_people_write_them(tmp_path, old, new):
    assert old in GOOD
    path = _write(tmp_path, GOOD.replace(old, new, 1))
    assert load_accelerator(path).digest() == load_accelerator("aie2").digest()


def test_units_are_read_in_variants_too(tmp_path):
    assert "units.clock_hz: 1.6e9" in GOOD
    path = _write(tmp_path, GOOD.replace("units.clock_hz: 1.6e9", "units.clock_hz: 1.6 GHz", 1))
    written = load_accelerator(path, "hawk_point")
    assert written.units == load_accelerator("aie2", "hawk_point").units


@pytest.mark.parametrize(
    "new",
    [
        "clock_hz: 1 GB", "clock_hz: 1.0", "clock_hz: '1e9'", "clock_hz: 1 G", "clock_hz: GHz",
        "clock_hz: 1 GHz 2", "clock_hz: 1e99999999 GHz", "clock_hz: -1 GHz",
    ],
)  # fmt: skip
def test_what_is_no_quantity_of_the_key_is_refused(tmp_path, new):
    path = _write(tmp_path, GOOD.replace("clock_hz: 1.0e9", new, 1))
    with pytest.raises(AcceleratorError, match=r"chip\.yaml:\d+: units\.clock_hz: "):
        load_accelerator(path)


def test_variants_and_the_command_line_take_units_too(tmp_path):
    path = _write(tmp_path, GOOD.replace("units.clock_hz: 1.6e9", "units.clock_hz: 1600 MHz", 1))
    assert load_accelerator(path, "hawk_point").units.clock_hz == 1.6e9
    assert parse_value("1.5 GHz", "mac_array.clock_hz") == 1_500_000_000
    assert parse_value("64KiB", "memories.l1.capacity_bytes") == 65536
    assert parse_value("wrap", "datapath.overflow") == "wrap"


@pytest.mark.parametrize("unit", ["Gb/s", "gb/s", "Gbit/s"])
def test_bits_are_not_taken_for_bytes(tmp_path, unit):
    path = _write(tmp_path, GOOD.replace("per_s: 17.0e9", f"per_s: 17 {unit}", 1))
    with pytest.raises(AcceleratorError, match="one of B/s"):
        load_accelerator(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((("clock_hz: 1.0e9", "clock_hz: 2 MHz"),), "a clock of 2 MHz is unusual"),
        ((("per_s: 17.0e9", "per_s: 17 TB/s"),), "DRAM (1.7e+04 GB/s) is faster than L2 (96 GB/s)"),
        ((("per_s: 17.0e9", "per_s: 90 GB/s"),
          ("fill_bytes_per_cycle: 4", "fill_bytes_per_cycle: 1")),
         "faster than all units can fill their L1 (32 GB/s)"),
        ((("l2_pj_per_byte: 1.6", "l2_pj_per_byte: 1600"),),
         "takes less energy than one of a smaller"),
        ((("macs_per_cycle: 128", "macs_per_cycle: 1280"),),
         "mode int16xint8: it is wider and yet faster than int8xint4"),
        ((("energy_pj_per_mac: 0.55", "energy_pj_per_mac: 0.055"),), "takes less energy than int8"),
        ((("energy_pj_per_mac: 0.89", "energy_pj_per_mac: 8.9 nJ"),), "at peak take 18,227 W"),
    ],
)  # fmt: skip
def test_what_is_hardly_meant_is_warned_of(tmp_path, caplog, changes, said):
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    load_accelerator(_write(tmp_path, text))
    assert said in caplog.text
    assert re.search(r"chip\.yaml:\d+: ", caplog.text)


def test_shipped_machines_are_plausible():
    for name in list_accelerators():
        assert implausible(load_accelerator(name)) == [], name


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
        ("activation_bits: 8", "activation_bits: 99", "activation_bits: input should be less"),
        (
            "products_per_add: 8",
            "products_per_add: 8000",
            "datapath.products_per_add: input should be less than or equal to 64, got 8000",
        ),
    ],
)
def test_an_array_from_synthesis_that_cannot_be_is_one_line(tmp_path, old, new, said):
    path = tmp_path / "paper.yaml"
    path.write_text(_from_gates(GOOD).replace(old, new, 1), encoding="utf-8")
    with pytest.raises(AcceleratorError) as raised:
        load_accelerator(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
