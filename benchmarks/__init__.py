"""Measurements of memstore, one file a question; benchmarks/README.md says how to read them."""
