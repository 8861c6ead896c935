"""The limits of the wire contract, in numbers; proto/memstore/v1/memstore.proto says them in words."""

from __future__ import annotations

MAX_MEMORY_NAME = 128
MAX_SEQUENCE_NAME = 128
MAX_WRITER_NAME = 64
MAX_PAYLOAD_NAME = 64
MAX_DIM = 8_192
MAX_CAPACITY = 16_777_216
MAX_LARGE_CAPACITY = 134_217_728
"""Entries of one layer of one sequence where the index may miss rows."""
MAX_SEQUENCES = 65_536
MAX_LAYERS = 256
MAX_SPILLED = 1_048_576
"""Sequences without a place on the device."""
MAX_IDLE_TTL_S = 31_536_000
"""A year."""
MAX_PAYLOADS = 8
MAX_PAYLOAD_DIMS = 4
MAX_PAYLOAD_BYTES = 1 << 24
"""Bytes of one payload array of one entry: 16 MiB, a quarter of the largest message."""
MAX_TAGS = 64
MAX_TAG_KEY = 63
MAX_TAG_VALUE = 255
MIN_GENERATION_ROWS = 16
MAX_GENERATION_ROWS = 16_777_216
MAX_NLIST = 65_536
MAX_NPROBE = 2_048
MAX_PQ_M = 256
MIN_PQ_BITS = 4
MAX_PQ_BITS = 8
MIN_GRAPH_DEGREE = 4
MAX_GRAPH_DEGREE = 128
MIN_ITOPK = 16
MAX_ITOPK = 512
MAX_PARTS = 4_096
MAX_POSITION = 1 << 62
"""Far beyond any that comes to be, and yet something can be added to it."""
MAX_TOP_K = 1_024
MAX_WINDOW_SIDE = 64
MAX_MESSAGE_BYTES = 64 << 20
MIN_PIECE_BYTES = 1 << 16
"""Smallest longest piece that a caller may ask for: a message costs as much as the copying of it."""
MAX_PIECE_BYTES = 1 << 20
MAX_MESSAGE_PARTS = 1 << 16
"""Fields of a message, and of those in it that can hold many: a step of 4,096 sequences has some 4,200."""
MAX_KEY_ABS = 1e17
"""Largest magnitude of a key's element: squares of 8,192 of them still have a finite sum in binary32."""
