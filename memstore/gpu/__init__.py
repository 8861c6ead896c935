"""Exact retrieval on a GPU: kernels compiled by Triton over the slab where it lies, a fixed number of launches."""
