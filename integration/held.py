"""HeldRows: rows that wait beside the model's key-value cache until they leave for the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of a batch of sequences, one sequence behind the other.

    keys: (N, dim). hidden: (N, hidden_size), None where the memory keeps none. counts: rows of each sequence.
    """

    keys: torch.Tensor
    hidden: torch.Tensor | None
    counts: tuple[int, ...]


class HeldRows:
    """A queue of rows for each sequence, first in first out. `counts`: rows that wait, of each sequence."""

    def __init__(self) -> None:
        self.counts: tuple[int, ...] = ()
        self._batches: list[RowBatch] = []

    def add(self, batch: RowBatch) -> None:
        """Puts rows at the end; the number of sequences must be that of what waits already."""
        waiting = self.counts or (0,) * len(batch.counts)
        self.counts = tuple(had + more for had, more in zip(waiting, batch.counts, strict=True))
        self._batches.append(batch)

    def clear(self) -> None:
        """Forgets all rows."""
        self.counts = ()
        self._batches = []

    def drop_last(self, unwanted: tuple[int, ...]) -> None:
        """Forgets the last `unwanted` rows of each sequence. ValueError where fewer wait."""
        kept = tuple(count - drop for count, drop in zip(self.counts, unwanted, strict=True))
        if min(kept, default=0) < 0:
            raise ValueError(f"{unwanted} rows to drop, {self.counts} wait")
        rows = self.take(kept)
        self.clear()
        self.add(rows)

    def take(self, wanted: tuple[int, ...]) -> RowBatch:
        """Takes the first `wanted` rows of each sequence, at most as many as wait."""
        whole = self._joined()
        if wanted == whole.counts:
            self.clear()
            return whole
        begins = [sum(whole.counts[:number]) for number in range(len(whole.counts))]
        spans = list(zip(begins, whole.counts, wanted, strict=True))
        taken = _select(whole, [(begin, begin + want) for begin, _, want in spans])
        rest = _select(whole, [(begin + want, begin + count) for begin, count, want in spans])
        self.clear()
        if any(rest.counts):
            self.add(rest)
        return taken

    def _joined(self) -> RowBatch:
        if len(self._batches) == 1:
            return self._batches[0]
        sequence = torch.cat(
            [torch.arange(len(each.counts)).repeat_interleave(torch.tensor(each.counts)) for each in self._batches]
        )
        order = torch.argsort(sequence, stable=True)
        keys = torch.cat([each.keys for each in self._batches])
        hidden = [each.hidden for each in self._batches if each.hidden is not None]
        order = order.to(keys.device)
        return RowBatch(keys[order], torch.cat(hidden)[order] if hidden else None, self.counts)


def _select(batch: RowBatch, spans: list[tuple[int, int]]) -> RowBatch:
    counts = tuple(end - begin for begin, end in spans)
    rows = torch.cat([torch.arange(begin, end) for begin, end in spans]).to(batch.keys.device)
    return RowBatch(batch.keys[rows], None if batch.hidden is None else batch.hidden[rows], counts)
