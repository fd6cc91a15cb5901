"""Disaggregated mixture-of-experts training for Megatron-LM (DisagMoE, arXiv 2605.11005)."""

__version__ = "0.1.0"
