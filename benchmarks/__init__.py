"""Measurements, run from a checkout: `python -m benchmarks.decode`, `report`, `claim`, `overhead`, and more."""
