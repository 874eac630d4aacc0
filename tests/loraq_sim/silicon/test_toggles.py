"""Toggles of netlists against gates evaluated one by one in Python; energy of a trained layer."""

import numpy as np
import pytest

import loraq_sim as lq
from hwmodels.gates import Column
from loraq_sim.errors import InputError
from loraq_sim.kernels.toggles import OPERATIONS, ripple, settle
from loraq_sim.silicon.netlist import GATES, packed_netlist, unpacked_netlist
from loraq_sim.silicon.synthesize import kept_netlists
from loraq_sim.silicon.toggles import (
    activity,
    clocked_units,
    column_cycles,
    layer_energy,
    toggle_energy,
)

SMALL = Column(a_bits=4, w_bits=4, acc_bits=24)
# What each gate computes, from its name alone: the oracle shares no code with the kernels.
ORACLE = {
    "$_BUF_": lambda a: a,
    "$_NOT_": lambda a: 1 - a,
    "$_NAND_": lambda a, b: 1 - a * b,
    "$_NOR_": lambda a, b: int(a + b == 0),
    "$_AND_": lambda a, b: a * b,
    "$_OR_": lambda a, b: int(a + b > 0),
    "$_XOR_": lambda a, b: int(a != b),
    "$_XNOR_": lambda a, b: int(a == b),
    "$_AOI3_": lambda a, b, c: int(a * b + c == 0),
    "$_OAI3_": lambda a, b, c: 1 - int(a + b > 0) * c,
    "$_AOI4_": lambda a, b, c, d: int(a * b + c * d == 0),
    "$_OAI4_": lambda a, b, c, d: 1 - int(a + b > 0) * int(c + d > 0),
    "$_NMUX_": lambda a, b, s: 1 - (b if s else a),
    "$_MUX_": lambda a, b, s: b if s else a,
}
PINS = {"$_XOR_": 2.0, "$_XNOR_": 2.0, "$_MUX_": 1.5, "$_NMUX_": 1.5}


def codes(bits, shape, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)


def nets_of(netlist, cycles, t, bits):
    """Every net of one cycle, gate by gate."""
    nets = dict(netlist.constants)
    for name in ("clk", "load", "merge", "init"):
        nets |= dict.fromkeys(netlist.ports.get(name, ()), 0)
    state = int(cycles.before[t])
    nets |= {net: (state >> i) & 1 for i, net in enumerate(netlist.ports["result"])}
    for name, width, lanes in (("a", bits[0], cycles.a[t]), ("w", bits[1], cycles.w[t])):
        for lane, code in enumerate(lanes.tolist()):
            for i in range(width):
                nets[netlist.ports[name][lane * width + i]] = (code >> i) & 1
    for gate in netlist.gates:
        nets[gate.output] = ORACLE[gate.kind](*(nets[net] for net in gate.inputs))
    return nets


def oracle_units(netlist, cycles, bits):
    """Energy of all cycles: every net that differs from the cycle before moves what it drives."""
    loads = {}
    for gate in netlist.gates:
        loads[gate.output] = loads.get(gate.output, 0) + 1.0
        for net in gate.inputs:
            loads[net] = loads.get(net, 0) + PINS.get(gate.kind, 1.0) + 0.5
    for data, output in netlist.registers:
        loads[data] = loads.get(data, 0) + 1.5
        loads[output] = loads.get(output, 0) + 1.0
    total = 0.0
    before = nets_of(netlist, cycles, 0, bits)
    for t in range(1, len(cycles.before)):
        now = nets_of(netlist, cycles, t, bits)
        total += sum(loads.get(net, 0) for net in now if now[net] != before[net])
        total += 4.0 * len(netlist.registers)
        before = now
    return total


def test_operations_and_counted_gates_are_the_same_set():
    assert set(OPERATIONS) == set(GATES) == set(ORACLE)


@pytest.mark.parametrize(
    ("column", "dataflow", "k"),
    [
        (SMALL, "output", 23),
        (SMALL, "weight", 17),
        (Column(a_bits=4, w_bits=4, products_per_add=8, acc_bits=24), "output", 43),
        (
            Column(a_bits=4, w_bits=4, products_per_add=8, acc_bits=16, overflow="saturate"),
            "output",
            64,
        ),
    ],
    ids=["single", "weights-held", "tree", "saturating"],
)
def test_toggles_are_those_of_gates_evaluated_one_by_one(column, dataflow, k):
    netlist = kept_netlists()[column]
    mac = lq.MacArray(
        acc_bits=column.acc_bits,
        overflow=column.overflow,
        products_per_add=column.products_per_add,
    )
    # 3 x 2 outputs: cycles that fill no whole word.
    cycles = column_cycles(codes(4, (3, k), 1), codes(4, (2, k), 2), mac, dataflow=dataflow)
    energy = toggle_energy(netlist, cycles, a_bits=4, w_bits=4)
    assert energy.cycles == len(cycles.before) - 1
    assert sum(energy.units.values()) == pytest.approx(oracle_units(netlist, cycles, (4, 4)))


def test_accumulators_are_exact_sums_that_start_again_with_each_group():
    a, w = codes(4, (3, 20), 5), codes(4, (2, 20), 6)
    mac = lq.MacArray(acc_bits=16, products_per_add=3)
    cycles = column_cycles(a, w, mac, group=8)
    t = 0
    for m in range(3):
        for n in range(2):
            for first in (0, 8, 16):
                total = 0
                for low in range(first, min(first + 8, 20), 3):
                    high = min(low + 3, first + 8, 20)
                    assert cycles.before[t] == total
                    total += int(a[m, low:high] @ w[n, low:high])
                    assert cycles.after[t] == total
                    assert cycles.a[t, : high - low].tolist() == a[m, low:high].tolist()
                    assert not cycles.a[t, high - low :].any()
                    t += 1
    assert t == len(cycles.before)


def test_a_column_that_holds_its_weights_sees_all_rows_before_the_next_ones():
    a, w = codes(4, (3, 8), 7), codes(4, (2, 8), 8)
    mac = lq.MacArray(acc_bits=16, products_per_add=4)
    held = column_cycles(a, w, mac, dataflow="weight")
    t = 0
    for n in range(2):
        for low in (0, 4):
            for m in range(3):
                assert held.w[t].tolist() == w[n, low : low + 4].tolist()
                assert held.a[t].tolist() == a[m, low : low + 4].tolist()
                assert held.before[t] == int(a[m, :low] @ w[n, :low])
                assert held.after[t] == int(a[m, : low + 4] @ w[n, : low + 4])
                t += 1
    assert t == len(held.before)


def test_operands_that_never_change_cost_the_accumulator_alone():
    netlist = kept_netlists()[SMALL]
    mac = lq.MacArray(acc_bits=24)
    same = np.full((1, 200), 3)
    energy = toggle_energy(netlist, column_cycles(same, same, mac), a_bits=4, w_bits=4)
    assert energy.units["multiplier"] == 0 < energy.units["accumulator"]
    random = column_cycles(codes(4, (1, 200), 1), codes(4, (1, 200), 2), mac)
    assert toggle_energy(netlist, random, a_bits=4, w_bits=4).units_per_mac > energy.units_per_mac


def test_glitches_never_make_energy_smaller():
    netlist = kept_netlists()[SMALL]
    cycles = column_cycles(codes(4, (2, 50), 3), codes(4, (2, 50), 4), lq.MacArray(acc_bits=24))
    quiet = toggle_energy(netlist, cycles, a_bits=4, w_bits=4)
    glitchy = toggle_energy(netlist, cycles, a_bits=4, w_bits=4, glitches=True)
    assert all(glitchy.units[part] >= units for part, units in quiet.units.items())
    assert glitchy.units["multiplier"] > quiet.units["multiplier"]


def random_gates(rng, n_inputs, n_gates):
    """Gates in order: kind, up to four nets read, the net driven."""
    kinds = list(OPERATIONS)
    return [
        (str(rng.choice(kinds)), rng.integers(0, n_inputs + g, 4).tolist(), n_inputs + g)
        for g in range(n_gates)
    ]


def value_of(kind, reads, nets):
    arity = ORACLE[kind].__code__.co_argcount
    return ORACLE[kind](*(nets[net] for net in reads[:arity]))


def changes_of(gates, cycles, steps):
    """Changes of every net: all gates answer one step after their inputs, or (0 steps) at once."""
    nets, counts = dict(enumerate(cycles[0])), {}
    for kind, reads, output in gates:
        nets[output] = value_of(kind, reads, nets)
    for inputs in cycles[1:]:
        before = dict(nets)
        nets |= dict(enumerate(inputs))
        if steps == 0:
            for kind, reads, output in gates:
                nets[output] = value_of(kind, reads, nets)
        changed = [net for net in nets if nets[net] != before[net]]
        for _ in range(steps):
            now = {output: value_of(kind, reads, nets) for kind, reads, output in gates}
            changed += [net for net, value in now.items() if value != nets[net]]
            nets |= now
        for net in changed:
            counts[net] = counts.get(net, 0) + 1
    return [counts.get(net, 0) for net in range(len(nets))]


@pytest.mark.parametrize("seed", range(4))
def test_changes_with_and_without_glitches_are_those_of_gates_played_step_by_step(seed):
    rng = np.random.default_rng(seed)
    n_inputs, n_gates, n_cycles = 6, 40, 70
    gates = random_gates(rng, n_inputs, n_gates)
    cycles = rng.integers(0, 2, (n_cycles, n_inputs))
    words = np.zeros((n_inputs, 2), np.uint64)
    for t in range(128):
        for net, bit in enumerate(cycles[min(t, n_cycles - 1)].tolist()):
            words[net, t // 64] |= np.uint64(bit << (t % 64))
    program = (
        np.array([OPERATIONS.index(kind) for kind, _, _ in gates], np.uint8),
        np.array([reads for _, reads, _ in gates], np.int32),
        np.array([output for _, _, output in gates], np.int32),
        np.arange(n_inputs, dtype=np.int32),
        words,
        n_inputs + n_gates,
    )
    quiet, _ = settle(*program, np.zeros(0, np.int32))
    assert quiet.tolist() == changes_of(gates, cycles.tolist(), 0)
    glitchy = ripple(*program, n_gates)
    assert glitchy.tolist() == changes_of(gates, cycles.tolist(), n_gates)
    assert glitchy.sum() > quiet.sum()


def test_registers_that_are_played_take_what_known_accumulators_take():
    netlist = kept_netlists()[SMALL]
    a, w = codes(4, (1, 40), 9), codes(4, (1, 40), 10)
    known = toggle_energy(
        netlist, column_cycles(a, w, lq.MacArray(acc_bits=24)), a_bits=4, w_bits=4
    )
    # All 64 runs alike, the accumulator from zero by its own gates.
    words = {
        name: np.array([[-(code >> i & 1) for i in range(4)] for code in row]).astype(np.uint64)
        for name, row in (("a", a[0].tolist()), ("w", w[0].tolist()))
    }
    assert clocked_units(netlist, words) == pytest.approx(sum(known.units.values()) / known.cycles)


def test_a_netlist_of_another_array_is_refused():
    netlist = kept_netlists()[Column(a_bits=4, w_bits=4, products_per_add=8, acc_bits=24)]
    wide = codes(4, (4, 64), 1) * 0 + 7
    cycles = column_cycles(wide, wide, lq.MacArray(acc_bits=8, products_per_add=8))
    with pytest.raises(InputError, match="adds otherwise than the emulated array"):
        toggle_energy(netlist, cycles, a_bits=4, w_bits=4)
    with pytest.raises(InputError, match="the netlist takes 32 bits of a a cycle"):
        toggle_energy(netlist, cycles, a_bits=8, w_bits=4)


def test_packing_a_netlist_keeps_it():
    netlist = kept_netlists()[SMALL]
    again = unpacked_netlist(packed_netlist(netlist))
    assert again.transistors == netlist.transistors
    assert again.depth == netlist.depth
    assert again.ports == netlist.ports


@pytest.mark.parametrize(("split", "bits"), [("W4A4", (4, 4)), ("W8A8", (8, 8))])
def test_a_trained_layer_has_an_energy_of_its_own(split, bits):
    dump = lq.read_layer_dump("examples/tiny_pixart.pt")
    mac = lq.MacArray(acc_bits=24, products_per_add=8)
    layer = dump["transformer_blocks.0.attn1.to_q"]
    found = layer_energy(layer, lq.parse_split(split), mac, node_nm=7, cycles=4096)
    assert 0 < found.pj_per_mac < found.random_pj_per_mac
    assert found.glitch_factor > 1
    assert sum(found.parts.values()) == pytest.approx(found.pj_per_mac)
    finer = layer_energy(layer, lq.parse_split(split), mac, node_nm=5, cycles=4096)
    assert finer.pj_per_mac < found.pj_per_mac


def test_what_has_no_toggles_is_refused_in_one_line():
    weight = np.ones((4, 64), np.float32)
    mac = lq.MacArray(acc_bits=24, products_per_add=8)
    bare = lq.Layer(name="bare", weight=weight)
    with pytest.raises(InputError, match="layer 'bare' has no activations"):
        layer_energy(bare, lq.parse_split("W4A4"), mac)
    full = lq.Layer(name="full", weight=weight, activations=np.ones((8, 64), np.float32))
    with pytest.raises(InputError, match="toggles need symmetric integers"):
        layer_energy(full, lq.parse_split("W4A4", family="mxfp"), mac)
    with pytest.raises(InputError, match="one accumulator, got 2"):
        column_cycles(weight.astype(int), weight.astype(int), lq.MacArray(accumulators=2))


def test_the_model_ships_the_activity_of_random_operands():
    from hwmodels.gates import units_per_transistor

    for part, share in activity()["units_per_transistor"].items():
        assert units_per_transistor(part) == pytest.approx(share, rel=1e-6)
