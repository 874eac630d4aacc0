"""The name of a case: a digest of everything its result depends on.

The same command run again finds its cases in the store by these names and skips them. Names are
made of content: the values of the layer, the accelerator's description, settings, and the code
that computes (`loraq_sim.sweep.code_digest`). A dump that is renamed, re-ordered or converted
gives the same names; a changed value anywhere gives new ones, so nothing stale is ever taken for
fresh.
"""

import hashlib
import json
from typing import Any

__all__ = ["case_identity"]


def case_identity(**facts: Any) -> str:
    """SHA-256 (hex) of `facts`: strings, numbers, None, and mappings and sequences of them."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
