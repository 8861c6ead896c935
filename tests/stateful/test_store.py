"""A memory behind a real gRPC server against the oracle: several clients, resends, gaps, forks, prefixes, wraps."""

from __future__ import annotations

import dataclasses
import itertools
import time
import zlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memstore.errors import MemstoreError
from memstore.types import (
    KEY,
    Hits,
    IndexKind,
    MemorySpec,
    Metric,
    PayloadSpec,
    RetrieveOptions,
    SequencePart,
    SequenceResult,
    StepBatch,
    StepResult,
)
from model_client import MemoryClient, Retrieval, errors, wire
from model_client.transport import mapped
from tests.comparing import assert_same
from tests.reference import ReferenceMemory, ReferenceResult
from tests.serving import Setting, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.v1 import memstore_pb2 as pb
    from tests.serving import Serving

NAMES = ["a", "b", "c", "d"]
MAX_SEQUENCES = 3
PAYLOAD = PayloadSpec(name="hidden", dtype=torch.int32, shape=(2,))
CPU = torch.device("cpu")

SPECS = st.builds(
    MemorySpec,
    name=st.just("m"),
    dim=st.integers(1, 4),
    capacity=st.integers(1, 9),
    max_sequences=st.just(MAX_SEQUENCES),
    num_layers=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    metric=st.sampled_from(Metric),
    index=st.sampled_from(IndexKind),
    payloads=st.sampled_from([(), (PAYLOAD,)]),
)
RETRIEVALS = st.builds(
    Retrieval,
    top_k=st.integers(1, 6),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    arrays=st.sampled_from([(), (KEY,)]),
    scores=st.booleans(),
)
SOME = st.sampled_from("aaabbcd")
COUNTS = st.dictionaries(SOME, st.integers(0, 11), min_size=1, max_size=3)
STARTS = st.sampled_from(["", "", "", "", "a", "bc"])
AS_OF = st.sampled_from([None, None, 0.5, 1.0, 1.5])
SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module", params=[False, True], ids=["inline", "lent"])
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """One that lends the sequences of the sessions now and then, or one that never does."""
    with pytest.MonkeyPatch.context() as patch, serving(Setting(lends=request.param)) as running:
        patch.setattr(mapped, "FIRST_RETRY_S", 0.1)
        patch.setattr(mapped, "LAST_RETRY_S", 0.1)
        yield running


class Store(RuleBasedStateMachine):
    """Two clients with a session each, a third writer that numbers its appends by hand, and the oracle."""

    server: Serving
    num_mapped_steps = 0

    @initialize(spec=SPECS, seed=SEEDS)
    def begin(self, spec: MemorySpec, seed: int) -> None:
        """A new memory, and nobody has written."""
        self.random = torch.Generator().manual_seed(seed)
        if self.server.lending is not None:
            spec = dataclasses.replace(spec, max_sequences=len(NAMES))
        self.spec = spec
        self.clients = [MemoryClient(self.server.target, use_stream=is_stream) for is_stream in (True, False)]
        self.client = self.clients[0]
        self.client.create_memory(
            "m",
            dim=spec.dim,
            capacity=spec.capacity,
            max_sequences=spec.max_sequences,
            num_layers=spec.num_layers,
            dtype=spec.dtype,
            metric=spec.metric.value,
            index=spec.index.value,
            durability=spec.durability.value,
            payloads={each.name: (each.dtype, each.shape) for each in spec.payloads},
            max_spilled_sequences=spec.spill.max_sequences,
            host_spilled_sequences=spec.spill.host_sequences,
            idle_ttl_s=spec.idle_ttl_s,
        )
        self.sessions = [client.session("m", NAMES) for client in self.clients]
        self.reference = ReferenceMemory(spec, new_epoch=itertools.count(-1, -1).__next__)
        self.epochs: set[int] = set()
        self.sent: list[tuple[StepBatch, pb.StepRequest]] = []

    def teardown(self) -> None:
        """The memory is dropped."""
        if hasattr(self, "client"):
            self.client.drop_memory("m")
            for client in self.clients:
                client.close()
                type(self).num_mapped_steps += client.stats.mapped_steps

    @invariant()
    def counters_agree(self) -> None:
        """What Describe says is what the oracle counts."""
        if not hasattr(self, "reference"):
            return
        status, want = self.client.describe_memory("m").status, self.reference.counts()
        assert (status.num_sequences, status.num_rows) == (want.num_sequences, want.num_rows)
        assert (status.appended_rows, status.evicted_rows) == (want.appended_rows, want.evicted_rows)
        assert status.num_pinned == want.num_pinned

    @rule(counts=COUNTS, retrieval=RETRIEVALS, who=st.integers(0, 1), starts=STARTS)
    def step_of_a_session(self, counts: dict[str, int], retrieval: Retrieval, who: int, starts: str) -> None:
        """A ragged step of some of a session's sequences, some of them started anew."""
        self.step(counts, retrieval, True, who, starts)

    @rule(counts=COUNTS, retrieval=st.none() | RETRIEVALS, who=st.integers(0, 1), starts=STARTS)
    def half_a_step_of_a_session(
        self, counts: dict[str, int], retrieval: Retrieval | None, who: int, starts: str
    ) -> None:
        """Only the retrieval, or only the append."""
        self.step(counts, retrieval, retrieval is None, who, starts)

    @rule(
        name=SOME,
        count=st.integers(0, 5),
        writer=st.sampled_from(["", "w1", "w1", "w2"]),
        skip=st.sampled_from([0, 0, 0, 1, -1]),
        epoch=st.sampled_from(["any", "known", "known", "known", "wrong"]),
        as_of=AS_OF,
        retrieval=st.none() | RETRIEVALS,
        start=st.sampled_from([False] * 4 + [True]),
    )
    def step_by_hand(
        self,
        name: str,
        count: int,
        writer: str,
        skip: int,
        epoch: str,
        as_of: float | None,
        retrieval: Retrieval | None,
        start: bool,
    ) -> None:
        """A numbered append whose number, epoch or prefix may be wrong."""
        sequence = self.reference.sequences.get(name)
        known = sequence.epoch if sequence else 0
        seq = 0 if start or sequence is None else len(sequence.writers.get(writer, [])) + skip
        part = SequencePart(
            sequence=name,
            num_rows=count,
            start_of_sequence=start,
            epoch={"any": 0, "known": known, "wrong": known + 1}[epoch],
            seq=max(seq, 0),
            as_of=self.prefix(name, as_of),
        )
        batch = self.batch((part,), retrieval, True, writer)
        self.sent.append((batch, self.request(batch, retrieval)))
        self.compare(batch, lambda: self.call(self.sent[-1][1]))

    @precondition(lambda self: bool(self.sent))
    @rule(back=st.integers(1, 4), which=st.integers(0, 1))
    def resend(self, back: int, which: int) -> None:
        """An earlier request arrives once more, on either connection: in order or not."""
        batch, request = self.sent[-min(back, len(self.sent))]
        self.compare(batch, lambda: self.call(request, which))

    @rule(name=SOME, retrieval=RETRIEVALS, as_of=AS_OF, count=st.integers(1, 3), is_last=st.booleans())
    def look_at_a_prefix(self, name: str, retrieval: Retrieval, as_of: float | None, count: int, is_last: bool) -> None:
        """A retrieval that sees positions below `as_of` only, of all layers or of the last one."""
        layers = tuple(range(self.spec.num_layers))[-1 if is_last else 0 :]
        part = SequencePart(sequence=name, num_rows=count, as_of=self.prefix(name, as_of))
        batch = self.batch((part,), retrieval, False, layers=layers)
        self.compare(batch, lambda: self.call(self.request(batch, retrieval)))

    @rule(names=st.sampled_from(["a", "b", "cd"]), release=st.booleans())
    def reset(self, names: str, release: bool) -> None:
        """Sequences are emptied, or cease to exist."""
        got = self.client.reset("m", list(names), release)
        want = self.reference.reset(list(names), release)
        for name, new, placeholder in zip(names, got, want, strict=True):
            self.learn(name, new, placeholder)

    @rule(source=SOME, into=st.sampled_from("dcb"), share=AS_OF)
    def fork(self, source: str, into: str, share: float | None) -> None:
        """A sequence gets the prefix of another one."""
        assume(source != into)
        as_of = self.prefix(source, share)
        known = self.reference.sequences.get(source)
        epoch = known.epoch if known is not None and as_of is None else 0
        got: pb.ForkResponse | None = None
        try:
            got = self.client.fork("m", source, into, as_of=as_of, epoch=epoch)
        except errors.MemstoreClientError as error:
            with pytest.raises(MemstoreError) as raised:
                self.reference.fork(source, into, as_of, epoch)
            assert type(raised.value).__name__ == type(error).__name__
        if got is not None:
            want = self.reference.fork(source, into, as_of, epoch)
            assert (got.next_position, got.live_begin) == (want.first_position, want.live_begin)
            self.learn(into, got.epoch, want.epoch)

    def step(self, counts: dict[str, int], retrieval: Retrieval | None, append: bool, who: int, starts: str) -> None:
        """A step of one of the sessions, on both sides."""
        parts = tuple(
            SequencePart(sequence=name, num_rows=count, start_of_sequence=name in starts)
            for name, count in counts.items()
        )
        batch = self.batch(parts, retrieval, append)
        pending = self.sessions[who].start_step(
            batch.keys,
            list(counts.values()),
            retrieve=retrieval,
            append=append,
            payloads=batch.payloads,
            start_of_sequence=[name in starts for name in counts],
            parts=[NAMES.index(name) for name in counts],
        )
        self.compare(batch, pending.result)

    def prefix(self, name: str, share: float | None) -> int | None:
        """A position at this share of what is published; beyond it above 1."""
        sequence = self.reference.sequences.get(name)
        return None if share is None else round((len(sequence.rows) if sequence else 0) * share)

    def batch(
        self,
        parts: tuple[SequencePart, ...],
        retrieval: Retrieval | None,
        append: bool,
        writer: str = "",
        layers: tuple[int, ...] | None = None,
    ) -> StepBatch:
        """A batch of new rows, small whole numbers so that many rows score the same."""
        layers = tuple(range(self.spec.num_layers)) if layers is None else layers
        rows = sum(part.num_rows for part in parts)
        keys = torch.randint(-4, 5, (len(layers), rows, self.spec.dim), generator=self.random).float()
        hidden = torch.randint(0, 1000, (len(layers), rows, *PAYLOAD.shape), generator=self.random).int()
        payloads = {PAYLOAD.name: hidden} if append and self.spec.payloads else {}
        return StepBatch(
            parts=parts,
            layers=layers,
            keys=keys,
            payloads=payloads,
            retrieve=None if retrieval is None else _options(retrieval),
            append=append,
            writer=writer,
            fingerprints=_fingerprints(parts, keys, hidden) if writer else (),
        )

    def request(self, batch: StepBatch, retrieval: Retrieval | None) -> pb.StepRequest:
        """The batch as a message, numbered by hand."""
        rows = wire.StepRows(keys=batch.keys, payloads=batch.payloads)
        request = wire.step_request(wire.InlinePlane(), "m", rows, retrieval, batch.append, batch.writer)
        request.layers.extend(batch.layers)
        for part in batch.parts:
            request.sequences.add(**part._asdict())
        return request

    def call(self, request: pb.StepRequest, which: int = 0) -> wire.StepResult:
        """Sends a request as it is, until no session has the lease of its sequences."""
        transport = self.clients[which]._transport
        until = time.monotonic() + 30
        while True:
            try:
                answer: Any = transport.call("Step", request, 30.0).result(timeout=30)
                return wire.step_result(transport.plane, answer, CPU)
            except errors.NotReady:
                assert time.monotonic() < until, "it is never ready"

    def compare(self, batch: StepBatch, act: Callable[[], wire.StepResult]) -> None:
        """The server does what the oracle does: the same refusal, or the same answer."""
        try:
            got = act()
        except errors.MemstoreClientError as error:
            with pytest.raises(MemstoreError) as raised:
                self.reference.step(batch)
            assert type(raised.value).__name__ == type(error).__name__
            return
        want = self.reference.step(batch)
        want = self.learn_all(batch, got, want)
        assert_same(self.reference, batch, _engine_result(got), want)

    def learn_all(self, batch: StepBatch, got: wire.StepResult, want: ReferenceResult) -> ReferenceResult:
        """The oracle's result with the server's epochs."""
        results = []
        for part, result, expected in zip(batch.parts, got.sequences, want.sequences, strict=True):
            if expected.epoch < 0:
                self.learn(part.sequence, result.epoch, expected.epoch)
                expected = expected._replace(epoch=result.epoch)
            results.append(expected)
        return ReferenceResult(results, want.hits)

    def learn(self, name: str, epoch: int, placeholder: int) -> None:
        """Where the oracle has made an epoch the server has made one too, and its number was never seen before."""
        assert (epoch != 0) == (placeholder != 0)
        if placeholder < 0:
            assert epoch not in self.epochs
            self.epochs.add(epoch)
            self.reference.sequences[name].epoch = epoch


def _options(retrieval: Retrieval) -> RetrieveOptions:
    return RetrieveOptions(
        top_k=retrieval.top_k,
        window_before=retrieval.before,
        window_after=retrieval.after,
        arrays=retrieval.arrays,
        omit_scores=not retrieval.scores,
    )


def _fingerprints(parts: tuple[SequencePart, ...], *arrays: torch.Tensor) -> tuple[int, ...]:
    splits = [torch.split(array, [part.num_rows for part in parts], dim=1) for array in arrays]
    return tuple(
        zlib.crc32(b"".join(each.contiguous().numpy().tobytes() for each in group))
        for group in zip(*splits, strict=True)
    )


def _engine_result(result: wire.StepResult) -> StepResult:
    """A client's result as the engine's."""
    sequences = tuple(
        SequenceResult(
            epoch=each.epoch,
            as_of=each.as_of,
            live_begin=each.live_begin,
            first_position=each.first_position,
            num_appended=each.num_appended,
            is_replay=each.is_replay,
        )
        for each in result.sequences
    )
    if result.hits is None:
        return StepResult(sequences=sequences)
    hits = Hits(
        row_splits=result.hits.row_splits,
        positions=result.hits.positions,
        index=result.hits.index,
        scores=result.hits.scores,
        arrays=result.hits.rows,
    )
    return StepResult(sequences=sequences, hits=hits)


def live_with_a_lease(machine: type[Store]) -> None:
    """A life that goes on until one of its sessions has had its sequences in its own process."""
    life = machine()
    life.begin(spec=MemorySpec(name="m", dim=2, capacity=4, max_sequences=len(NAMES)), seed=0)
    while not life.clients[0].stats.mapped_steps:
        life.step_of_a_session(counts={"a": 1}, retrieval=Retrieval(1), who=0, starts="")
    life.counters_agree()
    life.teardown()


@pytest.mark.timeout(180)
def test_the_store_does_what_the_oracle_does(server: Serving) -> None:
    machine = type("StoreOfThisServer", (Store,), {"server": server})
    if server.lending is not None:
        live_with_a_lease(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
    assert (machine.num_mapped_steps > 0) == (server.lending is not None)
