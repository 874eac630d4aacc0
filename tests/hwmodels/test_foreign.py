"""Hardware files of ZigZag, Timeloop and AccelForge as a starting machine."""

import math

import pytest

import hwmodels
from hwmodels.errors import worked_out

ZIGZAG = """
name: edge_npu
memories:
  weight_rf:
    size: 512
    r_cost: 0.08
    ports:
      - {name: r, type: read, bandwidth_min: 8, bandwidth_max: 8}
      - {name: w, type: write, bandwidth_min: 8, bandwidth_max: 16}
    operands: [I2]
    served_dimensions: []
  sram:
    size: 8388608
    r_cost: 208.0
    area: 0.5
    ports: [{name: rw, type: read_write, bandwidth_min: 64, bandwidth_max: 1024}]
    operands: [I1, O]
    served_dimensions: [D1, D2]
  dram:
    size: 10000000000
    r_cost: 700
    ports: [{name: rw, type: read_write, bandwidth_min: 64, bandwidth_max: 64}]
    operands: [I1, I2, O]
    served_dimensions: [D1, D2]
operational_array:
  input_precision: [8, 4]
  unit_energy: 0.03
  dimensions: [D1, D2]
  sizes: [16, 32]
"""
# Before ports had bandwidths; three dimensions, the last within a unit; no memory called DRAM.
OLD_ZIGZAG = """
memories:
  reg_O: {size: 32, r_bw: 32, w_bw: 32, r_cost: 0.02, served_dimensions: [D3]}
  l1: {size: 4194304, r_bw: 2048, r_cost: 22.9, served_dimensions: [D1, D2, D3]}
  far: {size: 10000000000, r_bw: 512, r_cost: 700, served_dimensions: [D1, D2, D3]}
operational_array: {unit_energy: 0.04, dimensions: [D1, D2, D3], sizes: [4, 8, 16]}
"""
TIMELOOP = """
architecture:
  version: 0.4
  nodes:
  - !Container
    name: system
    attributes: {technology: "28nm", global_cycle_seconds: 1.25e-9}
  - !Component
    name: main_memory
    class: DRAM
    attributes: &word {type: LPDDR4, width: 64, datawidth: 8, shared_bandwidth: 16}
  - !Component
    name: shared_buffer
    class: smartbuffer_SRAM
    attributes: {depth: 8192, width: 512, datawidth: 8, read_bandwidth: 64, n_banks: 8}
  - !Container
    name: column
    spatial: {meshX: 16}
  - !Container
    name: element
    spatial: {meshY: 8}
  - !Parallel
    nodes:
    - !Component
      name: weight_spad
      class: smartbuffer_RF
      attributes: {<<: *word, depth: 64, width: 8}
    - !Component
      name: psum_spad
      class: smartbuffer_RF
      attributes: {depth: 16, width: 24, datawidth: 24}
  - !Component
    name: mac
    class: intmac
    attributes: {multiplier_width: 8, datawidth: 8}
"""
OLD_TIMELOOP = """
architecture:
  version: 0.3
  subtree:
  - name: system
    local:
    - name: DRAM
      class: DRAM
      attributes: {word-bits: 16, read_bandwidth: 8}
    subtree:
    - name: accelerator
      attributes: {technology: 45nm}
      local:
      - name: GlobalBuffer
        class: SRAM
        attributes: {sizeKB: 256, word-bits: 16, read_bandwidth: 32}
      subtree:
      - name: PE[0..191]
        local:
        - name: RegisterFile
          class: regfile
          attributes: {entries: 256, width: 16, word-bits: 16}
        - name: MACC[0..3]
          class: fpmac
          attributes: {word-bits: 16}
"""
ACCELFORGE = """
arch:
  nodes:
  - !Memory
    name: MainMemory
    size: inf
    tensors: {keep: ~Intermediates, may_keep: All}
    actions:
    - {name: read, energy: 8e-12, latency: 1 / (8 * 100e9)}
    - {name: write, energy: 9e-12, latency: 1 / (8 * 90e9)}
  - !Memory
    name: Scratchpad
    size: 1024*1024*4*8
    actions:
    - {name: read, energy: 0.4e-12, throughput: 4096e9}
  - !Compute
    name: ScalarUnit
    actions: [{name: compute, energy: 0, latency: 1 / 0.8e9 / 128}]
  - !Container
    name: Cluster
    spatial: [{name: Z, fanout: 4}]
  - !Container
    name: PE
    spatial: [{name: reuse_input, fanout: 32}, {name: reuse_output, fanout: 64}]
  - !Compute
    name: MAC
    actions: [{name: compute, energy: 0.08e-12, latency: 1 / 0.8e9}]
"""


@pytest.fixture
def read(tmp_path):
    (tmp_path / "cores").mkdir()
    for name, text in CORES.items():
        (tmp_path / "cores" / f"{name}.yaml").write_text(text, encoding="utf-8")

    def read(text, **given):
        path = tmp_path / "theirs.yaml"
        path.write_text(text, encoding="utf-8")
        return hwmodels.read_foreign(path, **given)

    return read


def numbers(hw):
    return {
        "units": (hw.units.rows, hw.units.columns, hw.modes[0].macs_per_cycle),
        "mode": hw.modes[0].name,
        "clock": hw.units.clock_hz,
        "l1": hw.memories.l1.capacity_bytes,
        "l2": hw.memories.l2.capacity_bytes,
        "l2 rate": hw.memories.l2.bandwidth_bytes_per_cycle,
        "dram": hw.memories.dram.bandwidth_bytes_per_s,
    }


# Eight tiles of 64 MACs in four columns, two shared buffers, a port to DRAM; files beside it.
STREAM = """
name: tiles
cores:
  0: ./cores/port.yaml
  1: ./cores/buffer.yaml
  2: ./cores/buffer.yaml
  3: ./cores/tile.yaml
  4: ./cores/tile.yaml
  5: ./cores/tile.yaml
  6: ./cores/tile.yaml
  7: ./cores/tile.yaml
  8: ./cores/tile.yaml
  9: ./cores/tile.yaml
  10: ./cores/tile.yaml
core_coordinates: {0: [0, 0], 3: [0, 1], 4: [0, 2], 5: [1, 1], 6: [1, 2], 7: [2, 1], 8: [2, 2],
  9: [3, 1], 10: [3, 2]}
offchip_core_id: 0
core_connectivity:
  - {type: link, cores: [0, 1], bandwidth: 64}
"""
CORES = {
    "tile": """
name: tile
memories:
  registers: {size: 64, r_bw: 64, w_bw: 64, r_cost: 0.01, served_dimensions: []}
  local: {size: 262144, r_bw: 512, w_bw: 512, r_cost: 10, served_dimensions: [D1, D2]}
operational_array: {unit_energy: 0.4, dimensions: [D1, D2], sizes: [4, 16]}
""",
    "buffer": "name: buffer\ntype: memory\nmemory: {capacity: 2097152, bandwidth_max: 256}\n",
    "port": """
name: port
memories:
  dram: {size: 10000000000, r_bw: 128, r_cost: 640, served_dimensions: [D1, D2]}
operational_array: {unit_energy: 0, dimensions: [D1, D2], sizes: [0, 0]}
""",
}
# One core, and a list of files.
SMALL_STREAM = """
cores: [tile.yaml, port.yaml]
graph: {type: bus, bandwidth: 32, offchip_core_id: 1}
"""
ACCELERGY = """
flattened_architecture:
  version: 0.3
  components:
    chip.PE[0..11].mac: {class: intmac, attributes: {datawidth: 8, technology: 28nm}}
    chip.PE[0..11].bank[1..2].spad: {class: SRAM, attributes: {memory_depth: 512, memory_width: 64}}
    chip.buffer: {class: SRAM, attributes: {memory_depth: 4096, memory_width: 128, datawidth: 16,
      read_bandwidth: 8}}
    chip.network: {class: XY_NoC, attributes: {datawidth: 64}}
"""


# Worked out by hand from the files: bits to bytes, words and bits a cycle to bytes.
EXPECTED = {
    "zigzag": (
        ZIGZAG, "ZigZag",
        {"units": (16, 32, 1), "mode": "int4x8", "clock": 1e9, "l1": 512 * 64, "l2": 2**20,
         "l2 rate": 128, "dram": 8e9},
    ),
    "zigzag of three dimensions": (
        OLD_ZIGZAG, "ZigZag",
        {"units": (4, 8, 16), "mode": "int8", "clock": 1e9, "l2": 2**19, "l2 rate": 256,
         "dram": 64e9},
    ),
    "timeloop": (
        TIMELOOP, "Timeloop",
        {"units": (8, 16, 1), "mode": "int8", "clock": 0.8e9, "l1": (64 + 48) * 128, "l2": 2**19,
         "l2 rate": 64, "dram": 12.8e9},
    ),
    "timeloop 0.3": (
        OLD_TIMELOOP, "Timeloop",
        {"units": (12, 16, 4), "mode": "bf16", "clock": 1e9, "l2": 2**18,
         "l2 rate": 64, "dram": 16e9},
    ),
    "accelforge": (
        ACCELFORGE, "AccelForge",
        {"units": (128, 64, 1), "mode": "int8", "clock": 0.8e9, "l2": 2**22, "l2 rate": 640,
         "dram": 100e9},
    ),
    "stream": (
        STREAM, "Stream",
        {"units": (2, 4, 64), "mode": "int8", "clock": 1e9, "l1": 2**15 + 64 * 8, "l2": 2**19,
         "l2 rate": 64, "dram": 16e9},
    ),
    "stream of one core": (
        SMALL_STREAM, "Stream",
        {"units": (4, 16, 1), "mode": "int8", "clock": 1e9, "l2": 2**15, "l2 rate": 64,
         "dram": 16e9},
    ),
    "accelergy": (
        ACCELERGY, "Accelergy",
        {"units": (3, 4, 1), "mode": "int8", "clock": 1e9, "l1": 12 * 2 * 4096, "l2": 2**16,
         "l2 rate": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_becomes_the_machine_it_describes(read, name, tmp_path):
    text, dialect, expected = EXPECTED[name]
    given = {"clock": 1e9} if expected["clock"] == 1e9 else {}
    found = read(text, **given)
    assert found.dialect == dialect
    got = numbers(found.machine)
    assert {key: got[key] for key in expected} == pytest.approx(expected)
    assumed = set(hwmodels.assumed_keys(found.machine))
    assert not assumed & {"memories.l2.capacity_bytes", "units.rows", "units.columns"}
    assert "memories.dram.sustained_fraction" in assumed
    # The file that is written of it is read back, and costs the same.
    path = tmp_path / f"{found.machine.name}.yaml"
    path.write_text(hwmodels.sketch_text(found.machine), encoding="utf-8")
    again = hwmodels.load_accelerator(path)
    assert numbers(again) == pytest.approx(got)
    assert hwmodels.assumed_keys(again) == hwmodels.assumed_keys(found.machine)
    main = "W16A16" if got["mode"] == "bf16" else "W8A8" if got["mode"] == "int8" else "W4A8"
    work = hwmodels.GemmWorkload(m=512, n=512, k=512, main=main)
    costs = [hwmodels.estimate_cost(work, hw).latency_s for hw in (found.machine, again)]
    assert costs[0] > 0
    assert costs[0] == pytest.approx(costs[1])


def test_energies_are_taken_a_byte_and_a_mac(read):
    energy = read(ZIGZAG, clock=1e9).machine.energy
    assert energy.dram_pj_per_byte == pytest.approx(700 / 8)
    assert energy.l2_pj_per_byte == pytest.approx(208 / 128)
    assert energy.l1_pj_per_byte == pytest.approx(0.08)
    assert read(ZIGZAG).machine.modes[0].energy_pj_per_mac == 0.03
    forge = read(ACCELFORGE).machine
    assert forge.energy.dram_pj_per_byte == pytest.approx(64)
    assert forge.energy.l2_pj_per_byte == pytest.approx(3.2)
    assert forge.modes[0].energy_pj_per_mac == pytest.approx(0.08)


def test_cores_of_a_stream_file_are_told_with_how_many_there_are(read):
    found = read(STREAM, clock=1e9)
    told = {key["key"]: key["becomes"] for key in found.keys}
    assert told["cores.tile.operational_array.sizes"] == "2 x 4 units, of 64 MACs"
    assert told["cores.buffer.memory.capacity"] == "2 together; memories.l2.capacity_bytes"
    assert told["cores.port.memories.dram.r_bw"] == "memories.dram.bandwidth_bytes_per_s"
    assert told["core_connectivity.bandwidth"] == "not taken"
    assert told["core_coordinates.3"] == "rows and columns"
    assert told["offchip_core_id"] == "which core is DRAM"
    assert found.machine.energy.dram_pj_per_byte == pytest.approx(640 / 128 * 8)
    assert found.machine.modes[0].energy_pj_per_mac == pytest.approx(0.4)
    # Without coordinates the layout is a guess, and said to be one.
    loose = read(STREAM.replace("core_coordinates", "positions"), clock=1e9)
    told = {key["key"]: key["becomes"] for key in loose.keys}
    assert told["cores.tile.operational_array.sizes"] == "2 x 4 units: assumed, of 64 MACs"


@pytest.mark.parametrize(
    "ref", ["../secret.yaml", "/etc/hostname", "cores", "none.yaml", "link.yaml", "7", "*x"]
)
def test_a_core_is_a_file_in_the_folder_and_nowhere_else(read, tmp_path, ref):
    secret = tmp_path.parent / "secret.yaml"
    secret.write_text("operational_array: {sizes: [4, 4]}\nsecret: 1\n", encoding="utf-8")
    (tmp_path / "cores" / "link.yaml").symlink_to(secret)
    with pytest.raises(hwmodels.AcceleratorError, match=r"is no file in its folder") as raised:
        read(f"cores: ['{ref}']\n")
    assert "\n" not in str(raised.value)


def test_every_key_is_told_with_what_became_of_it(read):
    becomes = {key["key"]: key["becomes"] for key in read(ZIGZAG).keys}
    assert len(becomes) == 29
    assert becomes["memories.sram.size"] == "memories.l2.capacity_bytes"
    assert becomes["memories.sram.area"] == "not taken"
    assert becomes["memories.weight_rf.ports.r.bandwidth_min"] == "not taken"
    said = "memories.dram.bandwidth_bytes_per_s at the assumed 1 GHz"
    assert becomes["memories.dram.ports.rw.bandwidth_max"] == said
    known = {key["key"]: key["becomes"] for key in read(ZIGZAG, clock="2 GHz").keys}
    assert "assumed" not in known["memories.dram.ports.rw.bandwidth_max"]
    forge = {key["key"]: key["becomes"] for key in read(ACCELFORGE).keys}
    assert forge["arch.MAC.actions.compute.latency"] == "units.clock_hz"
    assert forge["arch.MainMemory.actions.write.energy"] == "not taken"
    meshes = {key["key"]: key["becomes"] for key in read(OLD_TIMELOOP).keys}
    place = "architecture.system.accelerator.PE"
    assert meshes[f"{place}.RegisterFile.attributes.entries"] == (
        "not taken: 512 B hold no tile; L1 is assumed"
    )


def test_what_is_given_stands_over_the_file(read):
    found = read(ZIGZAG, clock=2e9, sram="4MiB", dram="30GB/s", modes="int8", rows=4).machine
    got = numbers(found)
    assert (got["clock"], got["l2"], got["dram"]) == (2e9, 2**22, 30e9)
    assert got["units"] == (4, 32, 1)
    assert got["mode"] == "int8"
    assert found.modes[0].energy_pj_per_mac != 0.03


def test_sources_name_the_file(read):
    hw = read(ZIGZAG).machine
    assert hw.memories.l2.source.startswith(
        "bandwidth_bytes_per_cycle from theirs.yaml (ZigZag); capacity_bytes from theirs.yaml"
    )
    assert hw.title == "edge_npu, from a file of ZigZag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no hardware file"),
        ("- a\n- b\n", "no hardware file"),
        ("name: x\n", "no hardware file"),
        ("operational_array: {sizes: 4}\n", "operational_array.sizes must be a list"),
        ("operational_array: {sizes: [-4, 4]}\n", "whole number from 1"),
        ("operational_array: {sizes: [1e99, 4]}\n", "whole number from 1"),
        ("operational_array: {sizes: [[1], 4]}\n", "whole number from 1"),
        ("architecture: {nodes: []}\n", "no node whose class is intmac"),
        ("architecture: 4\n", "no node whose class"),
        ("arch: {nodes: [3, null, {name: x}]}\n", "no !Compute"),
        ("arch: []\n", "no !Compute"),
        ("{% set a = 1 %}\narch: {}\n", "theirs.yaml:1: a Jinja template"),
        ("a: 1\nb: {{include_text('x.yaml')}}\n", "theirs.yaml:2: a Jinja template"),
        ("{{x}}\n", "read what their run makes of it, parsed-processed-input.yaml"),
        ("cores: 4\n", "no core has an operational_array"),
        ("cores: []\n", "no core has an operational_array"),
        ("cores: {}\n", "no core has an operational_array"),
        ("cores: [port.yaml]\n", "no core has an operational_array"),
        ("cores: [buffer.yaml, buffer.yaml]\noffchip_core_id: x\n", "no core has an operational"),
        ("cores: [[1, 2]]\n", "is no file in its folder"),
        ("cores: {a: {b: c}}\n", "is no file in its folder"),
        ("flattened_architecture: 4\n", "no node whose class is intmac"),
        ("flattened_architecture: {components: [3, {name: 4}]}\n", "no node whose class is intmac"),
        ("flattened_architecture:\n  components:\n    'pe[0..9999].pe[0..9999].mac':\n"
         "      {class: mac, attributes: {datawidth: 8}}\n", "whole number from 1"),
        ("arch: !!python/object/apply:os.system [echo]\n", "no !Compute"),
        ("a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
         "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
         "e: [*d, *d, *d, *d, *d, *d, *d, *d, *d]\narch: {}\n", "more than 5000 values"),
        ("arch: {nodes: [}\n", "not valid YAML"),
        ("arch:\n  nodes: \"\\x1b[2J\"\n", "control character"),
        ("arch: {a: 1, a: 2}\n", "duplicate key 'a'"),
        ("[" * 200, "nested too deeply"),
        ("operational_array: {sizes: [4, 4]}\nmemories: {dram: {size: -8}}\n", "not be negative"),
        ("operational_array: {sizes: [9999999, 4]}\n", "rows: input should be"),
        ("&a [*a]\n", "nested too deeply"),
    ],
)  # fmt: skip
def test_hostile_and_damaged_files_are_one_line(read, text, message):
    with pytest.raises(hwmodels.AcceleratorError) as raised:
        read(text)
    said = str(raised.value)
    assert message in said
    assert "\n" not in said
    assert "theirs.yaml" in said or message.startswith("rows")
    assert len(said) < 400


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1024*1024*8", 2**23), ("1 / (8 * 614e9)", 1 / (8 * 614e9)), ("-2 + 3", 1),
        ("2**10", 1024),
        ("1 / 1.05e9 / 128", 1 / 1.05e9 / 128), ("inf", math.inf), (7, 7), (0.5, 0.5),
        ("weight.bits", None), ("__import__('os')", None), ("1/0", None), ("9**9**9", None),
        ("(1", None), ("", None), (True, None), (None, None), ("1" * 200, None), ("2 3", None),
    ],
)  # fmt: skip
def test_only_sums_and_products_are_worked_out(text, number):
    found = worked_out(text)
    assert found == (None if number is None else pytest.approx(number))
