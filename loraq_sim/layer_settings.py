"""Per-layer settings by name pattern: ``'*.ff.*:rank=96,method=svdquant'``; and what to skip."""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loraq_sim.errors import InputError, unknown_name

__all__ = [
    "OVERRIDE_KEYS",
    "SIXTEEN_BIT_KINDS",
    "Override",
    "parse_override",
    "settings_of",
    "skipped",
]

# What SVDQuant's published recipes leave at 16 bits in PixArt and SANA (and, but for the adaLN
# weights, in FLUX): embeddings, modulation, text keys and values, depthwise convolutions, the ends.
SIXTEEN_BIT_KINDS = (
    *("patch_embed", "time_embed", "text_embed", "adaln_shared", "adaln_block", "cross_k"),
    *("cross_v", "ffn_dwconv3x3", "norm_out", "proj_out"),
)

OVERRIDE_KEYS = {"rank": int, "budget": str, "split": str, "method": str, "preset": str}


@dataclass(frozen=True, kw_only=True)
class Override:
    """Settings for the layers whose name or kind matches `pattern`."""

    pattern: str
    settings: dict[str, Any]

    def matches(self, name: str, kind: str) -> bool:
        """Whether the layer is meant."""
        return any(fnmatch.fnmatchcase(text, self.pattern) for text in (name, kind))


def parse_override(text: str) -> Override:
    """Parse ``PATTERN:key=value[,key=value]`` with the keys rank, budget, split, method, preset.

    Raises
    ------
    InputError
        If the text is not of this form, or a key or value breaks a rule.
    """
    pattern, colon, assignments = text.rpartition(":")
    if not colon or not pattern or not assignments:
        raise InputError(f"override {text!r} must look like '*.ff.*:rank=96'")
    settings: dict[str, Any] = {}
    for assignment in assignments.split(","):
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if key not in OVERRIDE_KEYS:
            raise InputError(
                unknown_name("setting", key, OVERRIDE_KEYS) + f" (in override {text!r})"
            )
        if not equals or not value:
            raise InputError(f"override {text!r}: {key} needs a value")
        try:
            settings[key] = OVERRIDE_KEYS[key](value)
        except ValueError:
            raise InputError(
                f"override {text!r}: {key} must be a whole number, got {value!r}"
            ) from None
    if "rank" in settings and "budget" in settings:
        raise InputError(f"override {text!r}: give either rank or budget")
    return Override(pattern=pattern, settings=settings)


def settings_of(name: str, kind: str, overrides: Sequence[Override]) -> dict[str, Any]:
    """Settings of one layer; of two overrides that match, the later one wins key by key."""
    merged: dict[str, Any] = {}
    for override in overrides:
        if override.matches(name, kind):
            if {"rank", "budget"} & override.settings.keys():
                merged.pop("rank", None)
                merged.pop("budget", None)
            merged |= override.settings
    return merged


def skipped(name: str, kind: str, patterns: Iterable[str]) -> bool:
    """Whether a layer is left at 16 bits."""
    return any(fnmatch.fnmatchcase(text, p) for p in patterns for text in (name, kind))
