"""Recipe files: what an entry means, what comes back from a file, and what is refused."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import loraq_sim as lq
from loraq_sim.recipe import Recipe, RecipeEntry, read_recipe, write_recipe

TEXT = """\
recipe = 1

[provenance]
model = "m.pt"
budget = 0.003

[defaults]
method = "loraq"
preset = "fast"

[layers]
"blocks.*" = "W4A4+W8A8@fp16r32"
"*.to_q" = { rank = 96, method = "svdquant" }
ffn_down = { split = "W4A8", family = "mxint" }
"*.1.to_q" = "W4A8+W8A8r8"
norm_out = { skip = true }
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(TEXT)
    return read_recipe(path)


def test_a_later_entry_wins_key_by_key(recipe):
    assert recipe.settings("blocks.0.to_k") == {
        "split": "W4A4+W8A8@fp16r32", "method": "loraq", "preset": "fast",
    }  # fmt: skip
    assert recipe.settings("blocks.0.to_q") == {
        "split": "W4A4+W8A8@fp16r32", "rank": 96, "method": "svdquant", "preset": "fast",
    }  # fmt: skip
    # A later split brings its own size of the branch.
    assert recipe.split("blocks.1.to_q").text == "W4A8+W8A8r8"
    assert recipe.settings("blocks.1.to_q")["method"] == "svdquant"


def test_kinds_match_like_names_and_sizes_replace_that_of_the_split(recipe):
    assert recipe.split("blocks.0.ff.2", "ffn_down").family == "mxint"
    assert recipe.split("blocks.0.to_q").text == "W4A4+W8A8r96"
    budget = RecipeEntry(split="W4A4+W8A8r4", budget="bf16@16")
    assert Recipe(layers={"*": budget}).split("x").text == "W4A4+W8A8@bf16r16"


def test_what_no_entry_matches_or_an_entry_skips_stays_at_sixteen_bits(recipe):
    assert recipe.settings("head") is None
    assert recipe.split("blocks.1.out", "norm_out") is None
    assert recipe.unused({"blocks.0.to_q": "self_q"}) == ["ffn_down", "*.1.to_q", "norm_out"]


def test_brackets_in_a_name_are_taken_as_they_are():
    recipe = Recipe(layers={"blocks[0].q": "W4A4"})
    assert recipe.split("blocks[0].q").text == "W4A4"


NAMES = st.text(alphabet=string.printable + "äé–層\x00\x7f", min_size=1, max_size=12)
ENTRIES = st.builds(
    RecipeEntry,
    split=st.sampled_from(["W4A4", "W4A8+W8A8r3", "W4A4+W4A4@fp16r2"]),
    method=st.none() | st.sampled_from(["loraq", "rtn"]),
    seed=st.none() | st.integers(0, 2**60),
    skip=st.none() | st.booleans(),
)
FACTS = st.recursive(
    st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | NAMES | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80)
@given(
    layers=st.dictionaries(NAMES, ENTRIES, min_size=1, max_size=4),
    provenance=st.dictionaries(NAMES, FACTS, max_size=4),
)
def test_what_is_written_is_read_back(tmp_path_factory, layers, provenance):
    recipe = Recipe(layers=layers, provenance=provenance)
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    assert read_recipe(write_recipe(path, recipe)) == recipe


def test_a_file_that_is_there_is_replaced_only_when_allowed(tmp_path):
    path = tmp_path / "deep" / "r.toml"
    first, second = Recipe(layers={"a": "W4A4"}), Recipe(layers={"b": "W4A8"})
    write_recipe(path, first)
    with pytest.raises(lq.InputError, match="is there already"):
        write_recipe(path, second)
    write_recipe(path, second, overwrite=True)
    assert read_recipe(path) == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rank = 96", "rnk = 96"), r"r.toml:13: unknown key 'rnk'; did you mean 'rank'.*\*.to_q"),
        (("rank = 96", "rank = 0"), r"r.toml:13: .*rank should be greater than or equal to 1"),
        (("rank = 96", "rank = 9.5"), r"rank should be a valid integer, got 9.5"),
        (('"W4A4+W8A8@fp16r32"', '"W4A4+W8"'), r"'blocks.\*': split 'W4A4\+W8' is not understood"),
        (('"svdquant"', '"svdqant"'), r"r.toml:13: .*unknown method 'svdqant'; did you mean"),
        (
            ('"fast"', '"fst"'),
            r"r.toml:9: defaults.preset: unknown preset 'fst'; did you mean 'fast'",
        ),
        (('"mxint"', '"mxit"'), r"unknown family 'mxit'; did you mean 'mxint'"),
        (('"W4A8"', '"W5A8"'), r"family 'mxint' must be 4, 6, 8 or 16 bits, got 5"),
        (("{ skip = true }", "{}"), "entry 'norm_out' is empty"),
        (("{ skip = true }", '{ split = "W4A4", rank = 4 }'), "no branch that rank or budget"),
        (("{ skip = true }", '{ rank = 3, budget = "fp16@2" }'), "either rank or budget"),
        (("{ skip = true }", '{ budget = "int4@2" }'), "budget should match pattern"),
        (("{ skip = true }", "3"), r"r.toml:16: layers.norm_out should be .*got 3"),
        (("recipe = 1", "recipe = 2"), "r.toml:1: recipe should be 1, got 2"),
        (("recipe = 1\n", ""), "is not a recipe"),
        (("[layers]", "[layer]"), r"missing|unknown key 'layer'; did you mean 'layers'"),
        (("[layers]", "[layers"), "is not TOML"),
    ],
)
def test_a_broken_file_says_where_and_how_to_mend_it(tmp_path, change, message):
    path = tmp_path / "r.toml"
    assert change[0] in TEXT
    path.write_text(TEXT.replace(*change))
    with pytest.raises(lq.InputError, match=message) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_unreadable_and_empty_files_are_input_errors(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "e.toml").write_text("recipe = 1\n[layers]\n")
    for name, message in {"a": "cannot read", "b": "UTF-8", "e": "layers should"}.items():
        with pytest.raises(lq.InputError, match=message):
            read_recipe(tmp_path / f"{name}.toml")
    with pytest.raises(lq.InputError, match="is a directory"):
        read_recipe(tmp_path)


def test_an_entry_without_a_split_anywhere_is_an_error_of_its_layer():
    recipe = Recipe(layers={"a": {"rank": 3}})
    with pytest.raises(lq.InputError, match="no split for layer 'a'"):
        recipe.settings("a")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.recipe = 2


def test_provenance_without_a_toml_form_is_refused(tmp_path):
    for odd in (object(), "\ud800"):
        recipe = Recipe(layers={"a": "W4A4"}, provenance={"odd": [odd]})
        with pytest.raises(lq.InputError, match="recipe: "):
            write_recipe(tmp_path / "r.toml", recipe)
    assert not list(tmp_path.iterdir())
