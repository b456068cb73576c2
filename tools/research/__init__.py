"""Experiments: the paper's tables on the demo model, and what limits an alignment."""
