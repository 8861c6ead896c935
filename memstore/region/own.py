"""Own memory: that of this process alone, made of huge pages as far as there are some."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

from memstore.region.mapping import HUGE_BYTES


def own_memory(size_bytes: int) -> torch.Tensor:
    """(size_bytes,) uint8, zero and touched, that begins with a huge page; given back with its last tensor.

    It is mapped anew, as pages that the C library's heap hands out again stay as small as they were. Raises OSError.
    """
    pages = mmap.mmap(-1, size_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    content = torch.frombuffer(pages, dtype=torch.uint8)
    first = -content.data_ptr() % HUGE_BYTES
    return content[first : first + size_bytes].zero_()
