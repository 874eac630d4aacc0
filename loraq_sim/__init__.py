"""loraq-sim: error against cost of 4-bit + low-rank diffusion transformers."""
