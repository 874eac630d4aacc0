"""Overrides and skip lists by name or kind."""

import pytest

from loraq_sim.errors import InputError
from loraq_sim.settings import SIXTEEN_BIT_KINDS, parse_override, settings_of, skipped


def test_later_overrides_win_key_by_key_and_rank_replaces_budget():
    texts = ("*.ff.*:rank=96,preset=best", "ffn_down:budget=fp16@16", "*:method=svdquant")
    overrides = [parse_override(text) for text in texts]
    assert settings_of("blocks.0.ff.net.2", "ffn_down", overrides) == {
        "preset": "best",
        "budget": "fp16@16",
        "method": "svdquant",
    }
    assert settings_of("blocks.0.ff.net.0", "ffn_up", overrides) == {
        "rank": 96,
        "preset": "best",
        "method": "svdquant",
    }
    assert settings_of("blocks.0.attn", "self_q", overrides) == {"method": "svdquant"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.ff.*", r"must look like '\*\.ff\.\*:rank=96'"),
        (":rank=4", r"must look like"),
        ("*:", r"must look like"),
        ("*:rnk=4", r"unknown setting 'rnk'; did you mean 'rank'"),
        ("*:rank", r"rank needs a value"),
        ("*:rank=four", r"rank must be a whole number, got 'four'"),
        ("*:rank=4,budget=fp16@4", r"give either rank or budget"),
    ],
)
def test_override_says_what_is_wrong(text, message):
    with pytest.raises(InputError, match=message):
        parse_override(text)


def test_kinds_and_names_are_skipped_alike():
    assert skipped("blocks.0.attn2.to_k", "cross_k", SIXTEEN_BIT_KINDS)
    assert not skipped("blocks.0.attn2.to_q", "cross_q", SIXTEEN_BIT_KINDS)
    assert skipped("blocks.0.attn2.to_q", "cross_q", ("*to_q",))
