"""What steering costs: measured on a real vLLM (`serving`), and step by step without one (`step`)."""
