import os

import pytest

from loraq_sim.errors import InputError
from loraq_sim.recipe import read_recipe
from loraq_sim.sweeps import compose
from loraq_sim.sweeps.plan_file import plan_from_values, read_plan_values, set_values


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "plan.toml"
        path.write_text(text)
        return path

    return write


GOOD = """\
dump = "layers.safetensors"
hw = "aie2"
splits = ["W4A4", "W4A4+W8A8r4"]
seeds = [0, 1]

[datapath]
acc_bits = [16, 24]
overflow = "saturate"

[[override]]
layers = "ffn_*"
rank = 2
"""


def test_a_plan_file_is_the_plan_it_describes(make_dump, make_plan, write):
    dump = make_dump(up="ffn_up", q="self_q")
    plan = plan_from_values(read_plan_values(write(GOOD)))
    assert plan.dump == str(dump)
    assert (plan.seed, plan.preset, plan.accelerators) == ((0, 1), "balanced", ("aie2",))
    sweep = compose(plan)
    # Rounding once, the branch for two seeds, everything at two widths.
    assert len(sweep.cases) == 2 * 2 * 3
    ranks = {
        (case.labels["layer"], case.labels["split"])
        for case in sweep.cases
        if case.settings.split.has_branch
    }
    assert ranks == {("up", "W4A4+W8A8r2"), ("q", "W4A4+W8A8r4")}
    assert sweep.describe()["plan"]["overrides"] == [{"pattern": "ffn_*", "settings": {"rank": 2}}]


def test_texts_change_the_plan_key_by_key(write):
    values = read_plan_values(write(GOOD))
    changes = ["tokens=64", "hw=aie2,a100", 'splits=["W8A8"]', "seeds=3", "datapath.acc_bits=12"]
    changed = set_values(values, [*changes, "fused=false", "smooth=0.5", "methods=lqer"])
    assert (changed["tokens"], changed["hw"], changed["splits"]) == (
        64,
        ("aie2", "a100"),
        ("W8A8",),
    )
    assert (changed["seeds"], changed["fused"], changed["smooth"]) == ((3,), False, 0.5)
    assert changed["datapath"] == {"acc_bits": 12, "overflow": "saturate"}
    assert values["datapath"]["acc_bits"] == (16, 24)


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (3, "split = ['W4A4']", "unknown key 'split'; did you mean 'splits'"),
        (3, "seeds = ['a']", "seeds must be a list of whole numbers, got"),
        (3, "tokens = 1.5", "tokens must be a whole number, got 1.5"),
        (3, "tokens = true", "tokens must be a whole number, got True"),
        (3, "fused = 1", "fused must be true or false, got 1"),
        (3, "splits = 'W4A4'\ntokens = [1]", "tokens must be a whole number"),
        (
            4,
            "[datapath]\nacc_bit = 3",
            "unknown datapath setting 'acc_bit'; did you mean 'acc_bits'",
        ),
        (3, "[[override]]\nlayer = 'a'\nrank = 2", "unknown key 'layer'; did you mean 'layers'"),
        (3, "[[override]]\nlayers = 'a'", "needs layers = 'PATTERN' and at least one setting"),
        (3, "[[override]]\nlayers = 'a'\nrank = 'x'", "rank must be a whole number"),
        (3, "override = 3", r"under \[\[override\]\], got 3"),
    ],
)
def test_errors_name_file_line_and_key(write, line, text, message):
    line += "tokens = [1]" in text
    path = write(f"dump = 'x.pt'\nhw = 'aie2'\n{text}\n")
    with pytest.raises(InputError, match=rf"plan\.toml:{line}: .*{message}"):
        read_plan_values(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dump = ", "is not TOML: Invalid value"),
        (b"a = 1\na = 2", "is not TOML: Cannot overwrite"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x = " + b"[" * 50_000, "is not TOML"),
    ],
    ids=["cut", "twice", "binary", "deep"],
)
def test_files_that_are_no_toml_are_refused(tmp_path, content, message):
    (tmp_path / "plan.toml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_plan_values(tmp_path / "plan.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read plan .*none\.toml: No such file"):
        read_plan_values(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens", "must look like"),
        ("tokns=8", "--set 'tokns=8': unknown key 'tokns'; did you mean 'tokens'"),
        ("tokens=x", "--set 'tokens=x': tokens must be a whole number"),
        ("datapath.acc=3", "unknown datapath setting 'acc'"),
        ("splits=[", "is not a TOML value"),
    ],
)
def test_bad_changes_are_named(text, message):
    with pytest.raises(InputError, match=message):
        set_values({}, [text])


def test_a_plan_without_dump_or_accelerator_says_what_to_give():
    with pytest.raises(InputError, match="no dump: give --layer-dump"):
        plan_from_values({"hw": ("aie2",)})
    with pytest.raises(InputError, match="no hw: give --hw"):
        plan_from_values({"dump": "a.pt"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tokens = 0x" + "f" * 5000, "an integer of 20000 bits"),
        ("tokens = " + "9" * 5000, "is not TOML"),
        ("[datapath]\nacc_bits = [0x" + "f" * 5000 + "]", "an integer of 20000 bits"),
        ("a." * 30_000 + "a = 1", "a line with over 1000 dots"),
        ("# " + "x" * 300_000, "is too large; it may have 262144 bytes"),
        ("\n".join("a." * 900 + f"k{i} = 1" for i in range(100)), "lines with hundreds of dots"),
        ("x = " + "[" * 20_000, "is not TOML: nested too deeply"),
        ("x = " + "{a=" * 20_000, "is not TOML: nested too deeply"),
        ("x = '\x1b[31m'", "is not TOML"),
    ],
    ids=["hex", "decimal", "nested", "dots", "long", "many_dots", "deep", "deep_tables", "escape"],
)
@pytest.mark.parametrize("read", [read_plan_values, read_recipe])
def test_files_that_would_hang_or_crash_are_refused(tmp_path, read, content, message):
    (tmp_path / "plan.toml").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "plan.toml")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("read", [read_plan_values, read_recipe])
def test_plans_and_recipes_are_regular_files(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="is not a regular file"):
            read(path)
    with pytest.raises(InputError, match="is a directory"):
        read(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "a\0b")


def test_values_of_set_have_the_same_limits():
    for text in ("tokens=" + "9" * 5000, "tokens=0x" + "f" * 100, "splits=" + "[" * 20_000):
        with pytest.raises(
            InputError, match="must be a whole number|is not a TOML value"
        ) as caught:
            set_values({}, [text])
        assert len(str(caught.value)) < 11_000


def test_a_plan_may_have_a_byte_order_mark_and_windows_newlines(tmp_path):
    (tmp_path / "plan.toml").write_bytes(b"\xef\xbb\xbftokens = 4\r\nseeds = [1]\r\n")
    assert read_plan_values(tmp_path / "plan.toml") == {"tokens": 4, "seeds": (1,)}
