"""Quantizers: real tensors to stored codes and back."""

from loraq_sim.quantizers.quantize import SCALE_RULES, quantize
from loraq_sim.quantizers.tensor import QuantizedTensor

__all__ = ["SCALE_RULES", "QuantizedTensor", "quantize"]
