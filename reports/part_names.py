"""What the parts of a cost are called where people read them."""

__all__ = ["BOUND_NAMES", "PART_NAMES"]

PART_NAMES = {
    "main": "main branch",
    "branch_down": "branch, X R\u1d40",
    "branch_up": "branch, P L\u1d40",
    "combine": "group scaling",
    "tile": "tile overhead",
    "stall": "waiting for memory",
    "fill": "pipeline fill",
    "dispatch": "kernel start",
    "mac_main": "MACs, main branch",
    "mac_branch": "MACs, branch",
    "vector": "vector unit",
    "unpack": "unpacking",
    "l1": "L1",
    "l2": "L2",
    "dram": "DRAM",
    "static": "static power",
    "activations": "activations",
    "weights": "main weights",
    "factors": "branch factors",
    "output": "output",
    "p": "P",
    "left": "branch, L",
    "right": "branch, R",
}
"""A part that is not listed keeps its own name."""

BOUND_NAMES = {
    "compute": "MAC rate",
    "vector": "vector unit",
    "l1": "L1 bandwidth",
    "l2": "L2 bandwidth",
    "dram": "DRAM bandwidth",
    "dispatch": "kernel start",
    "side": "side unit",
}
