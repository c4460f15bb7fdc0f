"""Distributions and decisions: pure functions of arrays."""
