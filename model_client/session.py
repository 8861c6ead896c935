"""Session: the steps of one model over its sequences, and the handle of a step under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

from memstore.v1 import memstore_pb2 as pb
from model_client.core import Core, Running, drive
from model_client.errors import InvalidRequest
from model_client.standing import StandingStep
from model_client.steps import SessionCore, StepCall
from model_client.transport.base import StandingTransport
from model_client.wire import Retrieval, StepResult, StepRows, step_request, wire_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class StepOptions(TypedDict, total=False):
    """What a step may be given besides its keys."""

    payloads: Mapping[str, Tensor]
    """name -> (L, N, ...): all of the memory's where rows are appended, (N, ...) where the keys are (N, dim)."""
    start_of_sequence: Sequence[bool] | bool
    """For each sequence that takes part, or for all: it is emptied first."""
    deadline_s: float | None
    """How long the answer is of use, in seconds; the client's timeout if not given."""
    parts: Sequence[int] | None
    """Numbers of the sequences that take part, all if not given; the counts and starts are then theirs."""


class PendingStep:
    """A step that has begun. Hold it until its result was asked for: one that is let go of is not pushed on."""

    def __init__(self, core: Core, running: Running[StepResult]) -> None:
        self._core = core
        self._running = running

    def done(self) -> bool:
        """True where `result` would not wait."""
        return self._running.poll()

    def result(self, timeout_s: float | None = None) -> StepResult:
        """What the step found and did, waiting for it until the step's deadline, and `timeout_s` at most.

        Raises a MemstoreClientError; the same one if asked again. Late where there was no answer by then.
        """
        clock = self._core.clock
        begun = clock.monotonic()
        try:
            return drive(self._running, clock, float("inf") if timeout_s is None else begun + timeout_s)
        finally:
            self._core.stats.add("waited_s", clock.monotonic() - begun)


class SessionBase:
    """What Session and AsyncSession have in common: everything up to the waiting."""

    def __init__(
        self, core: Core, memory: str, sequences: Sequence[str], timeout_s: float, row_cache_bytes: int = 0
    ) -> None:
        if not sequences or len(set(sequences)) != len(sequences):
            raise InvalidRequest("sequences: give at least one, each once")
        self._core = core
        self._timeout_s = timeout_s
        self._flows = SessionCore(core, memory, sequences, row_cache_bytes)
        self._asked: tuple[Sequence[int], Sequence[int], Sequence[bool]] = (), (), ()
        self._parts = b""

    @property
    def memory(self) -> str:
        """Name of the memory."""
        return self._flows.memory

    @property
    def plane(self) -> str:
        """How tensors travel now: "inline" in messages, "process", or "shm" or "cuda" while a server lends them."""
        return self._core.transport.plane.name

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names of the sequences, in the order of every batch."""
        return self._flows.sequences

    def _begin(
        self,
        keys: Tensor,
        counts: Sequence[int],
        retrieve: Retrieval | None,
        append: bool,
        options: StepOptions,
    ) -> Running[StepResult]:
        parts = options.get("parts")
        indices = range(len(self.sequences)) if parts is None else parts
        start = options.get("start_of_sequence", False)
        starts = [start] * len(indices) if isinstance(start, bool) else start
        if not len(indices) == len(counts) == len(starts):
            given = f"{len(counts)} counts and {len(starts)} starts"
            raise InvalidRequest(f"counts: {given} given for {len(indices)} sequences")
        call = StepCall(
            rows=_checked_rows(keys, options.get("payloads", {}), sum(counts)),
            parts=self._parts_of(indices, counts, starts),
            num_rows=sum(counts),
            has_start=any(starts),
            retrieve=retrieve,
            append=append,
        )
        deadline_s = options.get("deadline_s")
        return Running(self._flows.step(call, self._timeout_s if deadline_s is None else deadline_s))

    def _parts_of(self, indices: Sequence[int], counts: Sequence[int], starts: Sequence[bool]) -> bytes:
        """The parts of a step, not numbered yet, as a StepRequest in wire form. Most steps have those of the last."""
        asked = tuple(indices), tuple(counts), tuple(starts)
        if asked != self._asked:
            parts = [
                pb.SequencePart(sequence=self.sequences[index], num_rows=count, start_of_sequence=is_start)
                for index, count, is_start in zip(*asked, strict=True)
            ]
            self._asked, self._parts = asked, pb.StepRequest(sequences=parts).SerializeToString()
        return self._parts


class Session(SessionBase):
    """The steps of one model over a fixed batch of sequences of one memory. Used by one thread at a time.

    A session is one writer: it numbers its appends to each sequence, and each is applied exactly once and in order.

    * A step that appends or starts a sequence is *under way* until its outcome is known. Its seqs and rows are kept,
      also where `result` has raised Late or Unavailable.
    * Before anything later that changes sequences is sent, what failed or is overdue is asked for again, with the same
      seqs and the same rows, within the later step's deadline, and without a retrieval that nobody waits for. If that
      gives no answer either, the later step fails and appends nothing: its rows are lost (`stats.dropped_rows`), and
      order is kept. So are those of a step that the open breaker stopped, or the server refused.
    * Where the answer to a step was lost, and what it retrieves is refused when it is asked for again (QuotaExceeded,
      DeviceMemoryFull), it is done without that, and `result` raises Unavailable.
    * At most two steps are under way, and a third waits for them without being sent. A fourth is refused (Busy).
      A second one leaves at once only where the first was sent without failure, no start is among them, and the epochs
      are known; otherwise it is sent when its result is asked for.
    * EpochChanged (the server lost the sequence, or somebody reset it): the step is sent again as seq 0 of the new
      epoch (`stats.lost_epochs`). SequenceGap: what is missing is sent first.
    * A start names the epoch that it ends, so that a copy that arrives late cannot empty anything. Where a session
      does not know it yet, it asks first: one more round trip. A start of all sequences of a failed append supersedes
      it: what would be wiped is not sent again.

    A retrieval waits for no append, only for starts: it never reads the document before.

    Inline, rows that a large retrieval has brought are kept (row_cache.py, the client's `row_cache_bytes`), so that
    they do not travel again while their sequence has the same epoch. Results are the same, and the caller's own.
    """

    def start_step(
        self,
        keys: Tensor,
        counts: Sequence[int],
        *,
        retrieve: Retrieval | None,
        append: bool,
        **options: Unpack[StepOptions],
    ) -> PendingStep:
        """Begins a step: retrieves for `keys`, then appends them, as far as asked for. Never waits for the network.

        keys: (L, N, dim), or (N, dim) for one layer; float32, float16 or bfloat16, any device; the rows of all
        sequences, one behind the other. In process they are handed over without a copy: leave them as they are until
        the step is done. counts: rows of each sequence, in the session's order, 0 or more, N in all.

        Raises InvalidRequest where shapes and counts disagree. Every other failure, an open circuit too, is raised by
        the result.
        """
        return PendingStep(self._core, self._begin(keys, counts, retrieve, append, options))

    def step(
        self,
        keys: Tensor,
        counts: Sequence[int],
        *,
        retrieve: Retrieval | None,
        append: bool,
        **options: Unpack[StepOptions],
    ) -> StepResult:
        """`start_step` and its result."""
        return self.start_step(keys, counts, retrieve=retrieve, append=append, **options).result()

    def retrieve(
        self, keys: Tensor, counts: Sequence[int], retrieve: Retrieval, **options: Unpack[StepOptions]
    ) -> StepResult:
        """What is remembered nearest to `keys`; nothing is appended."""
        return self.step(keys, counts, retrieve=retrieve, append=False, **options)

    def append(self, keys: Tensor, counts: Sequence[int], **options: Unpack[StepOptions]) -> StepResult:
        """Appends `keys`; nothing is retrieved."""
        return self.step(keys, counts, retrieve=None, append=True, **options)

    def stand(self, keys: Tensor, retrieve: Retrieval, deadline_s: float | None = None) -> StandingStep | None:
        """What `retrieve` finds for one query of each sequence, for a loop that asks again and again.

        None where the engine is not in this process, now or ever. keys: (S, dim), as an example of those to come, on
        the memory's device. Waits for the engine. Raises MemstoreClientError.
        """
        transport = self._core.transport
        if not isinstance(transport, StandingTransport) or self._core.breaker.is_open:
            return None
        rows = _checked_rows(keys, {}, len(self.sequences))
        request = step_request(transport.plane, self.memory, rows, retrieve, False, "")
        request.sequences.extend(pb.SequencePart(sequence=name, num_rows=1) for name in self.sequences)
        standing = transport.stand(request, self._timeout_s if deadline_s is None else deadline_s)
        if standing is None:
            transport.plane.discard(request)
            return None
        return StandingStep(self._core, transport, standing)

    def reset(self) -> None:
        """Empties every sequence of the session."""
        drive(Running(self._flows.reset(self._timeout_s)), self._core.clock)

    def fork(self, source: str, target: str) -> pb.ForkResponse:
        """Gives the new sequence `target` all that `source` holds, the steps under way included."""
        return drive(Running(self._flows.fork(source, target, self._timeout_s)), self._core.clock)


def _checked_rows(keys: Tensor, payloads: Mapping[str, Tensor], num_rows: int) -> StepRows:
    """The tensors with their layer axis; InvalidRequest where the numbers of rows disagree."""
    layered = keys.unsqueeze(0) if keys.dim() == 2 else keys
    for tensor in (keys, *payloads.values()):
        wire_dtype(tensor.dtype)
    if layered.dim() != 3 or layered.shape[1] != num_rows:
        raise InvalidRequest(f"keys: shape {tuple(keys.shape)}, (layers, {num_rows}, dim) expected by the counts")
    with_layer = {name: each.unsqueeze(0) if keys.dim() == 2 else each for name, each in payloads.items()}
    for name, each in with_layer.items():
        if each.shape[:2] != layered.shape[:2]:
            raise InvalidRequest(f"payloads[{name!r}]: shape {tuple(each.shape)} does not begin as that of the keys")
    return StepRows(keys=layered, payloads=with_layer)
