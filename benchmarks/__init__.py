"""Measurements, each with its reference in the same run: `python -m benchmarks.<name>`; see README.md here."""
