"""Accelerator descriptions and cost models."""
