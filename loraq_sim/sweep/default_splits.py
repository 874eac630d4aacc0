"""The splits a sweep looks at when the user names none.

No branch, the 16-bit branch of SVDQuant, and low-precision branches that fit the same bytes (the
question of LoRaQ), on a 4-bit main branch with 4-bit and with 8-bit activations.
"""

from collections.abc import Iterable

from loraq_sim.dumps import LayerInfo

__all__ = ["default_splits"]

# PixArt-Sigma: SVDQuant's rank 32 on width 1152.
_WIDTH_PER_RANK = 1152 / 32
_RANK_STEP = 4
_LEAST_WIDTH_PER_RANK = 8

_SPLITS = (
    "W4A4",
    "W4A8",
    "W8A8",
    "W4A4+W16A16r{rank}",
    "W4A4+W8A8@fp16r{rank}",
    "W4A4+W6A6@fp16r{rank}",
    "W4A4+W4A8@fp16r{rank}",
    "W4A4+W4A4@fp16r{rank}",
    "W4A4+W8A8@fp16r{double}",
    "W4A4+W4A8@fp16r{double}",
    "W4A8+W16A16r{rank}",
    "W4A8+W8A8@fp16r{rank}",
    "W4A8+W4A8@fp16r{rank}",
)


def default_splits(layers: Iterable[LayerInfo]) -> tuple[tuple[str, ...], str]:
    """Default splits for these layers, and one sentence on the rank that was chosen.

    The 16-bit rank is 1/36 of the narrowest layer's smaller side (PixArt's 32 of 1152) in steps
    of 4, at least 4. In layers narrower than 32 it is an eighth of that side, at least 2: twice
    the rank is asked for as well, and 4-bit elements fit up to four times as many.
    """
    narrowest = min(layers, key=lambda info: min(info.n, info.k))
    width = min(narrowest.n, narrowest.k)
    rank = max(_RANK_STEP, _RANK_STEP * round(width / _WIDTH_PER_RANK / _RANK_STEP))
    # A budget of one rank can be less than one rank's codes and scales take.
    rank = min(rank, max(2, width // _LEAST_WIDTH_PER_RANK), width)
    splits = tuple(text.format(rank=rank, double=2 * rank) for text in _SPLITS)
    note = (
        f"default splits with 16-bit-equivalent ranks {rank} and {2 * rank}: the narrowest layer, "
        f"{narrowest.name}, has width {width}, and PixArt's rank 32 is 1/36 of its width 1152"
    )
    return splits, note
