"""The layouts of nunchaku (kernels) and deepcompressor (its quantizer), and ONNX graphs to run."""

from loraq_sim.nunchaku.checkpoint import gelu_shifts, read_nunchaku, write_nunchaku
from loraq_sim.nunchaku.interchange import (
    read_deepcompressor,
    write_deepcompressor,
    write_onnx_model,
)

__all__ = [
    "gelu_shifts",
    "read_deepcompressor",
    "read_nunchaku",
    "write_deepcompressor",
    "write_nunchaku",
    "write_onnx_model",
]
