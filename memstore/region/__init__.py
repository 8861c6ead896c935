"""Regions: memory of a device that can be handed to another process of this host, by a file descriptor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore.region.host import HostRegion

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from memstore.region.base import Region


def can_share(device: torch.device) -> bool:
    """True where regions of this device can be made and mapped."""
    if device.type == "cpu":
        return HostRegion.is_available()
    from memstore.region.cuda import is_available

    return is_available(device)


def make_region(size_bytes: int, device: torch.device) -> Region:
    """A new region, all of it zero and touched; `padded` bytes of it. Raises OSError, torch.OutOfMemoryError."""
    if device.type == "cpu":
        return HostRegion.make(size_bytes)
    from memstore.region.cuda import CudaRegion

    return CudaRegion.make(size_bytes, device)


def map_region(descriptor: int, size_bytes: int, device: torch.device) -> Region:
    """The region that another process made. The descriptor is duplicated, and stays the caller's.

    Raises OSError where it is not one of a region of this size.
    """
    if device.type == "cpu":
        return HostRegion.map(descriptor, size_bytes)
    from memstore.region.cuda import CudaRegion

    return CudaRegion.map(descriptor, size_bytes, device)


def pinned(pages: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """Lets a GPU copy from and to these whole pages of the host's while nobody waits; what is given ends that.

    Where that cannot be, or the device is the host, copies are as they were: slower, and waited for.
    """
    if device.type == "cpu" or not can_share(device):
        return _nothing
    from memstore.region.cuda import pin

    return pin(pages, device)


def _nothing() -> None:
    """Nothing was pinned."""


def padded(size_bytes: int, device: torch.device) -> int:
    """What a region of so many bytes takes: whole pages."""
    page = 2 << 20 if device.type == "cuda" else 4096
    return -(-size_bytes // page) * page
