"""ReplyRoom: one piece of memory for all tensors of a reply, so that they are copied at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIGNMENT = 256
"""Bytes: what kernels may expect of a tensor's address."""


class Field(NamedTuple):
    """What one tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class ReplyRoom:
    """Where each field lies in `num_bytes` bytes."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields: dict[str, tuple[int, Field]] = {}
        self.num_bytes = 0
        for name, field in fields.items():
            self._fields[name] = (self.num_bytes, field)
            self.num_bytes += -(-field.num_bytes // ALIGNMENT) * ALIGNMENT

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """A field of (num_bytes,) uint8."""
        first, field = self._fields[name]
        return flat[first : first + field.num_bytes].view(field.dtype).view(field.shape)
