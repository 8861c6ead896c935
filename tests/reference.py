"""The oracle: what a memory must do, in lists and float64, as plainly as it can be said. No cleverness."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from memstore.errors import (
    AlreadyExists,
    EpochChanged,
    NotFound,
    PositionExpired,
    QuotaExceeded,
    SequenceGap,
)
from memstore.types import (
    KEY,
    MemoryCounts,
    MemorySpec,
    Metric,
    RetrieveOptions,
    SequenceResult,
    StepBatch,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Row = dict[str, torch.Tensor]
"""One entry of one layer: name of the array -> its elements as they are stored."""


@dataclass
class Reply:
    """The first answer to an append. begun_from: the epoch that it was sent with, if it began this one."""

    identity: tuple[int, int]
    begun_from: int | None
    result: SequenceResult


@dataclass
class ReferenceSequence:
    """Every row ever appended in this epoch (None: never given to a forked sequence), layer by layer for a position."""

    epoch: int
    rows: list[list[Row] | None] = field(default_factory=list)
    writers: OrderedDict[str, list[Reply]] = field(default_factory=OrderedDict)


@dataclass
class ReferenceHit:
    """One hit: its position, its score in float64, and its window (position or -1, rows or None)."""

    position: int
    score: float
    window: list[int]
    rows: list[Row | None]


@dataclass
class ReferenceResult:
    """hits[layer][query]: best first; None where nothing was asked for."""

    sequences: list[SequenceResult]
    hits: list[list[list[ReferenceHit]]] | None


class ReferenceMemory:
    """What memstore.memory.Memory does, for one batch at a time."""

    def __init__(self, spec: MemorySpec, new_epoch: Callable[[], int] | None = None) -> None:
        self.spec = spec
        self.sequences: dict[str, ReferenceSequence] = {}
        self.pinned: set[str] = set()
        self.new_epoch = new_epoch or itertools.count(1).__next__
        self.appended = self.evicted = 0

    def live(self, sequence: ReferenceSequence | None) -> list[int]:
        """Positions that are live, oldest first."""
        if sequence is None:
            return []
        last = range(max(len(sequence.rows) - self.spec.capacity, 0), len(sequence.rows))
        return [position for position in last if sequence.rows[position] is not None]

    def step(self, batch: StepBatch) -> ReferenceResult:
        """Retrieve, then append. Raises what a Memory answers; nothing is changed then."""
        names = [part.sequence for part in batch.parts]
        known = [name for name in names if name in self.sequences]
        self._check_places(known, len(names) - len(known) if batch.append else 0)
        checked = [self._check(batch, at) for at in range(len(batch.parts))]
        missing = [part for part in batch.parts if part.sequence not in self.sequences]
        if batch.append and len(self.sequences) + len(missing) > self.spec.total_sequences:
            raise QuotaExceeded("sequences")
        hits: list[list[list[ReferenceHit]]] | None = None if batch.retrieve is None else [[] for _ in batch.layers]
        results = []
        first = 0
        for at, (part, replay) in enumerate(zip(batch.parts, checked, strict=True)):
            columns = range(first, first + part.num_rows)
            first += part.num_rows
            if part.start_of_sequence and replay is None and part.sequence in self.sequences:
                self._empty(self.sequences[part.sequence])
            sequence = self.sequences.get(part.sequence)
            published = 0 if sequence is None else len(sequence.rows)
            as_of = replay.as_of if replay else published if part.as_of is None else part.as_of
            live = self.live(sequence)
            seen = [position for position in live if position < as_of]
            for layer_hits, layer, keys in zip(hits or [], batch.layers, batch.keys, strict=False):
                assert batch.retrieve is not None
                layer_hits += [self._search(sequence, layer, keys[c], seen, batch.retrieve) for c in columns]
            result = SequenceResult(
                epoch=0 if sequence is None else sequence.epoch,
                as_of=as_of,
                live_begin=min(live[0] if live else published, as_of),
                first_position=replay.first_position if replay else published,
                num_appended=part.num_rows if batch.append else 0,
                is_replay=replay is not None,
            )
            if batch.append and replay is None:
                result = self._append(batch, at, columns, result)
            results.append(result)
        return ReferenceResult(results, hits)

    def reset(self, names: Sequence[str], release: bool) -> list[int]:
        """New epochs, 0 for what does not exist (any more)."""
        epochs = []
        for name in names:
            if name in self.sequences and release:
                self.evicted += len(self.live(self.sequences.pop(name))) * self.spec.num_layers
                self.pinned.discard(name)
            elif name in self.sequences:
                self._empty(self.sequences[name])
            epochs.append(self.sequences[name].epoch if name in self.sequences else 0)
        return epochs

    def pin(self, names: Sequence[str], unpin: bool) -> int:
        """How many are pinned then."""
        for name in names:
            if name not in self.sequences:
                raise NotFound(name)
        if not unpin:
            self._check_places(list(names), 0)
        self.pinned = self.pinned.difference(names) if unpin else self.pinned.union(names)
        return len(self.pinned)

    def _check_places(self, names: list[str], num_new: int) -> None:
        """Raises where those that are to stay, and these, are more than can have a place at once."""
        if not self.spec.spill.max_sequences:
            return
        if len(self.sequences) + num_new > self.spec.total_sequences:
            num_new = 0  # they are refused for that
        if len(self.pinned.union(names)) + num_new > self.spec.max_sequences:
            raise QuotaExceeded("places")

    def fork(self, source: str, target: str, as_of: int | None, epoch: int) -> SequenceResult:
        """Copies the live rows below `as_of`."""
        if source not in self.sequences:
            raise NotFound(source)
        if target in self.sequences:
            raise AlreadyExists(target)
        origin = self.sequences[source]
        if epoch not in (0, origin.epoch):
            raise EpochChanged(source, epoch, origin.epoch)
        if as_of is not None and not 0 <= as_of <= len(origin.rows):
            raise PositionExpired("as_of")
        self._check_places([source], 1)
        if len(self.sequences) >= self.spec.total_sequences:
            raise QuotaExceeded("sequences")
        end = len(origin.rows) if as_of is None else as_of
        live = [position for position in self.live(origin) if position < end]
        rows = [origin.rows[position] if position in live else None for position in range(end)]
        copy = self.sequences[target] = ReferenceSequence(self.new_epoch(), rows)
        self.appended += len(live) * self.spec.num_layers
        return SequenceResult(epoch=copy.epoch, as_of=end, live_begin=live[0] if live else end, first_position=end)

    def counts(self) -> MemoryCounts:
        """The same counters."""
        num_rows = sum(len(self.live(sequence)) for sequence in self.sequences.values()) * self.spec.num_layers
        assert num_rows == self.appended - self.evicted
        return MemoryCounts(
            num_sequences=len(self.sequences),
            num_rows=num_rows,
            reserved_bytes=0,
            appended_rows=self.appended,
            evicted_rows=self.evicted,
            num_pinned=len(self.pinned),
        )

    def _empty(self, sequence: ReferenceSequence) -> None:
        self.evicted += len(self.live(sequence)) * self.spec.num_layers
        sequence.rows, sequence.writers, sequence.epoch = [], OrderedDict(), self.new_epoch()

    def _identity(self, batch: StepBatch, at: int) -> tuple[int, int]:
        return batch.parts[at].num_rows, batch.fingerprints[at] if batch.fingerprints else 0

    def _check(self, batch: StepBatch, at: int) -> SequenceResult | None:
        """The first answer, if the part is a resend; raises what it may not be."""
        part = batch.parts[at]
        sequence = self.sequences.get(part.sequence)
        epoch = sequence.epoch if sequence else 0
        is_numbered = batch.append and batch.writer != ""
        replies = sequence.writers.get(batch.writer, []) if sequence and is_numbered else []
        if 0 <= part.seq < len(replies) and part.seq >= len(replies) - 256 and sequence:
            first = replies[part.seq]
            is_same = first.identity == self._identity(batch, at)
            if part.start_of_sequence:
                is_resend = is_same and first.begun_from == part.epoch
                if is_resend and (part.epoch != 0 or len(replies) == 1):
                    return first.result
            elif part.epoch in (0, epoch):
                if not is_same:
                    raise AlreadyExists("seq")
                return first.result
        if part.epoch not in (0, epoch):
            raise EpochChanged(part.sequence, part.epoch, epoch)
        expected = 0 if part.start_of_sequence else len(replies)
        if is_numbered and part.seq > expected:
            raise SequenceGap(part.sequence, part.seq, expected)
        if is_numbered and part.seq < expected:
            raise PositionExpired("seq")
        published = 0 if part.start_of_sequence or sequence is None else len(sequence.rows)
        if part.as_of is not None and not 0 <= part.as_of <= published:
            raise PositionExpired("as_of")
        return None

    def _append(self, batch: StepBatch, at: int, columns: range, result: SequenceResult) -> SequenceResult:
        part = batch.parts[at]
        if part.sequence not in self.sequences:
            self.sequences[part.sequence] = ReferenceSequence(self.new_epoch())
        sequence = self.sequences[part.sequence]
        num_live = len(self.live(sequence))
        for column in columns:
            sequence.rows.append([self._stored(batch, layer, column) for layer in range(self.spec.num_layers)])
        self.appended += part.num_rows * self.spec.num_layers
        self.evicted += (num_live + part.num_rows - len(self.live(sequence))) * self.spec.num_layers
        if batch.writer:
            begun_from = part.epoch if part.start_of_sequence else None
            replies = sequence.writers.setdefault(batch.writer, [])
            replies.append(Reply(self._identity(batch, at), begun_from, result))
            sequence.writers.move_to_end(batch.writer)
            if len(sequence.writers) > 64:
                sequence.writers.popitem(last=False)
        return result._replace(epoch=sequence.epoch)

    def _stored(self, batch: StepBatch, layer: int, column: int) -> Row:
        limit = torch.finfo(self.spec.dtype).max
        key = batch.keys[layer, column].double().clamp(-limit, limit).to(self.spec.dtype)
        return {KEY: key, **{name: rows[layer, column].clone() for name, rows in batch.payloads.items()}}

    def _search(
        self,
        sequence: ReferenceSequence | None,
        layer: int,
        query: torch.Tensor,
        seen: list[int],
        options: RetrieveOptions,
    ) -> list[ReferenceHit]:
        if sequence is None:
            return []

        def row(position: int) -> Row | None:
            layers = sequence.rows[position] if position in seen else None
            return None if layers is None else layers[layer]

        scored = [(self.score(query, row(position)), position) for position in seen]
        scored.sort(key=lambda pair: (-pair[0], pair[1]))
        hits = []
        for score, position in scored[: options.top_k]:
            window = range(position - options.window_before, position + options.window_after + 1)
            rows = [row(neighbour) for neighbour in window]
            kept = [neighbour if neighbour in seen else -1 for neighbour in window]
            hits.append(ReferenceHit(position, score, kept, rows))
        return hits

    def score(self, query: torch.Tensor, row: Row | None) -> float:
        """The score of one row, in float64."""
        assert row is not None
        q, x = query.double().numpy(), row[KEY].double().numpy()
        if self.spec.metric is Metric.L2:
            return -float(((q - x) ** 2).sum())
        product = float(q @ x)
        if self.spec.metric is Metric.COSINE:
            lengths = float(np.linalg.norm(q) * np.linalg.norm(x))
            return product / lengths if lengths else 0.0
        return product
