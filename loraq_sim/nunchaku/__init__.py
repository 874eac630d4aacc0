"""The layouts of nunchaku (kernels) and deepcompressor (its quantizer), written and read."""

from loraq_sim.nunchaku.checkpoint import (
    read_deepcompressor,
    read_nunchaku,
    write_deepcompressor,
    write_nunchaku,
)

__all__ = ["read_deepcompressor", "read_nunchaku", "write_deepcompressor", "write_nunchaku"]
