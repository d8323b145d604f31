"""Benchmarks: each prints figures with a reference measured in the same run."""
