"""Measurements that run an engine: equality, invariance, routing, speed-up."""
