"""What the name of a precision split says, read without the parser of `loraq_sim`.

Results may come from an old store or another tool, so a name that does not parse is no error here.
"""

import re

__all__ = ["NO_BRANCH", "main_and_branch", "main_weight_bits"]

NO_BRANCH = "none"

_RANK = re.compile(r"(@[a-z0-9]+)?r\d+$", re.IGNORECASE)
_WEIGHT_BITS = re.compile(r"W(\d+)", re.IGNORECASE)


def main_and_branch(split: str) -> tuple[str, str]:
    """Main precision and branch precision named by a split; the branch is ``none`` without one.

    >>> main_and_branch("W4A4+W8A8@fp16r32"), main_and_branch("W4A8")
    (('W4A4', 'W8A8'), ('W4A8', 'none'))
    """
    main, _, branch = split.partition("+")
    return main, _RANK.sub("", branch) or NO_BRANCH


def main_weight_bits(split: str) -> int | None:
    """Bits of the main branch's weights, None if the name does not say.

    >>> main_weight_bits("W4A8+W16A16r32")
    4
    """
    found = _WEIGHT_BITS.match(split)
    return int(found.group(1)) if found else None
