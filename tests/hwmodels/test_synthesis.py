"""Gates of arrays: the table, the closed form between its rows, laws, nodes, messages."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

import hwmodels
from hwmodels.gates import (
    COLUMN_PARTS,
    GATES_CSV,
    Column,
    GroupSum,
    Narrowing,
    gates_text,
    modeled,
    read_gates,
    units_per_transistor,
)
from hwmodels.synthesis import column_of, unit_gates

TABLE, NOTES = read_gates()
COLUMNS = [unit for unit in TABLE if isinstance(unit, Column)]


def array_of(**fields):
    usual = {"acc_bits": 32, "overflow": "wrap", "products_per_add": 1, "accumulators": 1}
    return SimpleNamespace(**usual | {"tree_bits": None, "tree_overflow": None} | fields)


def test_the_table_has_many_columns_and_the_units_around_them():
    assert len(COLUMNS) >= 150
    for rare in ("zero_point", "tree_bits"):
        assert sum(bool(getattr(unit, rare)) for unit in COLUMNS) >= 6
    assert sum(unit.overflow == "saturate_symmetric" for unit in COLUMNS) >= 6
    assert sum(unit.accumulators > 1 for unit in COLUMNS) >= 6
    assert any(isinstance(unit, Narrowing) for unit in TABLE)
    assert any(isinstance(unit, GroupSum) for unit in TABLE)
    assert any("loraq-sim hw synth --fill" in note for note in NOTES)
    assert any(note.startswith("Yosys ") for note in NOTES)


def test_a_table_written_and_read_again_is_the_same(tmp_path):
    path = tmp_path / "gates.csv"
    path.write_text(gates_text(TABLE, NOTES))
    assert read_gates(path) == (TABLE, NOTES)
    assert path.read_bytes() == GATES_CSV.read_bytes()


def test_a_broken_table_says_which_line(tmp_path):
    path = tmp_path / "gates.csv"
    path.write_text(
        gates_text(TABLE, NOTES).replace("column,8,8,1,1,1,1,16,", "column,8,x,1,1,", 1)
    )
    with pytest.raises(hwmodels.AcceleratorError, match=r"gates\.csv: line \d+ is no row of gates"):
        read_gates(path)


def test_a_row_of_the_table_is_returned_as_synthesized():
    array = hwmodels.synthesized_array(array_of(acc_bits=20, products_per_add=8))
    gates = TABLE[Column(acc_bits=20, products_per_add=8)]
    assert array.is_synthesized
    assert array.source == "synthesized"
    assert array.column_ge == gates.transistors / 4
    assert array.area_ge == array.gate_equivalents == gates.transistors / 4 / 8
    assert array.depth == gates.depth
    assert array.flip_flops == 20
    parts = ("multiplier", "tree", "accumulator", "saturation")
    assert sum(array.parts[part] for part in parts) == pytest.approx(array.area_ge)
    assert array.parts["srs"] > 0
    assert array.parts["group_sum"] > 0
    assert array.merged_ge == gates.merged_transistors / 4


def test_what_the_table_lacks_is_modeled_and_said():
    array = hwmodels.synthesized_array(array_of(acc_bits=21, products_per_add=8), a_bits=7)
    assert not array.is_synthesized
    assert array.source == "modeled"
    assert array.merged_ge is None


def test_a_narrow_saturating_accumulator_saves_behind_one_product_and_nothing_behind_eight():
    def column(a, w, count, bits, rule):
        mac = array_of(acc_bits=bits, overflow=rule, products_per_add=count)
        return hwmodels.synthesized_array(mac, a_bits=a, w_bits=w).area_ge

    alone = 1 - column(8, 8, 1, 16, "saturate") / column(8, 8, 1, 32, "wrap")
    behind_tree = 1 - column(8, 8, 8, 16, "saturate") / column(8, 8, 8, 32, "wrap")
    small = 1 - column(4, 4, 1, 16, "saturate") / column(4, 4, 1, 32, "wrap")
    assert 0.15 < alone < 0.3
    assert behind_tree < 0.05
    assert small > 0.3


def test_merging_multiply_and_add_makes_the_accumulator_seem_to_save_more():
    def saved(field):
        wide, narrow = (TABLE[Column(acc_bits=bits)] for bits in (32, 16))
        return 1 - getattr(narrow, field) / getattr(wide, field)

    assert saved("merged_transistors") > 1.4 * saved("transistors")


@pytest.mark.parametrize(
    ("a", "w", "rule"),
    list(itertools.product((4, 8), (4, 7, 8), ("wrap", "saturate", "saturate_symmetric"))),
)
def test_a_wider_accumulator_is_never_smaller(a, w, rule):
    for count in (1, 3, 8):
        areas = [
            hwmodels.synthesized_array(
                array_of(acc_bits=bits, overflow=rule, products_per_add=count), a_bits=a, w_bits=w
            ).area_ge
            for bits in range(8, 65)
        ]
        assert areas == sorted(areas), (count, areas)


@pytest.mark.parametrize("bits", [16, 20, 32])
@pytest.mark.parametrize("rule", ["wrap", "saturate"])
def test_wider_operands_more_products_and_more_accumulators_are_never_smaller(bits, rule):
    mac = array_of(acc_bits=bits, overflow=rule)
    for other in (2, 4, 8, 11):
        for field, constant in (("a_bits", "w_bits"), ("w_bits", "a_bits")):
            areas = [
                hwmodels.synthesized_array(mac, **{field: width, constant: other}).area_ge
                for width in range(2, 17)
            ]
            assert areas == sorted(areas), (field, other, areas)
    for field in ("products_per_add", "accumulators"):
        areas = [
            hwmodels.synthesized_array(
                array_of(acc_bits=bits, overflow=rule, **{field: count})
            ).column_ge
            for count in range(1, 33)
        ]
        assert areas == sorted(areas), (field, areas)


def test_saturation_and_a_zero_point_cost_something():
    for bits in (14, 16, 21, 32):
        plain = hwmodels.synthesized_array(array_of(acc_bits=bits))
        clamped = hwmodels.synthesized_array(array_of(acc_bits=bits, overflow="saturate"))
        assert clamped.area_ge > plain.area_ge
        assert clamped.parts["saturation"] > 0 == plain.parts["saturation"]
        started = hwmodels.synthesized_array(array_of(acc_bits=bits), zero_point=True)
        assert started.area_ge >= plain.area_ge
        assert plain.parts["zero_point"] == pytest.approx(
            max(started.area_ge - plain.area_ge, 0), abs=2e-6
        )


def test_rows_of_the_table_lie_near_the_closed_form():
    errors = []
    for unit, gates in TABLE.items():
        parts, flip_flops, _ = modeled(unit)
        errors.append(abs(sum(parts.values()) / gates.transistors - 1))
        assert flip_flops == gates.flip_flops, unit
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) < 0.12


def test_units_of_one_part_report_that_part():
    narrow, wide = (unit_gates(Narrowing(acc_bits=bits))[0] for bits in (16, 32))
    assert list(narrow) == ["srs"]
    assert narrow["srs"] < wide["srs"]
    assert list(unit_gates(GroupSum())[0]) == ["group_sum"]
    floor = unit_gates(Narrowing(modes="floor"))[0]["srs"]
    assert floor < unit_gates(Narrowing())[0]["srs"] <= unit_gates(Narrowing(modes="all"))[0]["srs"]


@pytest.mark.parametrize("rule", ["wrap", "saturate"])
@pytest.mark.parametrize(
    ("field", "widths"),
    [("acc_bits", range(8, 49)), ("wide_bits", range(8, 65)), ("shift_bits", range(6))],
)
def test_a_wider_group_sum_is_never_smaller(field, widths, rule):
    for usual in (GroupSum(), GroupSum(acc_bits=24, shift_bits=4, wide_bits=48)):
        areas = [
            sum(modeled(replace(usual, overflow=rule, **{field: width}))[0].values())
            for width in widths
        ]
        assert areas == sorted(areas), areas


def test_a_tree_that_never_narrows_is_an_exact_tree():
    wide = column_of(array_of(products_per_add=8, tree_bits=40))
    assert wide == column_of(array_of(products_per_add=8))
    narrow = column_of(array_of(products_per_add=8, tree_bits=15, overflow="saturate"))
    assert (narrow.tree_bits, narrow.tree_overflow) == (15, "saturate")


def test_three_accumulators_are_built_as_four():
    three, four, five = (
        hwmodels.synthesized_array(array_of(accumulators=count, acc_bits=20), a_bits=4, w_bits=4)
        for count in (3, 4, 5)
    )
    assert three.flip_flops == four.flip_flops == 4 * 20 + 2 * 2
    assert three.area_ge == four.area_ge < five.area_ge
    assert five.flip_flops == 8 * 20 + 2 * 3


def test_area_and_energy_of_a_node_are_what_its_figures_say():
    node, array = hwmodels.load_node(28), hwmodels.synthesized_array(node_nm=28)
    assert array.area_um2 == pytest.approx(array.area_ge * 0.316 / 0.7)
    assert array.area_mm2(1000) == pytest.approx(array.area_um2 * 1e-3)
    # 1 KiB: 8192 cells of 0.127 um2, which fill half of the macro.
    assert node.sram_mm2(1024) == pytest.approx(8192 * 0.127 / 0.5 * 1e-6)
    # A column of one product: the product at the node's figure, and all other parts on top.
    product = array.parts["multiplier"] * units_per_transistor("multiplier")
    clamped = hwmodels.synthesized_array(array_of(overflow="saturate"), node_nm=28)
    assert clamped.parts["saturation"] > 0
    for column in (array, clamped):
        whole = sum(column.parts[part] * units_per_transistor(part) for part in COLUMN_PARTS)
        assert column.energy_pj_per_mac == pytest.approx(0.153 * whole / product)


def test_a_chip_is_the_sum_of_what_stands_on_it():
    hw = hwmodels.load_accelerator("aie2")
    parts, node = hwmodels.chip_area(hw), hwmodels.load_node(7)
    gates = behind = 0.0
    for mode in hw.modes:
        if mode.kind == "int":
            array = hwmodels.synthesized_array(
                hw.datapath, a_bits=mode.activation_bits, w_bits=mode.weight_bits
            )
            macs = mode.macs_per_cycle * hw.units.count
            gates += array.area_ge * macs
            behind += (array.parts["srs"] + array.parts["group_sum"]) * macs
    assert parts["array"] == pytest.approx(node.logic_mm2(gates))
    assert parts["columns"] == pytest.approx(node.logic_mm2(behind))
    held = hw.memories.l1.capacity_bytes * hw.units.count + hw.memories.l2.capacity_bytes
    assert parts["sram"] == pytest.approx(node.sram_mm2(held))
    lanes = hw.vector.combine_elements_per_cycle * hw.units.count
    assert parts["vector"] == pytest.approx(node.logic_mm2(lanes * node.fp32_lane_ge))


def test_a_wide_accumulator_behind_columns_is_the_group_sum():
    column = array_of(acc_bits=20)
    two = SimpleNamespace(column=column, acc_bits=32, overflow="wrap", accumulators=1)
    array = hwmodels.synthesized_array(two)
    assert array.column.acc_bits == 20
    assert array.parts["group_sum"] == pytest.approx(
        sum(unit_gates(GroupSum(acc_bits=20, wide_bits=32))[0].values()) / 4
    )


def test_a_node_gives_area_and_energy_and_finer_nodes_less_of_both():
    arrays = [hwmodels.synthesized_array(node_nm=node) for node in hwmodels.node_names()]
    assert hwmodels.node_names() == [45, 28, 22, 16, 12, 7, 5, 4, 3]
    assert [a.area_um2 for a in arrays] == sorted((a.area_um2 for a in arrays), reverse=True)
    energies = [array.energy_pj_per_mac for array in arrays]
    assert energies == sorted(energies, reverse=True)
    assert arrays[0].area_mm2(1024) == pytest.approx(arrays[0].area_um2 * 1024e-6)
    # 45 nm: one product is 0.2 pJ, the add of 32 bits 0.1 pJ (Horowitz 2014); the column has both.
    assert 0.2 < energies[0] < 0.5
    for node in hwmodels.node_names():
        figures = hwmodels.load_node(node)
        assert all(figures.sources.values())
        assert all(figures.confidence.values())
    bare = hwmodels.synthesized_array()
    assert bare.area_um2 is None
    assert bare.energy_pj_per_mac is None
    assert bare.area_mm2(4) is None


def test_every_shipped_machine_has_an_area():
    work = hwmodels.GemmWorkload(m=8, n=8, k=8, main="W8A8", branch=None, rank=0)
    for name in hwmodels.list_accelerators():
        hw = hwmodels.load_accelerator(name)
        cost = hwmodels.array_of(work, hw)
        assert cost is None or cost.area_mm2 > 0, name
        assert hwmodels.load_node(int(hw.energy.node_nm)).confidence["nand2_um2"]


def test_narrower_operands_take_less_energy():
    pj = [
        hwmodels.synthesized_array(
            array_of(products_per_add=8, acc_bits=24), a_bits=a, w_bits=w, node_nm=7
        ).energy_pj_per_mac
        for a, w in ((4, 4), (8, 4), (8, 8))
    ]
    assert pj == sorted(pj)
    assert pj[2] > 2.5 * pj[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"a_bits": 1}, r"a_bits must be a whole number from 2 to 16, got 1"),
        ({"w_bits": 17}, r"w_bits must be a whole number from 2 to 16, got 17"),
        ({"a_bits": True}, r"a_bits must be a whole number"),
        ({"a_bits": 7.5}, r"a_bits must be a whole number"),
        ({"out_bits": 0}, r"out_bits must be a whole number from 2 to 32, got 0"),
        ({"rounding": "nearest"}, r"rounding 'nearest'"),
        (
            {"node_nm": 6},
            r"a node of 6 nm; known: 45, 28, 22, 16, 12, 7, 5, 4, 3; nearest: 7 or 5",
        ),
        ({"node_nm": "7"}, r"no figures for a node of '7' nm"),
        ({"mac": array_of(acc_bits=4)}, r"acc_bits must be a whole number from 8 to 64, got 4"),
        ({"mac": array_of(overflow="clip")}, r"overflow 'clip'"),
        ({"mac": array_of(products_per_add=0)}, r"products_per_add must be .* from 1 to 64, got 0"),
        ({"mac": array_of(accumulators=65)}, r"accumulators must be .* from 1 to 64, got 65"),
        ({"mac": array_of(tree_bits=1)}, r"tree_bits must be .* from 2 to 64, got 1"),
    ],
)
def test_bad_input_is_one_line_with_value_and_rule(settings, said):
    with pytest.raises(hwmodels.AcceleratorError, match=said) as caught:
        hwmodels.synthesized_array(**settings)
    assert "\n" not in str(caught.value)


def test_measured_rows_keep_the_law_among_themselves():
    for narrow, gates in TABLE.items():
        if not isinstance(narrow, Column):
            continue
        for bits in (4, 8, 16, 32):
            wide = replace(narrow, acc_bits=narrow.acc_bits + bits)
            if wide in TABLE:
                assert TABLE[wide].transistors >= gates.transistors, (narrow, wide)


class _Mac:
    def __init__(self, **fields):
        vars(self).update(fields)


def test_a_machine_with_another_array_takes_the_difference_in_gates():
    hw = hwmodels.load_accelerator("aie2")
    own = _Mac(acc_bits=32, overflow="wrap", products_per_add=hw.datapath.products_per_add)
    assert hwmodels.machine_with_array(hw, own) is hw
    narrow = _Mac(acc_bits=16, overflow="saturate", products_per_add=1)
    other = hwmodels.machine_with_array(hw, narrow)
    for before, after in zip(hw.modes, other.modes, strict=True):
        if before.kind == "float":
            assert after == before
            continue
        widths = {"a_bits": before.activation_bits, "w_bits": before.weight_bits}
        gates = [
            hwmodels.synthesized_array(mac, **widths, node_nm=hw.energy.node_nm).energy_pj_per_mac
            for mac in (own, narrow)
        ]
        gained = after.energy_pj_per_mac - before.energy_pj_per_mac
        assert gained == pytest.approx(gates[1] - gates[0])
        assert after.energy_pj_per_mac > 0


def test_a_node_without_figures_leaves_area_and_energy_unknown():
    hw = hwmodels.with_overrides(hwmodels.load_accelerator("b200"), {"energy.node_nm": 10.0})
    work = hwmodels.GemmWorkload(m=8, n=8, k=8, main="W8A8", branch=None, rank=0)
    narrow = _Mac(acc_bits=16, overflow="wrap", products_per_add=1)
    cost = hwmodels.array_of(work, hw, mac=narrow)
    assert cost.area_ge > 0
    assert (cost.area_mm2, cost.energy_pj_per_mac) == (None, None)
    assert hwmodels.machine_with_array(hw, narrow) is hw


def test_a_float_mode_has_no_array_of_integers():
    hw = hwmodels.load_accelerator("aie2")
    work = hwmodels.GemmWorkload(m=8, n=8, k=8, main="W16A16", branch=None, rank=0)
    assert hwmodels.array_of(work, hw) is None
