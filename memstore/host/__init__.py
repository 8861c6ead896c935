"""Exact retrieval on the host: compiled kernels over the slab where it lies, and the threads that share them."""
