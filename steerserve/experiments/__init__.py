"""Two experimental architectures on synthetic data of their own kind, beside flat SAEs. Nothing is served."""
