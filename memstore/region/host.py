"""HostRegion: host memory without a name, whose size is sealed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""With these nobody can cut the memory off under those that have it mapped: to touch it would end them."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14, which Python has no name for."""
_AT_ONCE = 8 << 20
"""Bytes entered at once: Python holds its lock meanwhile."""


class HostRegion:
    """See Region."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Maps a descriptor and takes it over."""
        self.descriptor = descriptor
        mapping = mmap.mmap(descriptor, size_bytes)
        with contextlib.suppress(OSError):  # a kernel that has no huge pages for shared memory
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._mapping: mmap.mmap | None = mapping
        self.content = torch.frombuffer(mapping, dtype=torch.uint8)

    @staticmethod
    def is_available() -> bool:
        """True on Linux."""
        return hasattr(os, "memfd_create")

    @classmethod
    def make(cls, size_bytes: int) -> HostRegion:
        """A new region, zero and touched. Raises OSError."""
        descriptor = os.memfd_create("memstore", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with _kept(descriptor):
            os.ftruncate(descriptor, size_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            region = cls(descriptor, size_bytes)
        region.content.zero_()
        return region

    @classmethod
    def map(cls, descriptor: int, size_bytes: int) -> HostRegion:
        """What another process made. Raises OSError where that is not sealed, or of another size."""
        if os.fstat(descriptor).st_size != size_bytes or _seals(descriptor) & _SEALS != _SEALS:
            raise OSError(errno.EINVAL, "not a region of the expected size")
        own = os.dup(descriptor)
        with _kept(own):
            return cls(own, size_bytes)

    def populate(self, offset: int, length: int) -> None:
        """Has the pages of a part entered for this process, so that no touch of them faults later."""
        begin, end = offset - offset % mmap.PAGESIZE, offset + length
        if self._mapping is None:
            return
        with contextlib.suppress(OSError):  # an older kernel: they are entered when they are touched
            for first in range(begin, end, _AT_ONCE):
                self._mapping.madvise(_POPULATE_WRITE, first, min(_AT_ONCE, end - first))

    def close(self) -> None:
        """The mapping ends with the last tensor of it."""
        self.content, self._mapping = torch.empty(0, dtype=torch.uint8), None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@contextlib.contextmanager
def _kept(descriptor: int) -> Iterator[None]:
    """Closes a descriptor where the block fails."""
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _seals(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
