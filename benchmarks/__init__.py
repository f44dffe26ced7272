"""Measurements of safebasin: ``python -m benchmarks --list``."""
