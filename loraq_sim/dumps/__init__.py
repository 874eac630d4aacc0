"""Layer dumps: files that hold the weights and sampled inputs of a model's linear layers."""

from loraq_sim.dumps.layer_dump import LayerDump, LayerInfo, read_layer_dump
from loraq_sim.dumps.steps import summarize
from loraq_sim.dumps.write import write_layer_dump

__all__ = ["LayerDump", "LayerInfo", "read_layer_dump", "summarize", "write_layer_dump"]
