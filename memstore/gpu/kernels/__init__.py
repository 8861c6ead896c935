"""The kernels of retrieval on a GPU, in Triton's language: what looks like numbers and arrays is on the device."""
