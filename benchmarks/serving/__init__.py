"""Many requests at once, measured: `python -m benchmarks.serving PART`."""
