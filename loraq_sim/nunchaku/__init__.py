"""The layouts of nunchaku (kernels) and deepcompressor (its quantizer), and ONNX graphs to run."""

from loraq_sim.nunchaku.checkpoint import (
    read_deepcompressor,
    read_nunchaku,
    write_deepcompressor,
    write_nunchaku,
)
from loraq_sim.nunchaku.onnx_graph import write_onnx_model

__all__ = [
    "read_deepcompressor",
    "read_nunchaku",
    "write_deepcompressor",
    "write_nunchaku",
    "write_onnx_model",
]
