"""Benchmarks: each compares with what it stands beside, in one run, and takes ``--json FILE``."""
