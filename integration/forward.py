"""Forward: what one pass of the model asked of its memory, and what came back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from integration.config import HIDDEN
from model_client.cache_attention import Carry, RetrievedRows, join_context

if TYPE_CHECKING:
    from collections.abc import Mapping

    from integration.layout import TokenLayout
    from model_client import Hits, PendingStep
    from model_client.cache_attention import StateProjection


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Rows for the tokens of one forward.

    rows: (U, d) keys, or (U, hidden_size) hidden states that are still to be projected (`is_hidden`), with their
    positions (U,). entries: (N, E) into them. carry: for the next forward of the same sequences.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    entries: torch.Tensor
    is_hidden: bool
    carry: Carry | None

    @classmethod
    def of(cls, hits: Hits, array: str, counts: tuple[int, ...], context: int, carry: Carry | None) -> Answer:
        """Widens hits by the context of each token."""
        joined = join_context(hits.rows[array], hits.positions, hits.index[0], counts, context=context, carry=carry)
        return cls(
            rows=joined.rows,
            positions=joined.positions,
            entries=joined.entries,
            is_hidden=array == HIDDEN,
            carry=joined.carry,
        )


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Forward:
    """One pass through the model.

    layout: its tokens. is_cached: the model keeps keys and values of these tokens; is_fresh: it had none of others.
    is_training: gradients are wanted
    by way of the projection. recomputes: layers run again in the backward pass, so nothing may be kept between them.
    is_appending: its call also appends its rows.
    hidden: (N, hidden_size) states at the retrieval layer, without gradient. keys: (N, dim), their projection.
    marks: objects among the arguments of its attentions that no other forward has.
    found, carry: what came back and what was there before, kept where the next pass may want fewer tokens of this one.
    """

    layout: TokenLayout
    is_cached: bool
    is_fresh: bool
    is_training: bool
    recomputes: bool
    hidden: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    is_appending: bool = False
    call: PendingStep | None = None
    until: float = 0.0
    is_answered: bool = False
    answer: Answer | None = None
    marks: tuple[object, ...] = ()
    found: Hits | None = None
    carry: Carry | None = None
    _retrieved: RetrievedRows | None = None

    @property
    def is_started(self) -> bool:
        """Whether the retrieval layer was reached."""
        return self.hidden is not None

    def mark(self, given: Mapping[str, Any]) -> None:
        """Remembers what an attention was given, but for its states."""
        self.marks = tuple(
            value
            for name, value in given.items()
            if name != "hidden_states" and isinstance(value, torch.Tensor | tuple)
        )

    def is_of(self, given: Mapping[str, Any]) -> bool:
        """True where an attention that is given this may be running again for this forward."""
        return all(any(mark is value for value in given.values()) for mark in self.marks)

    def carry_without(self, unwanted: tuple[int, ...], context: int) -> Carry | None:
        """The carry behind this pass had the last `unwanted` tokens of each sequence not been; None for none."""
        if self.found is None or sum(unwanted) == sum(self.layout.counts):
            return self.carry
        counts = self.layout.counts
        kept = tuple(count - drop for count, drop in zip(counts, unwanted, strict=True))
        spans = [
            range(end - count, end - drop)
            for end, count, drop in zip(accumulate(counts), counts, unwanted, strict=True)
        ]
        tokens = torch.tensor([token for span in spans for token in span], device=self.found.index.device)
        index = self.found.index[0].index_select(0, tokens.long())
        rows = next(iter(self.found.rows.values()))
        return join_context(rows, self.found.positions, index, kept, context=context, carry=self.carry).carry

    def retrieved(self, projection: StateProjection) -> RetrievedRows | None:
        """What the cache attentions read; the same object for all of them unless layers are computed again."""
        if self.answer is None or self.hidden is None:
            return None
        if self._retrieved is not None:
            return self._retrieved
        rows = projection(self.answer.rows) if self.answer.is_hidden else self.answer.rows
        queries = projection(self.hidden) if self.is_training else self.keys
        retrieved = RetrievedRows(rows, self.answer.entries, queries)
        if not self.recomputes:
            self._retrieved = retrieved
        return retrieved
