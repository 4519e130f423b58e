"""The embedded demo: a corpus from a grammar of ours and a small language model trained on it."""
