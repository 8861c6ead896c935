"""Malloc: how the C library of this process keeps memory for large messages."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2


def tune() -> bool:
    """Lets glibc keep what was freed instead of giving it back page by page, for the whole process.

    Large replies take a fraction of the page faults then, and the process holds on to the most that it has needed.
    False, and nothing is changed, where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) for name, value in settings)
