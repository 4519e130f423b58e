"""What steering costs on an NVIDIA GPU: `python -m benchmarks.gpu --out DIR`."""
