"""Where the error of one (layer, split, accelerator) comes from, and where its cost goes."""

from loraq_sim.explain.terms import Explanation, explain_case

__all__ = ["Explanation", "explain_case"]
