"""What can make the output of a layer wrong, each in one sentence."""

__all__ = ["BRANCH_SOURCES", "OVERFLOW", "SOURCES"]

OVERFLOW = "float_overflow"

SOURCES = {
    "main_weight": "rounding of the main weight, less what the branch takes up of it",
    "branch_weight": "rounding of the factors L and R",
    "main_activation": "rounding of the activations that enter the main branch",
    "branch_activation": "rounding of the activations that enter the low-rank branch",
    "p_rounding": "rounding of P between the two factors of the branch",
    "accumulator": "overflow of accumulators: wrapped or saturated sums, in all GEMMs",
    "combine": "rounding of sums outside the accumulators: group partials, branches, bias",
    "output_rounding": "rounding of the output to its format",
    OVERFLOW: "values beyond the range of a float format (P, output, scales, sums): infinite or "
    "clamped",
}
"""In the order of the data path."""

BRANCH_SOURCES = ("branch_weight", "branch_activation", "p_rounding")
