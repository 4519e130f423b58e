"""What steering costs: on a real vLLM (`serving`), beside a full encode (`hf`), and step by step (`step`)."""
