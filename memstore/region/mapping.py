"""Mapping: a file's bytes in the memory of this process, laid out so that the kernel can use huge pages for them."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

HUGE_BYTES = 2 << 20
"""A page of the large kind. Reading rows that lie in small ones takes a third longer."""
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14, which Python has no name for."""
COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1, the same: small pages become huge ones, whatever the system's settings prefer."""
_FIXED = 0x10
"""MAP_FIXED of Linux, the same: in place of what is mapped there."""
_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """Shared, to be read and written. It ends with the last user of `buffer`."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Maps the file from its first byte, at a multiple of a huge page where it is that large. Raises OSError."""
        room = size_bytes + HUGE_BYTES if size_bytes >= HUGE_BYTES else size_bytes
        begin = _mmap(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.address = -(-begin // HUGE_BYTES) * HUGE_BYTES if room > size_bytes else begin
        try:
            rights = mmap.PROT_READ | mmap.PROT_WRITE
            _mmap(self.address, size_bytes, rights, mmap.MAP_SHARED | _FIXED, descriptor)
        except OSError:
            _munmap(begin, room)
            raise
        self.buffer = (ctypes.c_char * size_bytes).from_address(self.address)
        # not at the end of the process: other threads may still read it then
        weakref.finalize(self.buffer, _munmap, begin, room).atexit = False

    def advise(self, advice: int, offset: int, length: int) -> bool:
        """Tells the kernel what to do with whole pages; False where it does not."""
        code: int = _libc.madvise(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(length), advice)
        return code == 0

    def make_huge(self) -> None:
        """Has a mapping that nobody has touched made of huge pages, as far as there are some."""
        whole = len(self.buffer) // HUGE_BYTES * HUGE_BYTES
        for first in range(0, whole, HUGE_BYTES):
            self.buffer[first] = b"\0"  # what has no page at all cannot become a huge one
        if whole:
            self.advise(COLLAPSE, 0, whole)


_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "mmap"):
    _libc.mmap.restype = ctypes.c_void_p


def _mmap(address: int | None, length: int, rights: int, flags: int, descriptor: int) -> int:
    sizes = ctypes.c_void_p(address), ctypes.c_size_t(length)
    found: int | None = _libc.mmap(*sizes, rights, flags, descriptor, ctypes.c_long(0))
    if found is None or found == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _munmap(address: int, length: int) -> None:
    _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))
