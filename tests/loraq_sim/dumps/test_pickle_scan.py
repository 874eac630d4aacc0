import io
import pickle
from collections import Counter, OrderedDict

import pytest

from loraq_sim.dumps import file_kind as pickle_scan
from loraq_sim.dumps.file_kind import find_unsafe_name, first_global


def scan(content):
    return find_unsafe_name(io.BytesIO(content))


def test_plain_data_has_no_unsafe_name():
    content = pickle.dumps({"a": [1, 2.5, None, "text"], "b": OrderedDict(c=3)}, protocol=2)
    assert scan(content) is None


@pytest.mark.parametrize("value", [Counter("ab"), print, range(3)])
def test_any_other_name_is_unsafe_in_protocol_2(value):
    module = {"range": "__builtin__.xrange", "print": "__builtin__.print"}
    expected = module.get(getattr(value, "__name__", type(value).__name__), "collections.Counter")
    assert scan(pickle.dumps(value, protocol=2)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pickle.dumps(print, protocol=4), "opcode STACK_GLOBAL"),
        (b"(iposix\nsystem\n.", "opcode INST"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02ctorch.storage\nos.system\n.", "torch.storage.os.system"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ca\x1b[31mb\nc\n.", "a\\\\x1b[31mb.c"),
    ],
)
def test_other_ways_to_name_a_function_are_unsafe(content, expected):
    assert scan(content) == expected.replace("\\\\", "\\")


@pytest.mark.parametrize(
    "name",
    ["torch._utils\n_rebuild_tensor_v2", "torch\nHalfStorage", "torch.storage\nUntypedStorage"],
)
def test_names_that_tensors_need_are_allowed(name):
    assert scan(f"\x80\x02c{name}\n.".encode("latin-1")) is None


def test_an_incomplete_pickle_is_a_value_error():
    with pytest.raises(ValueError, match="pickle exhausted before seeing STOP"):
        scan(pickle.dumps([1, 2, 3], protocol=2)[:-1])


def test_an_endless_pickle_is_cut_off(monkeypatch):
    monkeypatch.setattr(pickle_scan, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(ValueError, match="over 16 MiB"):
        scan(b"\x80\x02" + b"N0" * 600 + b"N.")


def test_the_hint_for_a_message_names_the_first_harmful_import(tmp_path):
    path = tmp_path / "a.pkl"
    for protocol in range(6):
        path.write_bytes(pickle.dumps([OrderedDict(a=1), print], protocol=protocol))
        assert first_global(path) in ("builtins.print", "__builtin__.print")
    path.write_bytes(pickle.dumps([1, 2]))
    assert first_global(path) is None
    path.write_bytes(b"\x80\x04garbage")
    assert first_global(path) is None


def nested(depth, kind):
    value = ()
    for _ in range(depth):
        value = kind(value)
    return value


@pytest.mark.parametrize(
    "deep",
    [
        b"\x80\x02}" + b")" + b"\x85" * 3_000_000 + b"Ns.",
        b"\x80\x02}" + b"(" * 200 + b"t" * 200 + b"Ns.",
        b"\x80\x02)" + b"q\x00\x85q\x000h\x00" * 200 + b".",
        pickle.dumps(nested(200, lambda value: (value, value, value)), protocol=2),
        pickle.dumps(nested(200, lambda value: ([value],)), protocol=2),
    ],
    ids=["tuples of one", "marked tuples", "through the memo", "shared", "through lists"],
)
def test_nesting_that_would_end_the_process_is_refused(deep):
    with pytest.raises(
        ValueError, match="objects nested deeper than 100|nested tuples of more than"
    ):
        scan(deep)


def test_ordinary_nesting_and_many_entries_are_allowed():
    many = {f"layer{i}": {"size": (i, (i, [i])), "same": [i] * 3} for i in range(3000)}
    assert scan(pickle.dumps(many, protocol=2)) is None
    assert scan(pickle.dumps(nested(90, lambda value: (value,)), protocol=2)) is None


def test_a_stack_that_runs_dry_is_an_error():
    with pytest.raises(IndexError, match="pop from empty list"):
        scan(b"\x80\x02\x85.")
