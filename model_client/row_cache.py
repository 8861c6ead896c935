"""RowCache: rows of former answers of one session, which need not travel again.

A row of a position is the same for as long as the epoch of its sequence lasts. So a step says which rows the session
has, with the epoch that they are of, and the server leaves those out of its answer, whose list of positions names them
all the same. Nobody has to agree on anything before or afterwards: a lost answer, a reset or another server make known
rows fewer, never wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from memstore.v1 import memstore_pb2 as pb
from model_client.errors import Internal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from model_client.wire import Hits, Retrieval, StepResult

LEAST_NEIGHBOURS = 1024
"""Neighbours that a group must ask for: where there are fewer, to tell what is known costs more than it spares."""
MAX_GROUPS = 4096
_SPARSE = 16
"""Positions for each one that is held, from the first to the last, beyond which they are not told: too many bits."""
_FIRST_ROWS = 1024
_BESIDE_BYTES = 16
"""Of the position and the place of a row."""

Group = tuple[int, str]
"""A layer and the name of a sequence."""


class _Held(NamedTuple):
    """Rows of one group. positions: ascending; places: where each lies. Never written to."""

    epoch: int
    positions: NDArray[np.int64]
    places: NDArray[np.int64]

    def find(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each position, -1 where it is not held."""
        if not len(self.positions):
            return np.full(len(positions), -1)
        at = np.minimum(np.searchsorted(self.positions, positions), len(self.positions) - 1)
        return np.where(self.positions[at] == positions, self.places[at], -1)

    def message(self) -> pb.KnownRows:
        """Says which these are."""
        known = pb.KnownRows(epoch=self.epoch)
        begin, end = (int(self.positions[0]), int(self.positions[-1]) + 1) if len(self.positions) else (0, 0)
        if end - begin <= _SPARSE * len(self.positions):
            is_held = np.zeros(end - begin, np.uint8)
            is_held[self.positions - begin] = 1
            known.begin, known.bits = begin, np.packbits(is_held, bitorder="little").tobytes()
        return known


_NOTHING = _Held(0, np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a session had when it asked. The rows stay as they are for as long as somebody has this.

    groups: of all layers and `num_parts` sequences.
    """

    num_parts: int
    groups: Sequence[Group]
    held: Mapping[Group, _Held]
    rows: Mapping[str, torch.Tensor]

    def write(self, into: pb.RetrieveOptions) -> None:
        """Says so to the server."""
        if any(len(held.positions) for held in self.held.values()):
            into.known.extend(self.held.get(group, _NOTHING).message() for group in self.groups)


@dataclass(frozen=True, slots=True)
class _Found:
    """An answer on the host, and which group each row is of. sent, known: numbers of the rows that came, or did not."""

    asked: Asked
    epochs: Sequence[int]
    positions: NDArray[np.int64]
    row_splits: Sequence[int]
    sent: NDArray[np.int64]
    known: NDArray[np.int64]

    def groups(self) -> Iterator[tuple[Group, int, slice]]:
        """Each group with rows, the epoch of its sequence, and where its rows are."""
        for at, group in enumerate(self.asked.groups):
            begin, end = self.row_splits[at : at + 2]
            if begin < end:
                yield group, self.epochs[at % len(self.epochs)], slice(begin, end)

    def places(self, held: Mapping[Group, _Held]) -> NDArray[np.int64]:
        """Where each row lies, -1 where it is not held."""
        places = np.full(len(self.positions), -1)
        for group, epoch, of_group in self.groups():
            mine = held.get(group, _NOTHING)
            if mine.epoch == epoch:
                places[of_group] = mine.find(self.positions[of_group])
        return places


class RowCache:
    """See above. On the host, at most `max_bytes`, and for a while twice that. Used by one thread at a time.

    What is full is given up but for the rows of the last answer. An answer that would fill more than half is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of rows; 0 for none."""
        self._max_bytes = max_bytes
        self._arrays: tuple[str, ...] = ()
        self._held: dict[Group, _Held] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self._num_rows = 0

    def ask(
        self, retrieve: Retrieval, num_layers: int, parts: Sequence[pb.SequencePart], num_queries: int
    ) -> Asked | None:
        """What is there for a retrieval; None where that is not worth telling. num_queries: of all parts."""
        num_neighbours = num_queries * retrieve.top_k * (retrieve.before + 1 + retrieve.after)
        if not self._max_bytes or not retrieve.arrays or num_neighbours < LEAST_NEIGHBOURS * len(parts):
            return None
        if num_layers * len(parts) > MAX_GROUPS:
            return None
        if retrieve.arrays != self._arrays:
            self._forget()
            self._arrays = retrieve.arrays
        names = [part.sequence for part in parts]
        groups = [(layer, name) for layer in range(num_layers) for name in names]
        held = {group: self._held[group] for group in groups if group in self._held}
        return Asked(len(parts), groups, held, dict(self._rows))

    @torch.no_grad()
    @torch.inference_mode(mode=False)  # what is written to later must not be of that mode
    def complete(self, asked: Asked, result: StepResult, left_out: torch.Tensor | None) -> tuple[StepResult, int]:
        """The result with the rows that were left out of it put back, and how many these are.

        result: on the host. left_out: (U,) uint8, 1 for each of them. Raises Internal where they were not known.
        """
        hits = result.hits
        if hits is None:
            return result, 0
        found = _found(asked, result, hits, left_out)
        places = found.places(asked.held)[found.known]
        is_alike = all(_is_alike(asked.rows.get(name), rows) for name, rows in hits.rows.items())
        if (places < 0).any() or not (is_alike or not len(places)):
            raise Internal("the reply leaves out rows that this session does not have")
        rows = self._whole(found, hits.rows, places)
        self._prune(asked.groups, result)
        return replace(result, hits=replace(hits, rows=rows)), len(found.known)

    def _whole(
        self, found: _Found, came: Mapping[str, torch.Tensor], places: NDArray[np.int64]
    ) -> Mapping[str, torch.Tensor]:
        """All rows of an answer, which are held afterwards. places: of those that did not come, where they were."""
        is_kept = tuple(came) == self._arrays and len(found.positions) <= self._room(came) // 2
        if is_kept and self._keep(found, found.sent, came):
            if not len(found.known):
                return came
            where = found.places(self._held)
            if where.min() >= 0:  # what has been given up meanwhile, or has left its ring, is not there
                return {name: self._rows[name].index_select(0, torch.from_numpy(where)) for name in came}
        whole = came
        if len(found.known):
            whole = {name: _merged(found, rows, found.asked.rows[name], places) for name, rows in came.items()}
        if is_kept:
            self._forget()
            self._keep(found, np.arange(len(found.positions)), whole)
        return whole

    def _keep(self, found: _Found, numbers: NDArray[np.int64], rows: Mapping[str, torch.Tensor]) -> bool:
        """Takes in rows of an answer, of these numbers, that are not held. False, and nothing is done, without room."""
        most = self._room(rows)
        is_new = (found.places(self._held) < 0)[numbers]
        new = numbers[is_new]
        is_other = any(name in self._rows and not _is_alike(self._rows[name], each) for name, each in rows.items())
        if self._num_rows + len(new) > most or is_other:
            return False
        self._append(rows, None if is_new.all() else torch.from_numpy(np.flatnonzero(is_new)), len(new), most)
        first = self._num_rows - len(new)
        for group, epoch, of_group in found.groups():
            begin, end = np.searchsorted(new, (of_group.start, of_group.stop)).tolist()
            self._add(group, _Held(epoch, found.positions[new[begin:end]], np.arange(first + begin, first + end)))
        return True

    def _room(self, rows: Mapping[str, torch.Tensor]) -> int:
        """How many rows of this kind may be held."""
        return self._max_bytes // (_BESIDE_BYTES + sum(_row_bytes(each) for each in rows.values()))

    def _append(self, rows: Mapping[str, torch.Tensor], which: torch.Tensor | None, number: int, most: int) -> None:
        """Copies rows behind those that are there, where nothing that was asked before can see them.

        which: `number` of them, None for all.
        """
        end = self._num_rows + number
        for name, source in rows.items():
            target = self._rows.get(name)
            if target is None or len(target) < end:
                grown = source.new_empty((min(most, max(_FIRST_ROWS, 2 * end)), *source.shape[1:]))
                if target is not None:
                    grown[: self._num_rows] = target[: self._num_rows]
                self._rows[name] = target = grown
            target[self._num_rows : end] = source if which is None else source.index_select(0, which)
        self._num_rows = end

    def _add(self, group: Group, new: _Held) -> None:
        held = self._held.get(group, _NOTHING)
        if held.epoch == new.epoch:
            positions, places = np.concatenate((held.positions, new.positions)), np.append(held.places, new.places)
            order = np.argsort(positions, kind="stable")
            new = _Held(new.epoch, positions[order], places[order])
        self._held[group] = new

    def _prune(self, groups: Sequence[Group], result: StepResult) -> None:
        """Forgets positions that have left their ring, or ended; their rows stay until all are given up."""
        for at, group in enumerate(groups):
            sequence, held = result.sequences[at % len(result.sequences)], self._held.get(group, _NOTHING)
            if held.epoch != sequence.epoch:
                self._held.pop(group, None)
            elif len(held.positions) and held.positions[0] < sequence.live_begin:
                first = int(np.searchsorted(held.positions, sequence.live_begin))
                self._held[group] = _Held(held.epoch, held.positions[first:], held.places[first:])

    def _forget(self) -> None:
        self._held, self._rows, self._num_rows = {}, {}, 0


def _found(asked: Asked, result: StepResult, hits: Hits, left_out: torch.Tensor | None) -> _Found:
    """An answer, checked as far as it says how many rows there are. Raises Internal."""
    positions: NDArray[np.int64] = hits.positions.numpy()
    splits, epochs = hits.row_splits.tolist(), [sequence.epoch for sequence in result.sequences]
    is_grouped = len(splits) == len(asked.groups) + 1 and len(epochs) == asked.num_parts
    if not is_grouped or splits[0] != 0 or splits[-1] != len(positions) or any(a > b for a, b in pairwise(splits)):
        raise Internal("the reply has rows of other groups than were asked for")
    is_left_out = np.zeros(len(positions), bool) if left_out is None else left_out.numpy() != 0
    sent, known = np.flatnonzero(~is_left_out), np.flatnonzero(is_left_out)
    if len(is_left_out) != len(positions) or any(len(rows) != len(sent) for rows in hits.rows.values()):
        raise Internal("the reply has more or fewer rows than positions")
    return _Found(asked, epochs, positions, splits, sent, known)


def _merged(found: _Found, came: torch.Tensor, had: torch.Tensor, places: NDArray[np.int64]) -> torch.Tensor:
    """All rows of an array: those that came, and those that were at these places."""
    rows = came.new_empty((len(found.positions), *came.shape[1:]))
    rows.index_copy_(0, torch.from_numpy(found.sent), came)
    return rows.index_copy_(0, torch.from_numpy(found.known), had.index_select(0, torch.from_numpy(places)))


def _is_alike(rows: torch.Tensor | None, others: torch.Tensor) -> bool:
    return rows is not None and rows.dtype == others.dtype and rows.shape[1:] == others.shape[1:]


def _row_bytes(rows: torch.Tensor) -> int:
    return rows.element_size() * rows.shape[1:].numel()
