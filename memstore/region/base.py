"""The contract of a region: bytes as a tensor, and the descriptor that another process maps them by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Region(Protocol):
    """Memory that lives as long as any process has it mapped or holds a descriptor of it."""

    @property
    def content(self) -> torch.Tensor:
        """(size,) uint8, the mapped memory itself."""
        ...

    @property
    def descriptor(self) -> int:
        """What another process of this host maps it by; this process's own until `close`."""
        ...

    def populate(self, offset: int, length: int) -> None:
        """Prepares a part of it, so that this process need not wait at the first touch; may do nothing."""
        ...

    def close(self) -> None:
        """Closes the descriptor and gives up the mapping, once no tensor of it is in use. May be called again."""
        ...


def array(region: Region, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The part of a region that begins at byte `offset`, as a tensor that shares it."""
    length = math.prod(shape) * dtype.itemsize
    return region.content[offset : offset + length].view(dtype).view(shape)
