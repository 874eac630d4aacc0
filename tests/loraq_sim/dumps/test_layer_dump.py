import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps.layer_dump import LayerDump, read_layer_dump
from loraq_sim.dumps.stored import StoredDump, StoredLayer, StoredTensor, plain_meta
from loraq_sim.errors import DumpError

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny_pixart.pt"


def tensor(array, key="w", dtype=None, log=None):
    def load():
        if log is not None:
            log.append(key)
        return array

    return StoredTensor(
        key=key, shape=array.shape, dtype=dtype or array.dtype.name, nbytes=array.nbytes, load=load
    )


def dump_of(tmp_path, **layers):
    path = tmp_path / "memory.npz"
    path.touch()
    records = {name: StoredLayer(name=name, **fields) for name, fields in layers.items()}
    return LayerDump(path, StoredDump(layers=records, meta={}))


def ones(*shape):
    return np.ones(shape, dtype=np.float32)


def test_nothing_loads_until_a_layer_is_asked_for_and_then_only_that_layer(tmp_path):
    log = []
    dump = dump_of(
        tmp_path,
        a={"weight": tensor(ones(2, 3), "a.w", log=log), "bias": tensor(ones(2), "a.b", log=log)},
        b={"weight": tensor(ones(4, 3), "b.w", log=log)},
    )
    assert list(dump) == ["a", "b"]
    assert "a" in dump
    assert [dump.info(name).n for name in dump] == [2, 4]
    assert list(dump.select("b")) == ["b"]
    assert log == []
    assert dump["a"].n == 2
    assert log == ["a.w", "a.b"]


def test_layers_of_a_group_share_their_activations_while_in_use(tmp_path):
    log = []
    x = tensor(np.ones((5, 3), dtype=np.float16), "x", log=log)
    dump = dump_of(
        tmp_path,
        q={"weight": tensor(ones(2, 3), "q"), "activations": x},
        k={"weight": tensor(ones(4, 3), "k"), "activations": x},
    )
    q, k = dump["q"], dump["k"]
    assert q.activations is k.activations
    assert log == ["x"]
    del q, k
    assert dump["k"].activations.shape == (5, 3)
    assert log == ["x", "x"]


def test_info_matches_the_loaded_layer():
    dump = read_layer_dump(EXAMPLE)
    for name, layer in dump.items():
        info = dump.info(name)
        assert (info.n, info.k, info.tokens) == (layer.n, layer.k, len(layer.activations))
        assert (info.kind, info.group, info.has_bias) == (layer.kind, layer.group, True)
        # Of 16 images with guidance: 16 tokens of an image, 8 of a caption.
        rows = 2 * 16 * (8 if layer.kind in ("cross_k", "cross_v") else 16)
        assert (info.rows_per_call, info.calls_per_step) == (rows, 1)
        assert info.dtype == info.bias_dtype == info.activation_dtype == "float16"
        assert info.nbytes == 2 * (layer.n * layer.k + layer.n)


def test_layers_that_read_one_tensor_share_one_activation_key():
    dump = read_layer_dump(EXAMPLE)
    by_key = {}
    for name in dump:
        by_key.setdefault(dump.info(name).activation_key, set()).add(dump.info(name).kind)
    shared = [kinds for kinds in by_key.values() if len(kinds) > 1]
    text, *queries = sorted(shared, key=len)
    assert queries == [{"self_q", "self_k", "self_v"}] * 2
    # The caption is the same in every block.
    assert text == {"cross_k", "cross_v"}


def test_select_takes_globs_kinds_lists_and_commas_in_file_order():
    dump = read_layer_dump(EXAMPLE)
    names = list(dump)
    assert list(dump.select("*")) == names
    assert list(dump.select("ffn_down")) == [n for n in names if n.endswith("ff.net.2")]
    assert list(dump.select(["*.3.attn2.to_k", "*.0.attn2.to_k"])) == [
        "transformer_blocks.0.attn2.to_k",
        "transformer_blocks.3.attn2.to_k",
    ]
    assert len(dump.select("self_?, cross_*")) == 14
    assert len(dump.select("self_*").select("*.3.*")) == 4
    assert dump.select("self_q").meta == dump.meta


def test_a_name_with_glob_characters_matches_itself(tmp_path):
    dump = dump_of(tmp_path, **{"blocks[0].fc": {"weight": tensor(ones(2, 3))}})
    assert list(dump.select("blocks[0].fc")) == ["blocks[0].fc"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("self_x", "pattern 'self_x' matches no layer name and no kind; nearest: self_"),
        ("*.to_qq", "pattern '*.to_qq' matches no layer name and no kind; nearest: "),
        ("ffn_up,zzzz", "pattern 'zzzz' matches no layer"),
        ("", "no layer pattern given"),
        ([], "no layer pattern given"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern, message):
    with pytest.raises(DumpError, match=re.escape(message)):
        read_layer_dump(EXAMPLE).select(pattern)


def test_an_unknown_layer_is_a_dump_error_with_near_names_and_get_still_works():
    dump = read_layer_dump(EXAMPLE)
    with pytest.raises(DumpError, match=r"no layer '.*to_qx' among its 20 layers; did you mean '"):
        dump["transformer_blocks.0.attn1.to_qx"]
    assert dump.get("nothing") is None
    assert "nothing" not in dump


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem": "has no weight"}, "layer 'a': has no weight"),
        ({"weight": tensor(ones(2, 3, 2))}, "layer 'a': weight has shape (2, 3, 2), expected 2-D"),
        ({"weight": tensor(ones(2, 3, 3, 3))}, "layer 'a': weight has shape (2, 3, 3, 3)"),
        ({"weight": tensor(ones(2, 3), dtype="F8_E4M3")}, "layer 'a': weight has dtype F8_E4M3"),
        (
            {"weight": tensor(ones(2, 3)), "bias": tensor(ones(3))},
            "layer 'a': bias has shape (3,), expected (2,)",
        ),
        (
            {"weight": tensor(ones(2, 3)), "activations": tensor(ones(4, 2))},
            "layer 'a': activations have shape (4, 2), expected (tokens, 3)",
        ),
        ({"weight": tensor(ones(2, 3)), "kind": 7}, "layer 'a': kind must be a printable string"),
        ({"weight": tensor(ones(2, 3)), "group": "a\nb"}, "layer 'a': group must be a printable"),
        (
            {"weight": tensor(ones(2, 3)), "rows_per_call": -4},
            "layer 'a': rows_per_call must be a positive integer up to 2**40, got -4",
        ),
        (
            {"weight": tensor(ones(2, 3)), "calls_per_step": "two"},
            "layer 'a': calls_per_step must be a positive integer up to 2**40, got 'two'",
        ),
    ],
)
def test_a_bad_layer_is_refused_before_any_value_is_read_and_others_work(tmp_path, fields, message):
    dump = dump_of(tmp_path, a=fields, b={"weight": tensor(ones(2, 3))})
    for ask in (dump.info, dump.__getitem__):
        with pytest.raises(DumpError, match=re.escape(f"{dump.path}: {message}")):
            ask("a")
    assert dump["b"].n == 2


def test_non_finite_values_are_refused_with_path_and_place(tmp_path):
    weight = ones(2, 3)
    weight[1, 0] = np.nan
    dump = dump_of(tmp_path, a={"weight": tensor(weight)})
    message = f"{dump.path}: layer 'a': weight holds 1 of 6 values that are NaN or Inf"
    with pytest.raises(DumpError, match=re.escape(message)):
        dump["a"]


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 1)])
def test_a_one_by_one_convolution_is_a_linear_layer(tmp_path, shape):
    dump = dump_of(tmp_path, a={"weight": tensor(np.arange(6.0).reshape(shape))})
    assert dump.info("a").k == 3
    np.testing.assert_array_equal(dump["a"].weight, [[0, 1, 2], [3, 4, 5]])


def test_a_tensor_beyond_half_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("loraq_sim.dumps.stored.physical_memory_bytes", lambda: 2 * 4 * 6)
    log = []
    dump = dump_of(
        tmp_path,
        fits={"weight": tensor(ones(2, 3))},
        large={"weight": tensor(ones(2, 4), log=log)},
    )
    assert dump["fits"].k == 3
    with pytest.raises(DumpError, match="layer 'large': weight would take .* more than half"):
        dump["large"]
    assert log == []


def test_a_tensor_that_loads_with_another_shape_is_refused(tmp_path):
    stored = tensor(ones(2, 3))
    lying = StoredTensor(key="w", shape=(3, 2), dtype="float32", nbytes=24, load=stored.load)
    with pytest.raises(DumpError, match=re.escape("has shape (2, 3), but the file's directory")):
        dump_of(tmp_path, a={"weight": lying})["a"]


def test_a_failing_read_becomes_one_line(tmp_path):
    def explode():
        raise OSError("disk fell off\nand rolled away")

    stored = StoredTensor(key="w", shape=(2, 3), dtype="float32", nbytes=24, load=explode)
    with pytest.raises(DumpError, match="layer 'a': weight cannot be read: disk fell off$"):
        dump_of(tmp_path, a={"weight": stored})["a"]


def test_a_file_changed_since_opening_is_not_half_read(tmp_path):
    dump = dump_of(tmp_path, a={"weight": tensor(ones(2, 3))})
    dump.path.write_bytes(b"longer")
    with pytest.raises(DumpError, match="changed or removed since it was opened; open it again"):
        dump["a"]
    dump.path.unlink()
    with pytest.raises(DumpError, match="changed or removed since it was opened"):
        dump["a"]
    with pytest.raises(DumpError, match="cannot be read: No such file"):
        dump.digest()


def test_a_dump_pickles_as_its_path_and_names():
    part = read_layer_dump(EXAMPLE).select("self_q")
    copy = pickle.loads(pickle.dumps(part))
    assert list(copy) == list(part)
    name = next(iter(part))
    assert copy[name].digest() == part[name].digest()
    assert len(pickle.dumps(part)) < 2000


def test_the_digest_is_that_of_the_file():
    expected = hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert read_layer_dump(EXAMPLE).digest() == expected


def test_meta_must_be_plain_and_small(tmp_path):
    assert plain_meta(tmp_path, {"a": [1, (2.5, None)], "b": {"c": True}}) == {
        "a": [1, [2.5, None]],
        "b": {"c": True},
    }
    bomb = ["x"]
    for _ in range(18):
        bomb = [bomb, bomb, bomb]
    for meta, message in [
        ([1], "meta must be a mapping, got list"),
        ({"a": {1: 2}}, "meta holds a dict; use plain numbers and text"),
        ({"a": np.ones(3)}, "meta holds a ndarray; use plain numbers and text"),
        ({"a": 10**5000}, "meta holds a int; use plain numbers"),
        ({"a": bomb}, "meta is too large or too deeply nested"),
    ]:
        with pytest.raises(DumpError, match=message):
            plain_meta(tmp_path, meta)
