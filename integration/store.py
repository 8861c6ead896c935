"""MemoryLink: one model's side of one memory at the client. Failures end here: they are counted, never raised."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import torch

from integration.config import DTYPES, HIDDEN, ConfigError, MemoryConfig
from model_client import Retrieval
from model_client.errors import (
    AlreadyExists,
    CircuitOpen,
    Expired,
    Late,
    MemstoreClientError,
    NotFound,
    NotReady,
    Overloaded,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from integration.held import RowBatch
    from integration.trace import MemoryStats
    from model_client import MemoryClient, PendingStep, Session, StepResult
    from model_client.standing import StandingStep

MAX_APPENDS = 2
"""Appends under way at once."""

_PASSING = (Unavailable, Late, Expired, CircuitOpen, NotReady, Overloaded)
_log = logging.getLogger(__name__)


class MemoryLink:
    """Sessions of one memory, and the calls under way.

    The memory is made when the link is, if it is not there yet, and again when the server has lost it. A server that
    is out of reach is no error; a memory of that name but of another shape is (ConfigError).
    """

    def __init__(self, client: MemoryClient, config: MemoryConfig, stats: MemoryStats) -> None:
        self._client = client
        self._config = config
        self._stats = stats
        self._sessions: dict[tuple[str, ...], Session] = {}
        self._appends: deque[tuple[PendingStep, int]] = deque()
        self._warned: set[str] = set()
        self._is_ready = False
        self._prepare()

    def start(
        self,
        names: tuple[str, ...],
        rows: RowBatch,
        *,
        array: str,
        append: bool,
        start_of_sequence: Sequence[bool],
    ) -> PendingStep | None:
        """Begins a step of these sequences; None where that failed. array: "key" or "hidden", what shall come back."""
        self.settle()
        return self._begin(names, rows, self._wanted(array), append, start_of_sequence)

    def stand(self, names: tuple[str, ...], keys: torch.Tensor) -> StandingStep | None:
        """What `start` finds for one token of each sequence, to be asked again and again; None where that cannot be.

        keys: (S, dim), as those to come.
        """
        if not self._is_ready:
            return None
        try:
            return self._session(names).stand(keys, self._wanted("key"), self._config.deadline_s)
        except MemstoreClientError as error:
            self._note(error)
            return None

    def append(self, names: tuple[str, ...], rows: RowBatch, start_of_sequence: Sequence[bool]) -> None:
        """Appends in the background, at most MAX_APPENDS at once."""
        while len(self._appends) >= MAX_APPENDS:
            self._settle_one()
        call = self._begin(names, rows, None, True, start_of_sequence)
        if call is None:
            self._stats.lost_rows += len(rows.keys)
        else:
            self._appends.append((call, len(rows.keys)))

    def settle(self) -> bool:
        """Waits until no append is under way, so that what follows sees all rows; whether all of them succeeded."""
        lost = self._stats.lost_rows
        while self._appends:
            self._settle_one()
        return self._stats.lost_rows == lost

    def finish(self, call: PendingStep, until: float) -> StepResult | None:
        """The answer of a call, waited for until the perf_counter time `until`; None where there is none."""
        begin = time.perf_counter()
        try:
            return call.result(max(0.0, until - begin))
        except MemstoreClientError as error:
            self._note(error)
            return None
        finally:
            self._stats.waited_s += time.perf_counter() - begin

    def release(self, names: tuple[str, ...]) -> None:
        """Gives the places of sequences back."""
        try:
            self._client.reset(self._config.memory, names, release=True)
        except MemstoreClientError as error:
            self._note(error)

    def _begin(
        self,
        names: tuple[str, ...],
        rows: RowBatch,
        wanted: Retrieval | None,
        append: bool,
        start_of_sequence: Sequence[bool],
    ) -> PendingStep | None:
        begin = time.perf_counter()
        payloads = {HIDDEN: rows.hidden[None]} if append and rows.hidden is not None else {}
        try:
            if not self._is_ready and not self._prepare():
                return None
            return self._session(names).start_step(
                rows.keys[None],
                rows.counts,
                retrieve=wanted,
                append=append,
                payloads=payloads,
                start_of_sequence=tuple(start_of_sequence),
                deadline_s=self._config.deadline_s,
            )
        except MemstoreClientError as error:
            self._note(error)
            return None
        finally:
            self._stats.waited_s += time.perf_counter() - begin

    def _wanted(self, array: str) -> Retrieval:
        config = self._config
        return Retrieval(top_k=config.top_k, before=config.before, after=config.after, arrays=(array,), scores=False)

    def _settle_one(self) -> None:
        call, num_rows = self._appends.popleft()
        if self.finish(call, time.perf_counter() + self._config.deadline_s) is None:
            self._stats.lost_rows += num_rows
        else:
            self._stats.appended_rows += num_rows

    def _session(self, names: tuple[str, ...]) -> Session:
        if names not in self._sessions:
            self._sessions[names] = self._client.session(self._config.memory, names)
        return self._sessions[names]

    def _prepare(self) -> bool:
        """Makes the memory where it is missing; False where the server cannot be asked now."""
        config = self._config
        payloads = {HIDDEN: (torch.bfloat16, (config.hidden_size,))} if config.training_payload else {}
        try:
            self._client.create_memory(
                config.memory,
                dim=config.dim,
                capacity=config.capacity,
                max_sequences=config.max_sequences,
                dtype=DTYPES[config.dtype],
                metric=config.metric,
                index=config.index,
                payloads=payloads,
                exist_ok=True,
            )
        except AlreadyExists as error:
            raise ConfigError(f"memory {config.memory!r} exists with another shape: {error}") from error
        except _PASSING as error:
            self._note(error)
            return False
        self._is_ready = True
        return True

    def _note(self, error: MemstoreClientError) -> None:
        self._stats.failures += 1
        self._stats.late += isinstance(error, Late | Expired)
        if isinstance(error, NotFound):
            self._is_ready = False
        if error.reason not in self._warned:
            self._warned.add(error.reason)
            _log.warning("memory %s: going on without it (%s): %s", self._config.memory, error.reason, error)
