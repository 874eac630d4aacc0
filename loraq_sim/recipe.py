"""Recipes: which split each layer of a model runs in, as a TOML file people can read and edit.

    recipe = 1                                  # version of this layout

    [provenance]                                # optional, any keys: where the recipe comes from
    model = "pixart.safetensors"
    accelerator = "aie2"

    [defaults]                                  # optional: what a layer's entry leaves open
    method = "loraq"
    preset = "balanced"

    [layers]                                    # name, kind or pattern = split, or settings
    "transformer_blocks.*" = "W4A4+W8A8@fp16r32"
    "*.attn1.to_q" = { rank = 96, method = "svdquant" }
    ffn_down = { split = "W4A8", family = "mxint" }
    "*.norm_out" = { skip = true }              # stays at 16 bits

Entries that match a layer follow the rule of overrides (`loraq_sim.settings`), from the defaults
on. A layer that no entry matches stays at 16 bits. The keys of an entry are the fields of
`RecipeEntry`. Files are written with one layer a line, columns aligned, and a comment on how to use
them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loraq_sim.conditioning import check_condition, check_rotation
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.files import line_of, make_folder, read_toml, refuse_existing, write_file
from loraq_sim.settings import NONE, Override, matches, settings_of, settings_with
from loraq_sim.solvers.gptq import check_finish
from loraq_sim.solvers.solve import METHODS, PRESETS
from loraq_sim.split import FAMILIES, PrecisionSplit, parse_split

__all__ = [
    "Recipe",
    "RecipeEntry",
    "read_recipe",
    "recipe_text",
    "split_of",
    "write_recipe",
]


_HEAD = """\
# Precision recipe: which split each layer runs in. To solve a model with it:
#   loraq-sim solve --layer-dump DUMP --recipe THIS_FILE --save MODEL.safetensors
# Of several entries that match a layer by name or kind, the later one wins, key by key.
# Layers without an entry stay at 16 bits.
"""
_MOST_SHOWN = 8
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def recipe_text(recipe: "Recipe") -> str:
    """The TOML text of a recipe, as `read_recipe` reads it.

    Raises
    ------
    InputError
        If a value of the provenance has no TOML form.
    """
    content = recipe.model_dump(exclude_none=True)
    lines = [_HEAD, f"recipe = {content['recipe']}"]
    for table in ("provenance", "defaults"):
        if content.get(table):
            lines += ["", f"[{table}]"]
            # TOML has no null: what is not known is left out.
            known = {k: v for k, v in content[table].items() if v is not None}
            lines += [f"{_key(key)} = {_value(value)}" for key, value in known.items()]
    lines += ["", "[layers]"]
    keys = [_key(pattern) for pattern in content["layers"]]
    width = max(map(len, keys))
    for key, entry in zip(keys, content["layers"].values(), strict=True):
        lone = entry["split"] if entry.keys() == {"split"} else entry
        lines.append(f"{key:<{width}} = {_value(lone)}")
    return "\n".join(lines) + "\n"


def _key(key: Any) -> str:
    text = str(key)
    return text if _BARE_KEY.fullmatch(text) else _text(text)


def _text(text: str) -> str:
    # A TOML basic string is a JSON string but for DEL, and lone surrogates have no UTF-8 form.
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise InputError(f"recipe: {text!r} is not Unicode text")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        pairs = [f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise InputError(f"recipe: a {type(value).__name__} has no TOML form: {value!r:.80}")


_NAMES: dict[str, Collection[str]] = {"method": METHODS, "preset": PRESETS, "family": FAMILIES}
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class RecipeEntry(BaseModel):
    """Settings of the layers one pattern matches; None leaves a setting open.

    ``rank`` and ``budget`` (such as ``"fp16@32"``) replace the size of the split's branch; ``skip``
    leaves the layers at 16 bits; ``"none"`` ends a ``smooth``, ``rotate``, ``condition`` or
    ``finish`` of an earlier entry or of the defaults. The others are arguments of
    `loraq_sim.parse_split` and `loraq_sim.solve`. A text alone is a split.
    """

    model_config = _STRICT

    split: str | None = None
    rank: int | None = Field(default=None, ge=1)
    budget: str | None = Field(default=None, pattern=r"^(fp16|bf16)@[1-9]\d{0,5}$")
    method: str | None = None
    preset: str | None = None
    family: str | None = None
    group: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)
    smooth: Annotated[float, Field(ge=0, le=1)] | Literal["none"] | None = None
    rotate: str | None = None
    condition: str | None = None
    finish: str | None = None
    skip: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_split(cls, value: Any) -> Any:
        return {"split": value} if isinstance(value, str) else value

    @field_validator("method", "preset", "family")
    @classmethod
    def _is_known(cls, value: str | None, info: ValidationInfo) -> str | None:
        field = str(info.field_name)
        if value is not None and value not in _NAMES[field]:
            raise InputError(unknown_name(field, value, _NAMES[field]))
        return value

    @field_validator("rotate")
    @classmethod
    def _is_a_rotation(cls, value: str | None) -> str | None:
        return value if value == NONE else check_rotation(value)

    @field_validator("condition")
    @classmethod
    def _is_a_condition(cls, value: str | None) -> str | None:
        return value if value == NONE else check_condition(value)

    @field_validator("finish")
    @classmethod
    def _is_a_finish(cls, value: str | None) -> str | None:
        return value if value == NONE else check_finish(value)

    @model_validator(mode="after")
    def _has_one_size(self) -> Self:
        if self.rank is not None and self.budget is not None:
            raise InputError("give either rank or budget")
        return self

    def given(self) -> dict[str, Any]:
        """The settings that are not open."""
        return self.model_dump(exclude_none=True)


class Recipe(BaseModel):
    """A checked recipe.

    ``layers`` maps names, kinds or patterns to entries, in order; ``provenance`` holds what the
    writer knows of where the choices come from (numbers, texts, lists or tables of them).
    """

    model_config = _STRICT

    recipe: Literal[1] = 1
    provenance: dict[str, Any] = {}
    defaults: RecipeEntry = RecipeEntry()
    layers: dict[str, RecipeEntry] = Field(min_length=1)

    def __repr__(self) -> str:
        given = [entry.given().get("split") for entry in self.layers.values()]
        default = self.defaults.split if self.defaults else None
        counts = Counter(str(split or default or "settings") for split in given)
        told = ", ".join(f"{count} in {split}" for split, count in counts.most_common(_MOST_SHOWN))
        return f"Recipe of {len(self.layers)} entries: {told}"

    @model_validator(mode="after")
    def _every_entry_makes_sense(self) -> Self:
        for pattern, entry in self.layers.items():
            settings = settings_with(self.defaults.given(), entry.given())
            if not entry.given():
                raise InputError(f"the entry {pattern!r} is empty: give a split, such as 'W4A4'")
            if "split" not in settings:
                continue
            try:
                split = split_of(settings)
            except InputError as error:
                raise InputError(f"the entry {pattern!r}: {error}") from None
            if not split.has_branch and (entry.rank or entry.budget):
                raise InputError(
                    f"the entry {pattern!r}: {split} has no branch that rank or budget could size"
                )
        return self

    def settings(self, name: str, kind: str = "") -> dict[str, Any] | None:
        """Settings of one layer with the defaults filled in, None if it stays at 16 bits.

        Raises
        ------
        InputError
            If an entry matches and neither it nor the defaults name a split.
        """
        entries = [
            Override(pattern=pattern, settings=entry.given())
            for pattern, entry in self.layers.items()
            if matches(pattern, name, kind)
        ]
        settings = settings_of(name, kind, entries, self.defaults.given())
        if not entries or settings.pop("skip", False):
            return None
        if "split" not in settings:
            raise InputError(f"recipe: no split for layer {name!r}; add one to its entry")
        return settings

    def split(self, name: str, kind: str = "") -> PrecisionSplit | None:
        """The split of one layer, None if it stays at 16 bits."""
        settings = self.settings(name, kind)
        return None if settings is None else split_of(settings)

    def unused(self, layers: Mapping[str, str]) -> list[str]:
        """Patterns that match none of `layers`, a mapping of layer names to kinds."""
        return [
            pattern
            for pattern in self.layers
            if not any(matches(pattern, name, kind) for name, kind in layers.items())
        ]


def split_of(settings: Mapping[str, Any]) -> PrecisionSplit:
    """The split that settings name, with their family, group, and rank or budget."""
    options = {key: settings[key] for key in ("family", "group") if key in settings}
    split = parse_split(settings["split"], **options)
    if not split.has_branch or not {"rank", "budget"} & settings.keys():
        return split
    return split.sized(rank=settings.get("rank"), budget=settings.get("budget"))


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file (TOML; the layout is in `loraq_sim.recipe`).

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or a key or value breaks a rule. The message names
        file, line, key, value and the nearest valid name.
    """
    path = Path(path)
    text, content = read_toml(path, "recipe")
    if "recipe" not in content:
        raise InputError(f"{path}: is not a recipe: it lacks the line 'recipe = 1'")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(_explained(path, text, error)) from None


def write_recipe(path: str | Path, recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Write `recipe` so that `read_recipe` gives it back.

    Raises
    ------
    InputError
        If the file exists and `overwrite` is False, or a value of the provenance has no TOML form.
    """
    path = Path(path)
    refuse_existing(path, overwrite=overwrite)
    text = recipe_text(recipe)
    make_folder(path.parent)
    return write_file(path, text)


def _explained(path: Path, text: str, error: ValidationError) -> str:
    """The first problem pydantic found: file, line, key, rule, value."""
    problem = error.errors()[0]
    where = problem["loc"]
    key = ".".join(str(part) for part in where)
    prefix = f"{path}:{line_of(text, *where)}: "
    if problem["type"] == "value_error":
        return f"{prefix}{key + ': ' if key else ''}{problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        model = Recipe if len(where) == 1 else RecipeEntry
        return prefix + unknown_name("key", str(where[-1]), model.model_fields) + _inside(where)
    if problem["type"] == "missing":
        return f"{path}: the table [{key}] is missing: it says which layer runs in which split"
    rule = problem["msg"].partition(" should ")[2]
    return f"{prefix}{key} should {rule}, got {problem['input']!r:.80}"


def _inside(where: tuple[Any, ...]) -> str:
    return f" (in {'.'.join(str(part) for part in where[:-1])})" if len(where) > 1 else ""
