"""Speed measurements, run from a checkout: `python -m benchmarks.peers`."""
