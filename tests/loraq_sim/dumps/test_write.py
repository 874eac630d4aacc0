import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.dumps.write import write_layer_dump
from loraq_sim.errors import DumpError, InputError
from loraq_sim.layers import Layer

EXAMPLES = Path(__file__).parents[3] / "examples"
SUFFIXES = [".pt", ".safetensors", ".npz"]


def layers():
    rng = np.random.default_rng(7)
    x = rng.standard_normal((6, 5)).astype(np.float32)
    return [
        Layer(
            name="b0.q",
            weight=rng.standard_normal((4, 5)),
            bias=rng.standard_normal(4),
            activations=x,
            kind="self_q",
            group="b0",
            rows_per_call=96,
            calls_per_step=2,
        ),
        Layer(name="b0.k", weight=rng.standard_normal((3, 5)), activations=x.copy(), group="b0"),
        Layer(name="embed", weight=rng.standard_normal((1, 7)), kind="other"),
    ]


def assert_same(layer, expected):
    for tensor in ("weight", "bias", "activations"):
        got, wanted = getattr(layer, tensor), getattr(expected, tensor)
        assert (got is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(got, wanted)
    for field in ("name", "kind", "group", "rows_per_call", "calls_per_step"):
        assert getattr(layer, field) == getattr(expected, field)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_layers_come_back_as_they_were(tmp_path, suffix):
    meta = {"model": "toy", "steps": [1, 2.5, None, True], "nested": {"a": "b"}}
    path = write_layer_dump(tmp_path / f"a{suffix}", layers(), meta=meta)
    dump = read_layer_dump(path)
    assert list(dump) == ["b0.q", "b0.k", "embed"]
    assert dump.meta == meta
    for expected in layers():
        assert_same(dump[expected.name], expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("example", ["tiny_pixart.pt", "minilm.pt"])
def test_a_real_dump_keeps_dtype_size_and_content_in_every_format(tmp_path, example, suffix):
    source = read_layer_dump(EXAMPLES / example)
    path = write_layer_dump(tmp_path / f"a{suffix}", source)
    copy = read_layer_dump(path)
    assert list(copy) == list(source)
    assert copy.meta == source.meta
    for name in source:
        assert copy[name].digest() == source[name].digest()
        assert copy.info(name).dtype == copy.info(name).activation_dtype == "float16"
    assert path.stat().st_size < 1.05 * source.path.stat().st_size


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shared_activations_are_stored_once(tmp_path, suffix):
    x = np.ones((5000, 8), dtype=np.float32)
    group = [Layer(name=f"l{i}", weight=np.ones((2, 8)), activations=x.copy()) for i in range(4)]
    path = write_layer_dump(tmp_path / f"a{suffix}", group)
    assert x.nbytes < path.stat().st_size < 1.2 * x.nbytes
    dump = read_layer_dump(path)
    assert len({dump.info(name).activation_key for name in dump}) == 1


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (suffix, dtype)
        for suffix in SUFFIXES
        for dtype in ("float16", "bfloat16", "float32")
        if (suffix, dtype) != (".npz", "bfloat16")
    ],
)
def test_a_storage_dtype_rounds_to_nearest(tmp_path, suffix, dtype):
    torch = pytest.importorskip("torch")
    path = write_layer_dump(tmp_path / f"a{suffix}", layers(), dtype=dtype)
    dump = read_layer_dump(path)
    for expected in layers():
        assert dump.info(expected.name).dtype == dtype
        rounded = torch.from_numpy(expected.weight).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(dump[expected.name].weight, rounded)


def test_bfloat16_becomes_float32_in_npz_without_loss(tmp_path):
    first = write_layer_dump(tmp_path / "a.safetensors", layers(), dtype="bfloat16")
    source = read_layer_dump(first)
    copy = read_layer_dump(write_layer_dump(tmp_path / "b.npz", source))
    assert copy.info("b0.q").dtype == "float32"
    assert [layer.digest() for layer in copy.values()] == [x.digest() for x in source.values()]


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    path = write_layer_dump(tmp_path / "a.safetensors", layers(), meta={"model": "toy"})
    tensors = load_file(path)
    assert set(tensors) == {
        *("b0.q.weight", "b0.q.bias", "b0.q.activations", "b0.k.weight", "embed.weight")
    }
    np.testing.assert_array_equal(tensors["b0.q.bias"], layers()[0].bias)
    with safe_open(path, framework="numpy") as file:
        records = json.loads(file.metadata()["layers"])
    assert records["b0.k"]["activations"] == "b0.q.activations"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0


def test_numpy_reads_what_we_write(tmp_path):
    path = write_layer_dump(tmp_path / "a.npz", layers())
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["b0.k.weight"], layers()[1].weight)


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    path = write_layer_dump(tmp_path / "a.pt", layers(), meta={"model": "toy"})
    root = torch.load(path, weights_only=True)
    assert (root["format"], root["meta"]) == ("layer-dump-v0", {"model": "toy"})
    entry = root["layers"]["b0.q"]
    assert (entry["kind"], entry["rows_per_call"]) == ("self_q", 96)
    np.testing.assert_array_equal(entry["weight"].numpy(), layers()[0].weight)


def test_a_mapping_names_the_layers(tmp_path):
    path = write_layer_dump(tmp_path / "a.npz", {"new": layers()[0]})
    assert list(read_layer_dump(path)) == ["new"]


def test_part_of_a_dump_can_be_written_over_its_own_file(tmp_path):
    path = write_layer_dump(tmp_path / "a.safetensors", layers())
    dump = read_layer_dump(path)
    write_layer_dump(path, dump.select("b0.k,embed"), overwrite=True)
    part = read_layer_dump(path)
    assert list(part) == ["b0.k", "embed"]
    for expected in layers()[1:]:
        assert_same(part[expected.name], expected)


def test_large_dumps_are_written_one_layer_at_a_time(tmp_path):
    """Each layer can be collected before the next is loaded."""
    import gc
    import weakref

    source = read_layer_dump(write_layer_dump(tmp_path / "a.safetensors", layers()))
    alive, most = weakref.WeakSet(), 0
    load = type(source).__getitem__

    class Counting(type(source)):
        def __getitem__(self, name):
            nonlocal most
            layer = load(self, name)
            alive.add(layer)
            gc.collect()
            most = max(most, len(alive))
            return layer

    source.__class__ = Counting
    for suffix in (".safetensors", ".npz"):
        write_layer_dump(tmp_path / f"b{suffix}", source)
    # The one being written and the one that replaces it.
    assert most <= 2


@pytest.mark.parametrize(
    ("name", "given", "options", "message"),
    [
        ("a.bin", layers(), {}, r"unknown dump suffix '\.bin'.* Known: \.pt, \.safetensors, \.npz"),
        ("a.pt", [], {}, "no layers to write"),
        ("a.pt", [layers()[0]] * 2, {}, "two layers are named 'b0.q'; names must differ"),
        ("a.npz", layers(), {"dtype": "int8"}, "unknown storage dtype 'int8'.* Known: float16"),
        ("a.npz", layers(), {"dtype": "bfloat16"}, r"\.npz has no bfloat16; use \.safetensors"),
        ("a.npz", layers(), {"meta": {"a": {1, 2}}}, "meta holds a set"),
        ("no/such/folder/a.npz", layers(), {}, "cannot be written: No such file or directory; ch"),
        ("blocker/a.npz", layers(), {}, "cannot be written: Not a directory"),
        ("folder.npz", layers(), {"overwrite": True}, "cannot be written: Is a directory"),
        ("folder.npz", layers(), {}, "is there already; choose another name, or --force"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, name, given, options, message):
    (tmp_path / "blocker").touch()
    (tmp_path / "folder.npz").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DumpError, match=message) as caught:
        write_layer_dump(tmp_path / name, given, **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_must_be_printable(tmp_path):
    with pytest.raises(InputError, match="a layer name must be a non-empty printable string"):
        write_layer_dump(tmp_path / "a.npz", {"a\nb": layers()[0]})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_value_beyond_float16_is_refused_and_leaves_the_old_file(tmp_path, suffix):
    path = write_layer_dump(tmp_path / f"a{suffix}", layers())
    before = path.read_bytes()
    loud = Layer(name="loud", weight=np.full((2, 2), -70000.0))
    with pytest.raises(DumpError, match="loud.weight reaches 70000, beyond float16; store it as"):
        write_layer_dump(path, [*layers(), loud], dtype="float16", overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    path = write_layer_dump(tmp_path / "a.npz", layers())
    with pytest.raises(DumpError, match="is there already"):
        write_layer_dump(path, layers()[:1])
    assert len(read_layer_dump(path)) == 3
    write_layer_dump(path, layers()[:1], overwrite=True)
    assert len(read_layer_dump(path)) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, suffix):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full, whose every write fails")
    opened = Path.open

    def full(self, *args, **options):
        if self.suffix == ".tmp":
            self.touch()
            return opened(Path("/dev/full"), "wb", buffering=0)
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DumpError, match="cannot be written: .*; check the folder and its free"):
        write_layer_dump(tmp_path / f"a{suffix}", layers())
    assert list(tmp_path.iterdir()) == []


@given(
    n=st.integers(1, 5),
    k=st.integers(1, 5),
    tokens=st.none() | st.integers(1, 4),
    has_bias=st.booleans(),
    names=st.lists(
        st.text(min_size=1).filter(str.isprintable), min_size=1, max_size=3, unique=True
    ),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_any_layers_round_trip(tmp_path_factory, suffix, n, k, tokens, has_bias, names, seed):
    rng = np.random.default_rng(seed)
    written = [
        Layer(
            name=name,
            weight=rng.standard_normal((n, k)),
            bias=rng.standard_normal(n) if has_bias else None,
            activations=None if tokens is None else rng.standard_normal((tokens, k)),
        )
        for name in names
    ]
    path = tmp_path_factory.mktemp("round") / f"a{suffix}"
    dump = read_layer_dump(write_layer_dump(path, written))
    assert list(dump) == names
    for expected in written:
        assert_same(dump[expected.name], expected)
