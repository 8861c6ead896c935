"""Nominating: the candidates that generations give for the queries of a batch, by scores of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memstore.index.crew import Crew

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from memstore.index.generation import Generation, Part, View
    from memstore.search import SearchBatch

QUERY_S = 0.002
"""What a thread of the host takes to search a generation for one query, at most, unless it is held up."""


class Nominator:
    """Has parts searched side by side by threads of the host."""

    def __init__(self) -> None:
        self._crew = Crew()

    def nominated(self, batch: SearchBatch, views: Sequence[View], num: int) -> torch.Tensor:
        """(L, N, num) int64 positions, -1 for none, without repeats in a query: the best of all generations seen."""
        shares = [
            _Share.of(batch, views[sequence], sequence, slice(first, end), num)
            for sequence, first, end in batch.sequences()
            if views[sequence].generations
        ]
        pieces = [piece for share in shares for piece in share.pieces()]
        self._crew.do(_search_all, pieces, torch.get_num_threads(), QUERY_S * max(batch.counts))
        shape = (*batch.queries.shape[:2], num)
        found = torch.full(shape, -1, dtype=torch.int64, device=batch.queries.device)
        for share in shares:
            found[:, share.columns] = share.best()
        return found


@dataclass(frozen=True, slots=True)
class _Piece:
    """A search of one part, and where what it finds goes: scores (n, num) float32, ids (n, num) int64."""

    part: Part
    queries: torch.Tensor
    seen: tuple[int, int]
    scores: torch.Tensor
    ids: torch.Tensor

    def search(self) -> None:
        """Doing it again does the same again."""
        self.part.search(self.queries, self.seen, self.scores, self.ids)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one sequence has G generations nominate for its n queries: scores and ids (L, G, n, num)."""

    batch: SearchBatch
    generations: tuple[Generation, ...]
    columns: slice
    seen: tuple[int, int]
    scores: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, batch: SearchBatch, view: View, sequence: int, columns: slice, num: int) -> _Share:
        """With room for what is found."""
        shape = (len(batch.layers), len(view.generations), columns.stop - columns.start, num)
        scores = torch.empty(shape, device=batch.queries.device)
        seen = (batch.begins[sequence], batch.ends[sequence])
        return cls(batch, view.generations, columns, seen, scores, torch.empty_like(scores, dtype=torch.int64))

    def pieces(self) -> Iterator[_Piece]:
        """One for each generation in each layer."""
        begin, end = self.seen
        for at, layer in enumerate(self.batch.layers):
            queries = self.batch.queries[at, self.columns].float().contiguous()
            for number, generation in enumerate(self.generations):
                seen = max(begin, generation.first) - generation.first, min(end, generation.end) - generation.first
                yield _Piece(generation.parts[layer], queries, seen, self.scores[at, number], self.ids[at, number])

    def best(self) -> torch.Tensor:
        """(L, n, num) positions."""
        firsts = torch.tensor([generation.first for generation in self.generations]).to(self.ids.device)
        positions = torch.where(self.ids < 0, -1, self.ids + firsts[:, None, None]).transpose(1, 2).flatten(2)
        if len(self.generations) == 1:
            return positions
        scores = self.scores.transpose(1, 2).flatten(2).masked_fill(positions < 0, -torch.inf)
        return positions.gather(2, scores.topk(self.scores.shape[3], sorted=False).indices)


def _search_all(pieces: Iterable[_Piece]) -> None:
    for piece in pieces:
        piece.search()
