"""Measurements, each a command: python -m benchmarks [transport] [overhead]."""
