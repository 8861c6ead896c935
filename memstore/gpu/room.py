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
        self._dtypes = tuple({field.dtype for field in fields.values()})

    def view(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """A field of (num_bytes,) uint8."""
        first, field = self._fields[name]
        return flat[first : first + field.num_bytes].view(field.dtype).view(field.shape)

    def begins(self, flat: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """The first elements of some fields of (num_bytes,) uint8, each in a shape that is not larger than its own.

        One call of torch a field and dtype: the decode loop waits for it.
        """
        typed = {dtype: flat.view(dtype) for dtype in self._dtypes}
        found = {}
        for name, shape in shapes.items():
            first, field = self._fields[name]
            found[name] = typed[field.dtype].as_strided(shape, _strides(shape), first // field.dtype.itemsize)
        return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor whose elements lie in order."""
    strides, size = [0] * len(shape), 1
    for at in range(len(shape) - 1, -1, -1):
        strides[at] = size
        size *= shape[at]
    return tuple(strides)
