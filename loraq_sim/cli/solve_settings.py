"""Which settings ``solve`` runs each layer with: recipe, flags and overrides put together.

Where they disagree, an ``--override`` wins over a flag that was given, that over the recipe, and
the recipe over the defaults of the flags.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loraq_sim.errors import InputError
from loraq_sim.layer_settings import (
    SIXTEEN_BIT_KINDS,
    Override,
    settings_of,
    settings_with,
    skipped,
)

if TYPE_CHECKING:
    from loraq_sim.recipe import Recipe

__all__ = ["SolveSettings"]

_DEFAULT_SPLIT = "W4A4+W8A8@fp16r32"
_DEFAULT_METHOD = "loraq"
_SCALARS = ("family", "group", "preset", "seed", "smooth", "rotate")


@dataclass(frozen=True, kw_only=True)
class SolveSettings:
    """What was asked for; `explicit` names the scalar settings that were given as flags."""

    values: Mapping[str, Any]
    explicit: frozenset[str]
    recipe: "Recipe | None"
    overrides: tuple[Override, ...]
    skip: tuple[str, ...]

    @classmethod
    def checked(
        cls,
        values: Mapping[str, Any],
        *,
        is_given: Callable[[str], bool],
        recipe: Path | None,
        overrides: tuple[Override, ...],
        skip: tuple[str, ...],
        has_layers: bool,
    ) -> Self:
        """Check splits and read the recipe; `values` has splits, methods and the scalars."""
        from loraq_sim.split import parse_split

        for text in values["splits"]:
            parse_split(text, family=values["family"], group=values["group"])
        if recipe is not None and values["splits"]:
            raise InputError(
                "--recipe names the splits; leave out --split (--override can change single layers)"
            )
        read = None
        if recipe is not None:
            from loraq_sim.recipe import read_recipe

            read = read_recipe(recipe)
        by_default = () if has_layers or read else SIXTEEN_BIT_KINDS
        return cls(
            values=values,
            explicit=frozenset(name for name in _SCALARS if is_given(name)),
            recipe=read,
            overrides=overrides,
            skip=() if skip == ("none",) else skip or by_default,
        )

    @property
    def n_variants(self) -> int:
        """How many times each layer is solved."""
        return max(1, len(self.values["splits"])) * max(1, len(self.values["methods"]))

    def cases(self, dump: Any, source: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Settings of every solve with the layer's name, and notes on what is left out.

        Raises
        ------
        InputError
            If no layer is left.
        """
        kinds = {name: _kind(dump, name) for name in dump}
        cases = {name: self._layer_cases(name, kind) for name, kind in kinds.items()}
        kept = [name for name in cases if cases[name]]
        notes = []
        if len(kept) < len(dump):
            why = "--skip none: none" if self.recipe is None else "the recipe leaves them"
            notes.append(f"{len(dump) - len(kept)} of {len(dump)} layers stay at 16 bits ({why})")
        unused = [] if self.recipe is None else self.recipe.unused(kinds)
        if not kept:
            if unused:
                raise InputError(f"{source}: no layer matches the recipe, such as {unused[0]!r}")
            raise InputError(f"{source}: every layer is skipped; give --skip none or --layers")
        if unused:
            notes.append(
                f"{len(unused)} entries of the recipe match no layer here, such as {unused[0]!r}"
            )
        return [case for name in kept for case in cases[name]], notes

    def _layer_cases(self, name: str, kind: str) -> list[dict[str, Any]]:
        if skipped(name, kind, self.skip):
            return []
        scalars = {key: self.values[key] for key in _SCALARS}
        if self.recipe is None:
            stated: dict[str, Any] = scalars
            splits = self.values["splits"] or (_DEFAULT_SPLIT,)
        else:
            found = self.recipe.settings(name, kind)
            if found is None:
                return []
            stated = scalars | found | {key: scalars[key] for key in self.explicit}
            splits = (stated["split"],)
        methods = self.values["methods"] or (stated.get("method", _DEFAULT_METHOD),)
        own = settings_of(name, kind, self.overrides)
        return [
            {"layer": name} | settings_with(stated | {"split": split, "method": method}, own)
            for split in splits
            for method in methods
        ]


def _kind(dump: Any, name: str) -> str:
    try:
        return dump.info(name).kind
    except InputError:
        # A layer that cannot be described gets a failed row when it is solved.
        return ""
