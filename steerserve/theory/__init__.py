"""Theory on the bench: superposition in toy models, recovery of planted dictionaries, scaling laws."""
