"""Steer language models by the features of sparse autoencoders, inside stock vLLM."""

__version__ = "0.1.0"
