"""One rule for settings of single layers: sweeps, `solve` and recipes do the same with the same."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.dumps import write_layer_dump
from loraq_sim.errors import InputError
from loraq_sim.layers import Layer
from loraq_sim.recipe import Recipe, read_recipe, write_recipe
from loraq_sim.settings import matches, parse_override, parse_rows, rows_of, settings_of
from loraq_sim.sweeps import SweepPlan, compose

NAMES = {"up": "ffn_up", "blocks[0].q": "self_q", "blocks0.q": "self_q", "a:b=c": "other"}
BASE = "W4A4+W8A8r4"
# (pattern, settings) in order; what each layer runs.
RULES = [
    [("*", {"rank": 6}), ("ffn_*", {"split": "W4A4+W8A8r2"})],
    [("ffn_*", {"split": "W4A4+W8A8r2"}), ("*", {"rank": 6})],
    [("*", {"budget": "fp16@2"}), ("up", {"rank": 3})],
    [("*", {"rank": 3}), ("self_q", {"budget": "fp16@1"}), ("up", {"split": "W4A8"})],
    [("*", {"split": "W4A8+W6A6r5", "rank": 2})],
    [("blocks[0].q", {"rank": 1})],
    [("blocks[0].*", {"rank": 1})],
    [("*", {"smooth": 0.5, "rotate": "hadamard:8"}), ("up", {"smooth": "none"})],
    [
        ("*", {"rotate": "hadamard"}),
        ("self_*", {"rotate": "none"}),
        ("up", {"rotate": "hadamard:4"}),
    ],
    [("*", {"group": 16}), ("self_q", {"family": "mxint", "method": "svdquant", "preset": "fast"})],
    [("a:b=c", {"rank": 2}), ("*", {"method": "lqer"})],
]


@pytest.fixture
def dump(tmp_path):
    rng = np.random.default_rng(0)
    layers = [
        Layer(
            name=name,
            kind=kind,
            weight=rng.normal(size=(32, 64)).astype(np.float32),
            activations=rng.normal(size=(8, 64)).astype(np.float32),
        )
        for name, kind in NAMES.items()
    ]
    write_layer_dump(tmp_path / "layers.npz", layers)
    return tmp_path / "layers.npz"


def as_text(pattern, settings):
    return f"{pattern}:" + ",".join(f"{key}={value}" for key, value in settings.items())


def shown(row):
    names = ("split", "method", "preset", "family", "rotation", "smooth")
    return tuple(row.get(name) for name in names)


def by_sweep(dump, rules):
    plan = SweepPlan(
        dump=str(dump),
        accelerators=("aie2",),
        splits=(BASE,),
        overrides=tuple(parse_override(as_text(*rule)) for rule in rules),
    )
    cases = compose(plan).cases
    return {case.labels["layer"]: shown(case.labels) for case in cases}


def by_recipe(dump, rules, tmp_path):
    """`*` stands for a base split; an entry of a pattern that comes twice is merged by hand."""
    layers = {"?*": {"split": BASE}} | {pattern: settings for pattern, settings in rules}
    path = write_recipe(tmp_path / "recipe.toml", Recipe.model_validate({"layers": layers}))
    recipe = read_recipe(path)
    assert all(recipe.settings(name, kind) for name, kind in NAMES.items())
    return by_solve(dump, ("--recipe", path))


def by_solve(dump, words):
    command = ("solve", "--layer-dump", dump, "--skip", "none", "--format", "json", *words)
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = found["rows"]
    return {row["layer"]: shown(row) for row in rows}


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: " ".join(as_text(*r) for r in rules))
def test_every_door_gives_every_layer_the_same(dump, tmp_path, rules):
    words = [word for rule in rules for word in ("--override", as_text(*rule))]
    expected = by_sweep(dump, rules)
    assert by_solve(dump, ("--split", BASE, *words)) == expected
    assert by_recipe(dump, rules, tmp_path) == expected


def test_the_plan_file_and_the_flag_are_the_same_door(dump, tmp_path):
    from loraq_sim.sweeps.plan_file import plan_from_values, read_plan_values

    for number, rules in enumerate(RULES):
        lines = [f'dump = "{dump.name}"', 'hw = "aie2"', f'splits = "{BASE}"']
        for pattern, settings in rules:
            lines += ["[[override]]", f"layers = {json.dumps(pattern)}"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        path = tmp_path / f"{number}.toml"
        path.write_text("\n".join(lines))
        cases = compose(plan_from_values(read_plan_values(path))).cases
        assert {c.labels["layer"]: shown(c.labels) for c in cases} == by_sweep(dump, rules)


def test_a_later_split_ends_an_earlier_rank():
    overrides = [parse_override(text) for text in ("*:rank=16", "ffn:split=W4A4+W8A8r4")]
    assert settings_of("ffn", "", overrides) == {"split": "W4A4+W8A8r4"}
    assert settings_of("other", "", overrides) == {"rank": 16}


@pytest.mark.parametrize(
    ("pattern", "name", "kind", "expected"),
    [
        ("blocks[0].q", "blocks[0].q", "", True),
        ("blocks[0].q", "blocks0.q", "", True),
        ("blocks[0].q", "blocks[1].q", "", False),
        ("blocks[0].*", "blocks[0].q", "", True),
        ("to_[qkv]", "to_q", "", True),
        ("to_[qkv]", "to_[qkv]", "", True),
        ("cross_[kv]", "x", "cross_k", True),
        ("*", "[", "", True),
        ("[", "[", "", True),
        ("Self_q", "x", "self_q", False),
    ],
)
def test_names_with_brackets_match_themselves(pattern, name, kind, expected):
    assert matches(pattern, name, kind) is expected


def test_rows_go_by_the_last_pattern_that_matches():
    rows = parse_rows(["ffn_*=5", "4096", "blocks[0].q=7"])
    assert rows == {"ffn_*": 5, "*": 4096, "blocks[0].q": 7}
    assert [rows_of(n, "ffn_up", rows) for n in ("up", "blocks[0].q")] == [4096, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*:smooth=much", "smooth must be a number, got 'much'"),
        ("*:group=1.5", "group must be a whole number"),
        ("*:rotate=", "rotate needs a value"),
    ],
)
def test_wrong_settings_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_override(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotate": "hadamart"}, "rotate must be None, 'hadamard'"),
        ({"finish": "date"}, "unknown finish 'date'; did you mean 'data'"),
        ({"condition": "aut"}, "unknown condition 'aut'; did you mean 'auto'"),
        ({"overrides": (parse_override("up:finish=best"),)}, "unknown finish 'best'"),
        ({"rotate": "hadamard:128"}, r"rotate hadamard:128 fits none of its 4 layers; up: .*K=64"),
        ({"smooth": 1.5}, "smooth must be a strength from 0 to 1, got 1.5"),
        ({"overrides": (parse_override("up:rotate=hadamard:3"),)}, "rotate 'hadamard:3'"),
        ({"overrides": (parse_override("up:smooth=-1"),)}, "smooth must be a strength"),
    ],
)
def test_a_sweep_refuses_transforms_that_cannot_be(dump, changes, message):
    plan = {"dump": str(dump), "accelerators": ("aie2",), "splits": (BASE,)}
    with pytest.raises(InputError, match=message):
        compose(SweepPlan(**plan, **changes))


def test_what_some_layers_cannot_take_is_announced(tmp_path):
    layers = [
        Layer(name=name, weight=np.ones((8, k), np.float32), rows_per_call=4)
        for name, k in (("even", 64), ("odd", 66))
    ]
    write_layer_dump(tmp_path / "two.npz", layers)
    plan = {"dump": str(tmp_path / "two.npz"), "accelerators": ("aie2",), "splits": ("W4A4",)}
    notes = compose(SweepPlan(**plan, rotate="hadamard:64")).notes
    assert any("rotate hadamard:64 fails in 1 of 2 layers, such as odd" in note for note in notes)
    with pytest.raises(InputError, match="smooth 0.5 fits none of its 2 layers; even: smoothing"):
        compose(SweepPlan(**plan, smooth=0.5))
