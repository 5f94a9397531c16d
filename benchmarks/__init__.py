"""Measurements: one harness, results as CSV with a line about the machine. `python -m benchmarks.NAME --help`."""
