"""Test vectors: the numbers against the reference, the files against the numbers."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.reference import reference_gemm, reference_srs
from loraq_sim.emulator.scaled_gemm import scaled_gemm
from loraq_sim.emulator.vector_files import MANIFEST, VECTOR_FILES, write_vectors
from loraq_sim.emulator.vectors import PARTS, SrsSetting, gemm_operands, make_vectors
from loraq_sim.errors import InputError
from loraq_sim.quantizers import quantize
from loraq_sim.split import parse_split

MACS = {
    "aie2": MacArray(acc_bits=32, products_per_add=8),
    "saturate": MacArray(acc_bits=12, overflow="saturate", products_per_add=3, accumulators=2),
    "wide_tree": MacArray(acc_bits=40, products_per_add=4, tree_bits=12),
}


def matrix(rows, columns, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)).astype(np.float32)


def stored(split, n=12, k=40, rank=6, smooth=None):
    """A solved layer with random factors in the formats of `split`."""
    return SimpleNamespace(
        main=quantize(matrix(n, k, 1), split.main_weight),
        left=quantize(matrix(n, rank, 2), split.branch_weight),
        right=quantize(matrix(rank, k, 3), split.branch_weight),
        smooth=smooth,
    )


def read_words(path, bits):
    words = [int(line, 16) for line in path.read_text().splitlines()]
    assert all(0 <= word < 2**bits for word in words)
    return np.array([w - 2**bits if w >= 2 ** (bits - 1) else w for w in words], dtype=np.int64)


@pytest.mark.parametrize("mac", MACS)
@pytest.mark.parametrize("formats", [("int4/g16", "int4/g16"), ("int8/row", "int6/row")])
def test_every_pass_matches_the_reference(formats, mac):
    x, w = quantize(matrix(7, 40, 4), formats[0]), quantize(matrix(9, 40, 5), formats[1])
    setting = SrsSetting(out_bits=8, rounding="positive_inf")
    vectors = make_vectors(x, w, (5, 6, 37), MACS[mac], setting)
    starts = [0, 16, 32] if "g16" in formats[0] else [0]
    assert vectors.acc.shape == (len(starts), 5, 6)
    stops = [*starts[1:], 37]
    for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        expected = reference_gemm(x.codes[:5, start:stop], w.codes[:6, start:stop], MACS[mac])
        np.testing.assert_array_equal(vectors.acc[index], expected)
        out = reference_srs(expected, vectors.srs.shift, rounding="positive_inf")
        np.testing.assert_array_equal(vectors.out[index], out)


def test_the_chosen_shift_is_the_smallest_that_clamps_nothing():
    x, w = quantize(matrix(8, 64, 6), "int8/g64"), quantize(matrix(8, 64, 7), "int8/g64")
    vectors = make_vectors(x, w, (8, 8, 64), MACS["aie2"], SrsSetting())
    shift = vectors.srs.shift
    assert vectors.out_of_range_count == 0
    assert shift > 0
    given = SrsSetting(shift=shift - 1)
    smaller = make_vectors(x, w, (8, 8, 64), MACS["aie2"], given)
    assert smaller.out_of_range_count > 0
    assert smaller.shift_reason == "given"
    assert str(int(np.abs(vectors.acc.astype(np.int64)).max())) in vectors.shift_reason


def test_an_integer_p_has_the_groups_that_run_layer_gives_it():
    split = parse_split("W4A4+W8A6r6", group=16)
    layer, x = stored(split), matrix(5, 40, 8)
    datapath = Datapath(mac=MACS["aie2"], p_format="int8")
    p, left = gemm_operands("up", x, layer, split, datapath)
    assert (str(p.format), left) == ("int8/g16/fp16", layer.left)
    down, _ = scaled_gemm(*gemm_operands("down", x, layer, split, datapath), datapath.mac)
    np.testing.assert_array_equal(p.codes, quantize(down, "int8/g16").codes)


def test_small_accumulators_are_not_shifted():
    x = quantize(np.zeros((2, 8), np.float32), "int4/g8")
    vectors = make_vectors(x, x, (2, 2, 8), MACS["aie2"], SrsSetting())
    assert vectors.srs.shift == 0


def test_the_operands_are_what_the_data_path_multiplies():
    split = parse_split("W4A4+W8A6r6", group=16)
    smooth = np.linspace(0.5, 2, 40, dtype=np.float32)
    layer, x = stored(split, smooth=smooth), matrix(5, 40, 8)
    datapath, parts = Datapath(mac=MACS["aie2"]), PARTS[:3]
    operands = {part: gemm_operands(part, x, layer, split, datapath) for part in parts}
    assert [tuple(t.shape for t in operands[part]) for part in parts] == [
        *(((5, 40), (12, 40)), ((5, 40), (6, 40)), ((5, 6), (12, 6)))
    ]
    np.testing.assert_array_equal(
        operands["main"][0].codes, quantize(x / smooth, split.main_activation).codes
    )
    down, _ = scaled_gemm(*operands["down"], datapath.mac)
    np.testing.assert_array_equal(
        operands["up"][0].codes, quantize(down, split.branch_activation).codes
    )
    vectors = make_vectors(*operands["main"], (5, 12, 40), datapath.mac, SrsSetting())
    y = np.zeros((5, 12), np.float32)
    for index, acc in enumerate(vectors.acc):
        scale = np.outer(operands["main"][0].scales[:, index], layer.main.scales[:, index])
        y = y + acc.astype(np.float32) * scale
    np.testing.assert_array_equal(y, scaled_gemm(*operands["main"], datapath.mac)[0])


def test_the_files_hold_the_numbers_and_the_manifest_describes_them(tmp_path):
    x, w = quantize(matrix(7, 40, 9), "int4/g16"), quantize(matrix(9, 40, 10), "int8/g16")
    vectors = make_vectors(x, w, (3, 4, 33), MACS["saturate"], SrsSetting(out_bits=6))
    returned = write_vectors(vectors, tmp_path / "new" / "v", {"title": "t", "seed": 3})
    folder = tmp_path / "new" / "v"
    assert {path.name for path in folder.iterdir()} == set(VECTOR_FILES)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest == returned
    assert manifest["source"] == {"title": "t", "seed": 3}
    assert manifest["passes"] == [[0, 16], [16, 32], [32, 33]]
    assert manifest["mac_array"]["accumulators"] == 2
    arrays = {
        "a.hex": vectors.a,
        "w.hex": vectors.w,
        "acc.hex": vectors.acc,
        "out.hex": vectors.out,
    }
    for name, array in arrays.items():
        entry = manifest["files"][name]
        assert entry["words"] == array.size
        words = read_words(folder / name, entry["bits"])
        np.testing.assert_array_equal(words.reshape(entry["shape"]), array)
        lines = (folder / name).read_text().splitlines()
        assert {len(line) for line in lines} == {entry["digits"]}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_title_cannot_leave_its_comment(tmp_path):
    x = quantize(matrix(2, 8, 11), "int4/g8")
    vectors = make_vectors(x, x, (2, 2, 8), MACS["aie2"], SrsSetting())
    write_vectors(vectors, tmp_path, {"title": "bad\nmodule é"})
    assert (tmp_path / "testbench.sv").read_text().startswith("// bad?module ?\n")


def test_nothing_is_replaced_unasked(tmp_path):
    x = quantize(matrix(2, 8, 11), "int4/g8")
    vectors = make_vectors(x, x, (2, 2, 8), MACS["aie2"], SrsSetting())
    (tmp_path / "dut.sv").write_text("my design")
    with pytest.raises(
        InputError, match=r"dut\.sv is there already; choose another name, or --force"
    ):
        write_vectors(vectors, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["dut.sv"]
    write_vectors(vectors, tmp_path, {}, force=True)
    assert "my design" not in (tmp_path / "dut.sv").read_text()
    with pytest.raises(InputError, match=r"is a file; give a folder"):
        write_vectors(vectors, tmp_path / "dut.sv", {})


@pytest.mark.parametrize(
    ("x_format", "w_format", "tile", "setting", "message"),
    [
        ("fp16", "int4/g8", (1, 1, 8), {}, "the activations of this GEMM are stored as fp16"),
        ("int4/g8", "mxfp4", (1, 1, 8), {}, "the weights of this GEMM are stored as mxfp4"),
        ("int4/g8", "int4/g4", (1, 1, 8), {}, "vectors need equal groups along K"),
        ("int4/g8", "int4/g8", (4, 1, 8), {}, "tile M must be an integer from 1 to 3, got 4"),
        ("int4/g8", "int4/g8", (1, 1, 9), {}, "tile K must be an integer from 1 to 8, got 9"),
        ("int4/g8", "int4/g8", (1, 0, 8), {}, "tile N must be an integer from 1 to 3, got 0"),
        ("int4/g8", "int4/g8", (1, 1, 8), {"shift": 60}, "shift must be .* got 60"),
        ("int4/g8", "int4/g8", (1, 1, 8), {"out_bits": 40}, "out_bits must be .* got 40"),
        ("int4/g8", "int4/g8", (1, 1, 8), {"rounding": "evn"}, "unknown rounding 'evn'"),
    ],
)
def test_what_has_no_vectors_is_refused(x_format, w_format, tile, setting, message):
    x, w = quantize(matrix(3, 8, 12), x_format), quantize(matrix(3, 8, 13), w_format)
    with pytest.raises(InputError, match=message):
        make_vectors(x, w, tile, MACS["aie2"], SrsSetting(**setting))


@pytest.mark.parametrize("part", ["down", "up"])
def test_a_split_without_branch_has_only_the_main_part(part):
    split = parse_split("W4A4")
    layer = SimpleNamespace(
        main=quantize(matrix(4, 8, 1), split.main_weight), left=None, right=None, smooth=None
    )
    with pytest.raises(InputError, match=f"no low-rank branch, so there is no part '{part}'"):
        gemm_operands(part, matrix(2, 8, 2), layer, split, Datapath())
    with pytest.raises(InputError, match="unknown part 'mian'; did you mean 'main'"):
        gemm_operands("mian", matrix(2, 8, 2), layer, split, Datapath())
