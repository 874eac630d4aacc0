"""Changed copies of a machine: keys by path, and the variants of its file."""

import pytest

import hwmodels
from hwmodels import AcceleratorError, list_accelerators, load_accelerator, with_overrides
from hwmodels.overrides import keys_of, parse_value

AIE2 = load_accelerator("aie2")


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("memories.l2.capacity_bytes", 1048576, lambda hw: hw.memories.l2.capacity_bytes),
        ("clock_hz", 1.5e9, lambda hw: hw.units.clock_hz),
        ("clock_hz", 1500000000, lambda hw: hw.units.clock_hz),
        ("mac_array.columns", 8, lambda hw: hw.units.columns),
        ("modes.int8.macs_per_cycle", 300, lambda hw: hw.modes[1].macs_per_cycle),
        ("modes[1].macs_per_cycle", 300, lambda hw: hw.modes[1].macs_per_cycle),
        ("launch_s", 0, lambda hw: hw.dispatch.launch_s),
        ("overflow", "saturate", lambda hw: hw.datapath.overflow),
    ],
)
def test_a_key_path_changes_that_value_only(key, value, read):
    changed = with_overrides(AIE2, {key: value})
    assert read(changed) == value
    assert changed.digest() != AIE2.digest()
    assert load_accelerator("aie2").digest() == AIE2.digest()
    assert changed.name == "aie2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clock": 1}, r"unknown key 'clock' of an accelerator file; did you mean|Known"),
        ({"memories.l2.capacity_byte": 1}, r"did you mean 'memories.l2.capacity_bytes'"),
        ({"capacity_bytes": 1}, r"'capacity_bytes' is not unique; write one of memories.l1"),
        ({"units.rows": 0}, r"units.rows: input should be greater than or equal to 1, got 0"),
        ({"units.rows": 2.5}, r"units.rows: input should be a valid integer"),
        ({"datapath.overflow": "warp"}, r"datapath.overflow: got 'warp'; did you mean 'wrap'"),
        ({"memories.l1.reserved_bytes": 65536}, r"reserved_bytes must be below capacity_bytes"),
        ({"modes.int9.macs_per_cycle": 4}, r"unknown key 'modes.int9.macs_per_cycle'"),
        ({"name": "x"}, r"unknown key 'name'|not unique"),
    ],
)
def test_bad_changes_say_what_and_how(changes, message):
    with pytest.raises(AcceleratorError, match=message):
        with_overrides(AIE2, changes)


@pytest.mark.parametrize("name", list_accelerators())
def test_every_variant_loads_and_differs(name):
    hw = load_accelerator(name)
    for variant in hw.variants:
        changed = load_accelerator(f"{name}@{variant.name}")
        assert changed.name == f"{name}@{variant.name}"
        assert changed.digest() != hw.digest()
        assert load_accelerator(name, variant.name) is changed


SLIPS = [
    ("memories.dram.bandwidth_bytes_per_s", 17, "17 GB/s would be 1.7e+10"),
    ("units.clock_hz", 1.0, "1 GHz would be 1000000000"),
    ("units.clock_hz", 1.2, "1.2 Hz is outside the plausible range, 100000 to 1e+11 Hz; 1.2 GHz"),
    ("units.clock_hz", 1000, "1000 MHz would be"),
    ("dispatch.launch_s", 130, "130 us would be 0.00013"),
    ("dispatch.launch_s", 5, "5 us would be 5e-06"),
    ("memories.dram.latency_s", 600_000, "600000 ns would be 0.0006"),
    ("energy.dram_pj_per_byte", 163e-12, "1.63e-10 J would be 163"),
    ("energy.l2_pj_per_byte", 1.6e-12, "J would be 1.6"),
    ("modes.int8.energy_pj_per_mac", 3e-13, "J would be 0.3"),
    ("energy.node_nm", 7e-9, "7e-09 m would be 7"),
    ("memories.l1.capacity_bytes", 64, "64 KiB would be 65536"),
    ("memories.l1.capacity_bytes", 10**18, "1e+18 B is outside the plausible range"),
    ("memories.l2.capacity_bytes", 2, "2 MiB would be 2097152"),
    ("memories.l2.bandwidth_bytes_per_cycle", 96e9, "B/s at 1 GHz would be 96"),
    ("modes.int8.macs_per_cycle", 4_000_000_000_000, "outside the plausible range, 1 to 1e+08"),
]


@pytest.mark.parametrize(("key", "value", "hint"), SLIPS)
def test_a_slip_of_units_names_key_value_and_range(key, value, hint):
    with pytest.raises(AcceleratorError) as caught:
        with_overrides(AIE2, {key: value})
    message = str(caught.value)
    assert f"{key.rpartition('.')[2]}: {value:g} " in message
    assert hint in message
    assert "\n" not in message


def test_a_key_of_a_variant_can_be_changed_and_the_name_stays():
    changed = with_overrides(load_accelerator("aie2@hawk_point"), {"units.rows": 8})
    assert (changed.name, changed.units.rows, changed.units.clock_hz) == (
        "aie2@hawk_point",
        8,
        1.6e9,
    )


@pytest.mark.parametrize("name", list_accelerators())
def test_every_key_can_be_set_to_what_it_is(name):
    hw = load_accelerator(name)
    content = hw.model_dump()
    for path, steps in keys_of(hw).items():
        value = content
        for step in steps:
            value = value[step]
        assert with_overrides(hw, {path: value}).digest() == hw.digest(), path


def test_the_conflict_about_int4_is_a_variant():
    rates = [
        next(m.macs_per_cycle for m in load_accelerator(n).modes if m.name == "int8xint4")
        for n in ("xdna1", "xdna1@emulated_int4")
    ]
    assert rates == [512, 256]


def test_an_unknown_variant_names_the_known():
    with pytest.raises(AcceleratorError, match=r"unknown variant 'emulated' of aie2; did you mean"):
        load_accelerator("aie2", "emulated")
    with pytest.raises(AcceleratorError, match=r"unknown variant 'x' of t4; it has none"):
        load_accelerator("t4@x")


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("1e9", 10**9), ("0.5", 0.5), ("true", True), ("wrap", "wrap"), ("1.5e9", 1.5e9)],
)
def test_values_are_read_as_numbers_where_they_are(text, value):
    assert parse_value(text) == value


def test_whole_numbers_are_integers():
    assert isinstance(parse_value("1.5e9"), int)
    assert isinstance(parse_value("0.5"), float)
    assert parse_value("nan") != parse_value("nan")


def test_a_change_of_the_array_moves_the_energies_as_a_case_with_that_array_does():
    hw = hwmodels.load_accelerator("aie2")
    changes = {"datapath.acc_bits": 20, "datapath.products_per_add": 1}
    changed = hwmodels.with_overrides(hw, changes)
    by_case = hwmodels.machine_with_array(hw, changed.datapath)
    assert [mode.energy_pj_per_mac for mode in changed.modes] == [
        mode.energy_pj_per_mac for mode in by_case.modes
    ]
    own = {mode.name: mode.energy_pj_per_mac for mode in hw.modes}
    for mode in changed.modes:
        moved = mode.energy_pj_per_mac != own[mode.name]
        assert moved == (mode.kind == "int"), mode.name
    # A case of the changed machine with its array costs no less and no more.
    assert hwmodels.machine_with_array(changed, changed.datapath) is changed
    assert hwmodels.with_overrides(changed, {"clock_hz": 1.5e9}).modes == changed.modes


def test_an_energy_that_a_change_states_stays_as_stated():
    hw = hwmodels.load_accelerator("aie2")
    stated = {"modes.int8.energy_pj_per_mac": 0.5, "datapath.acc_bits": 20}
    modes = {mode.name: mode for mode in hwmodels.with_overrides(hw, stated).modes}
    assert modes["int8"].energy_pj_per_mac == 0.5
    bare = hwmodels.with_overrides(hw, {"energy.node_nm": 10.0, "datapath.acc_bits": 20})
    assert bare.modes == hw.modes


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("acc_bits", 8, 64),
        ("products_per_add", 1, 64),
        ("accumulators", 1, 64),
        ("tree_bits", 2, 64),
    ],
)
def test_a_file_takes_the_arrays_that_the_emulator_takes_and_no_other(field, least, most):
    import loraq_sim as lq

    hw = hwmodels.load_accelerator("aie2")
    for value in (least, most):
        changed = hwmodels.with_overrides(hw, {f"datapath.{field}": value})
        assert getattr(changed.datapath, field) == value
        lq.MacArray(**{field: value})
    for value in (least - 1, most + 1, 8000):
        with pytest.raises(hwmodels.AcceleratorError, match=rf"datapath\.{field}"):
            hwmodels.with_overrides(hw, {f"datapath.{field}": value})
        with pytest.raises(lq.LoraqError, match=field):
            lq.MacArray(**{field: value})


def test_two_and_two_point_zero_are_one_description():
    content = hwmodels.load_accelerator("aie2").model_dump(by_alias=True)
    variant = {"name": "v", "source": "test", "confidence": "given"}

    def digest(number):
        variants = ({**variant, "set": {"units.clock_hz": number}},)
        return hwmodels.Accelerator.model_validate(content | {"variants": variants}).digest()

    assert digest(2_000_000_000) == digest(2e9) != digest(2_000_000_001)


@pytest.mark.parametrize("key", ["tile_m_max_rows", "tile_n_max_columns"])
def test_more_tiles_than_a_search_can_try_are_refused_as_they_are_read(key):
    hw = hwmodels.load_accelerator("aie2")
    changed = hwmodels.with_overrides(hw, {f"kernel.{key}": 1024})
    assert getattr(changed.kernel, key) == 1024
    with pytest.raises(
        hwmodels.AcceleratorError, match=r"shapes, of which a search tries at most 65,536"
    ):
        hwmodels.with_overrides(hw, {f"kernel.{key}": 10**9})
