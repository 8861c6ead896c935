"""HostRegion: host memory without a name, whose size is sealed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import torch

from memstore.region.mapping import POPULATE_WRITE, Mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""With these nobody can cut the memory off under those that have it mapped: to touch it would end them."""


class HostRegion:
    """See Region."""

    def __init__(self, descriptor: int, mapping: Mapping) -> None:
        """Takes a descriptor over, and what it is mapped as."""
        self.descriptor = descriptor
        self._mapping: Mapping | None = mapping
        self.content = torch.frombuffer(mapping.buffer, dtype=torch.uint8)

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
            mapping = Mapping(descriptor, size_bytes)
            mapping.make_huge()
            region = cls(descriptor, mapping)
        region.content.zero_()
        return region

    @classmethod
    def map(cls, descriptor: int, size_bytes: int) -> HostRegion:
        """What another process made. Raises OSError where that is not sealed, or of another size."""
        if os.fstat(descriptor).st_size != size_bytes or _seals(descriptor) & _SEALS != _SEALS:
            raise OSError(errno.EINVAL, "not a region of the expected size")
        own = os.dup(descriptor)
        with _kept(own):
            return cls(own, Mapping(own, size_bytes))

    def populate(self, offset: int, length: int) -> None:
        """Has the pages of a part entered for this process, so that no touch of them faults later."""
        begin, end = offset - offset % mmap.PAGESIZE, offset + length
        if self._mapping is not None:  # on an older kernel they are entered when they are touched
            self._mapping.advise(POPULATE_WRITE, begin, end - begin)

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
