"""Faults of models, each put into vLLM's Llama by an import."""
