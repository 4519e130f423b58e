"""Markdown of each benchmark's results, as `benchmarks.table` writes it into the README."""
