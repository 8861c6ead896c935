"""TokenLayout: which cells of a padded batch hold tokens, and the way to and from rows without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """A batch of `batch` rows of `length` cells.

    counts: tokens of each row. places: (N,) int64 cells that hold tokens, row by row; None where every cell does.
    """

    batch: int
    length: int
    counts: tuple[int, ...]
    places: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: int, length: int, mask: torch.Tensor | None) -> Self:
        """mask: (batch, at least length), its last cells those of this call, 0 for padding; None for no padding.

        Raises ValueError on a mask of another form.
        """
        full = cls(batch, length, (length,) * batch)
        if mask is None:
            return full
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            raise ValueError(f"attention_mask: a tensor of shape ({batch}, {length} or more) is needed with a memory")
        is_token = mask[:, -length:] != 0
        counts = tuple(is_token.sum(dim=1).tolist())
        if counts == full.counts:
            return full
        return cls(batch, length, counts, is_token.reshape(-1).nonzero().squeeze(1))

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, h) -> (N, h)."""
        flat = states.reshape(self.batch * self.length, -1)
        return flat if self.places is None else flat[self.places]

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, h) -> (batch, length, h), zero in the padding."""
        if self.places is None:
            return rows.view(self.batch, self.length, -1)
        cells = rows.new_zeros(self.batch * self.length, rows.shape[-1])
        return cells.index_copy(0, self.places, rows).view(self.batch, self.length, -1)
