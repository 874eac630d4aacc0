"""Evaluate a netlist for many cycles at once, a bit a cycle, and count what each net toggles.

A word holds 64 cycles, the first in its lowest bit. Gates come in an order in which each reads only
nets that are known. `settle` takes every gate to its last value of the cycle (no delay: no
glitches); `ripple` lets each gate answer one step after its inputs, so that glitches count.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["OPERATIONS", "ripple", "settle"]

# Gates by number: the order of the tests in `_gate_word`.
OPERATIONS = (
    *("$_BUF_", "$_NOT_", "$_NAND_", "$_NOR_", "$_AND_", "$_OR_", "$_XOR_", "$_XNOR_"),
    *("$_AOI3_", "$_OAI3_", "$_AOI4_", "$_OAI4_", "$_NMUX_", "$_MUX_"),
)
_BLOCK = 32


@njit(cache=True)
def _gate_row(kind, a, b, c, d, out):
    """out = gate(a, b, c, d), word by word; the branch is outside of the loop, which vectorizes."""
    n = out.size
    if kind == 0:
        for j in range(n):
            out[j] = a[j]
    elif kind == 1:
        for j in range(n):
            out[j] = ~a[j]
    elif kind == 2:
        for j in range(n):
            out[j] = ~(a[j] & b[j])
    elif kind == 3:
        for j in range(n):
            out[j] = ~(a[j] | b[j])
    elif kind == 4:
        for j in range(n):
            out[j] = a[j] & b[j]
    elif kind == 5:
        for j in range(n):
            out[j] = a[j] | b[j]
    elif kind == 6:
        for j in range(n):
            out[j] = a[j] ^ b[j]
    elif kind == 7:
        for j in range(n):
            out[j] = ~(a[j] ^ b[j])
    elif kind == 8:
        for j in range(n):
            out[j] = ~((a[j] & b[j]) | c[j])
    elif kind == 9:
        for j in range(n):
            out[j] = ~((a[j] | b[j]) & c[j])
    elif kind == 10:
        for j in range(n):
            out[j] = ~((a[j] & b[j]) | (c[j] & d[j]))
    elif kind == 11:
        for j in range(n):
            out[j] = ~((a[j] | b[j]) & (c[j] | d[j]))
    elif kind == 12:
        for j in range(n):
            out[j] = ~((a[j] & ~c[j]) | (b[j] & c[j]))
    else:
        for j in range(n):
            out[j] = (a[j] & ~c[j]) | (b[j] & c[j])


@njit(cache=True)
def _ones(word):
    """Number of bits that are set in a uint64."""
    one, two, four = np.uint64(1), np.uint64(2), np.uint64(4)
    word -= (word >> one) & np.uint64(0x5555555555555555)
    pairs = np.uint64(0x3333333333333333)
    word = (word & pairs) + ((word >> two) & pairs)
    word = (word + (word >> four)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True)
def settle(kinds, reads, drives, given, words, n_nets, watched):
    """Toggles of every net, and the words of watched nets.

    kinds (G,) uint8, reads (G, 4) int32 and drives (G,) int32 are the gates. given (I,) int32 are
    the nets that `words` (I, W) uint64 hold; behind the last cycle they repeat it. watched (V,)
    int32. Returns (n_nets,) int64 and (V, W) uint64.
    """
    n_words = words.shape[1]
    toggles = np.zeros(n_nets, np.int64)
    seen = np.empty((watched.size, n_words), np.uint64)
    values = np.zeros((n_nets, _BLOCK), np.uint64)
    last = np.zeros(n_nets, np.uint64)
    one, top = np.uint64(1), np.uint64(63)
    for start in range(0, n_words, _BLOCK):
        size = min(_BLOCK, n_words - start)
        for i in range(given.size):
            values[given[i], :size] = words[i, start : start + size]
        for g in range(kinds.size):
            _gate_row(
                kinds[g],
                values[reads[g, 0], :size],
                values[reads[g, 1], :size],
                values[reads[g, 2], :size],
                values[reads[g, 3], :size],
                values[drives[g], :size],
            )
        for net in range(n_nets):
            row = values[net]
            # Nothing comes before the first cycle, so that it cannot toggle.
            before = (row[0] & one) if start == 0 else last[net]
            count = _ones(row[0] ^ ((row[0] << one) | before))
            for j in range(1, size):
                count += _ones(row[j] ^ ((row[j] << one) | (row[j - 1] >> top)))
            toggles[net] += count
            last[net] = row[size - 1] >> top
        for v in range(watched.size):
            seen[v, start : start + size] = values[watched[v], :size]
    return toggles, seen


@njit(cache=True)
def ripple(kinds, reads, drives, given, words, n_nets, n_steps):
    """Toggles of every net with one step of delay a gate, glitches and all: (n_nets,) int64.

    Every change from one cycle to the next is played on its own: nets start at their last values of
    the cycle before, inputs change, and gates follow for `n_steps` (the depth of the netlist).
    Arguments as for `settle`.
    """
    n_words = words.shape[1]
    toggles = np.zeros(n_nets, np.int64)
    settled = np.zeros((n_nets, _BLOCK), np.uint64)
    last = np.zeros(n_nets, np.uint64)
    now = np.zeros((n_nets, _BLOCK), np.uint64)
    new = np.zeros((kinds.size, _BLOCK), np.uint64)
    one, top = np.uint64(1), np.uint64(63)
    for start in range(0, n_words, _BLOCK):
        size = min(_BLOCK, n_words - start)
        for i in range(given.size):
            settled[given[i], :size] = words[i, start : start + size]
        for g in range(kinds.size):
            _gate_row(
                kinds[g],
                settled[reads[g, 0], :size],
                settled[reads[g, 1], :size],
                settled[reads[g, 2], :size],
                settled[reads[g, 3], :size],
                settled[drives[g], :size],
            )
        for net in range(n_nets):
            row = settled[net]
            before = (row[0] & one) if start == 0 else last[net]
            now[net, 0] = (row[0] << one) | before
            for j in range(1, size):
                now[net, j] = (row[j] << one) | (row[j - 1] >> top)
            last[net] = row[size - 1] >> top
        for i in range(given.size):
            net = given[i]
            for j in range(size):
                toggles[net] += _ones(now[net, j] ^ settled[net, j])
                now[net, j] = settled[net, j]
        for _ in range(n_steps):
            changed = False
            for g in range(kinds.size):
                _gate_row(
                    kinds[g],
                    now[reads[g, 0], :size],
                    now[reads[g, 1], :size],
                    now[reads[g, 2], :size],
                    now[reads[g, 3], :size],
                    new[g, :size],
                )
            for g in range(kinds.size):
                net = drives[g]
                for j in range(size):
                    change = now[net, j] ^ new[g, j]
                    if change:
                        changed = True
                        toggles[net] += _ones(change)
                        now[net, j] = new[g, j]
            if not changed:
                break
    return toggles
