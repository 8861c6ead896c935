"""A session that keeps rows gives the same results as one that does not, whatever happens; and fewer rows travel."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from memstore.embedded import Embedded
from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval, StepResult, row_cache
from model_client.errors import Internal, Late, MemstoreClientError, Unavailable
from model_client.row_cache import RowCache
from model_client.wire import Hits
from tests.faulty import FakeClock, Fault, FaultyTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("a", "b")
CAPACITY = 24
ROW_BYTES = 2 * 3 + 4 + 16
"""Of the key, the payload, and what is kept beside a row."""
ALL = Retrieval(CAPACITY, after=1, arrays=("key", "number"))


@pytest.fixture(autouse=True)
def every_retrieval_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "LEAST_NEIGHBOURS", 1)


@pytest.fixture(scope="module")
def server() -> Iterator[Embedded]:
    embedded = Embedded("cpu", capacity_bytes=1 << 24)
    yield embedded
    embedded.close()


class Twins:
    """A session that keeps rows over a bad network, one that does not over a good one, and others who write."""

    def __init__(self, server: Embedded, seed: int, row_cache_bytes: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.network = FaultyTransport(server)
        self.keeping = MemoryClient(
            transport=self.network,
            clock=FakeClock(),
            timeout_s=0.01,
            breaker_failures=1_000_000,
            row_cache_bytes=row_cache_bytes,
        )
        self.plain = MemoryClient(transport=FaultyTransport(server), timeout_s=30.0, row_cache_bytes=0)
        self.create()
        self.session = self.keeping.session("m", NAMES)
        self.reader = self.plain.session("m", NAMES)
        self.other = self.plain.session("m", NAMES)

    def create(self) -> None:
        """The memory, new."""
        for each in self.plain.list_memories():
            self.plain.drop_memory(each.spec.name)
        self.plain.create_memory(
            "m", dim=3, capacity=CAPACITY, max_sequences=3, num_layers=2, payloads={"number": (torch.int32, (1,))}
        )

    def rows(self, counts: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rows that nobody has had."""
        shape = (2, sum(counts))
        numbers = torch.randint(1 << 30, (*shape, 1), generator=self.generator, dtype=torch.int32)
        return torch.randn(*shape, 3, generator=self.generator).half(), {"number": numbers}

    def step(self) -> None:
        """Both retrieve for the same queries, of the same state; the keeping one may append them, too."""
        parts = self.random.choice([[0, 1], [1, 0], [1]])
        counts = [self.random.choice([0, 1, 3]) for _ in parts]
        keys, payloads = self.rows(counts)
        arrays = self.random.choice([("key", "number")] * 4 + [("number",), ()])
        retrieve = replace(ALL, top_k=self.random.choice([1, 4, CAPACITY]), arrays=arrays)
        is_append = self.random.random() < 0.5
        is_start = is_append and self.random.random() < 0.1
        self.settle()
        want = self.reader.retrieve(keys, counts, retrieve, parts=parts).hits
        given = payloads if is_append else {}
        got = self.session.step(
            keys,
            counts,
            retrieve=retrieve,
            append=is_append,
            payloads=given,
            parts=parts,
            start_of_sequence=is_start,
        ).hits
        if not is_start:
            assert_same(got, want)

    def settle(self) -> None:
        """What is under way of the keeping session is done, or never will be."""
        script, self.network.script = self.network.script, []
        keys, payloads = self.rows([0, 0])
        self.session.append(keys, [0, 0], payloads=payloads)
        self.network.script = script

    def disturb(self) -> None:
        """Something befalls the memory, or the network of the next calls."""
        match self.random.randrange(6):
            case 0:
                counts = [self.random.randrange(6), self.random.randrange(6)]
                keys, payloads = self.rows(counts)
                self.other.append(keys, counts, payloads=payloads)
            case 1:
                self.plain.reset("m", [self.random.choice(NAMES)], release=self.random.random() < 0.5)
            case 2:
                source, target = self.random.sample(NAMES, 2)
                self.plain.reset("m", [target], release=True)
                if self.plain.describe_memory("m").status.num_sequences:
                    self.plain.fork("m", source, target)
            case 3 if self.random.random() < 0.3:
                self.create()
            case 4:
                self.session.reset()
            case _:
                faults = [Fault.REPLY_LOST, Fault.SILENCE, Fault.SWALLOWED, Fault.TWICE, Fault.REQUEST_LOST]
                self.network.script = self.random.choices(faults, k=self.random.choice([1, 2]))


def assert_same(got: Hits | None, want: Hits | None) -> None:
    assert got is not None
    assert want is not None
    assert list(got.rows) == list(want.rows)
    pairs = [(got.rows[name], want.rows[name]) for name in want.rows]
    pairs += [(getattr(got, name), getattr(want, name)) for name in ("positions", "row_splits", "index", "scores")]
    for mine, others in pairs:
        assert mine.dtype == others.dtype
        assert torch.equal(mine, others)


@pytest.mark.parametrize("num_rows", [30, 100, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_results_are_the_same_whatever_happens(server: Embedded, seed: int, num_rows: int) -> None:
    twins = Twins(server, seed, num_rows * ROW_BYTES)
    num_done = 0
    for _ in range(100):
        if twins.random.random() < 0.2:
            try:
                twins.disturb()
            except MemstoreClientError:
                continue  # a fork of a sequence that is not there; a reset that met a bad network
        try:
            twins.step()
        except (Unavailable, Late):
            continue
        num_done += 1
    twins.network.script = []
    assert num_done > 50
    assert twins.keeping.stats.reused_rows > 100
    assert twins.plain.stats.reused_rows == 0


@pytest.fixture
def calm(server: Embedded) -> Twins:
    """Twins whose sequence "a" has sixteen rows."""
    twins = Twins(server, 7, 1 << 20)
    keys, payloads = twins.rows([16, 0])
    twins.other.append(keys, [16, 0], payloads=payloads)
    return twins


def look(twins: Twins, retrieve: Retrieval = ALL) -> Hits:
    """What the keeping session finds; it is what the other one finds."""
    keys, _ = twins.rows([1, 1])
    got = twins.session.retrieve(keys, [1, 1], retrieve).hits
    assert got is not None
    assert_same(got, twins.reader.retrieve(keys, [1, 1], retrieve).hits)
    return got


def reused(twins: Twins) -> int:
    """Rows that did not travel, since this was asked last."""
    before, twins.keeping.stats.reused_rows = twins.keeping.stats.reused_rows, 0
    return before


def test_a_row_travels_once(calm: Twins) -> None:
    look(calm)
    assert reused(calm) == 0
    look(calm)
    assert reused(calm) == 32  # of two layers
    keys, payloads = calm.rows([2, 0])
    calm.other.append(keys, [2, 0], payloads=payloads)
    look(calm)
    assert reused(calm) == 32
    look(calm)
    assert reused(calm) == 36


def test_rows_that_have_left_the_ring_are_not_told_any_more(calm: Twins) -> None:
    look(calm)
    keys, payloads = calm.rows([CAPACITY, 0])
    calm.other.append(keys, [CAPACITY, 0], payloads=payloads)
    reused(calm)
    look(calm)
    look(calm)
    assert reused(calm) == 2 * CAPACITY
    known = calm.network.calls[-1].retrieve.known  # type: ignore[attr-defined]
    assert [(each.begin, len(each.bits)) for each in known] == [(16, CAPACITY // 8), (0, 0)] * 2


def test_another_choice_of_arrays_is_another_row(calm: Twins) -> None:
    look(calm)
    look(calm, replace(ALL, arrays=("number",)))
    look(calm)
    assert reused(calm) == 0


def test_what_becomes_of_a_result_is_the_callers_business(calm: Twins) -> None:
    for _ in range(3):
        for rows in look(calm).rows.values():
            rows.zero_()
    assert reused(calm) == 64


def test_modes_of_autograd_are_no_business_of_what_is_kept(calm: Twins) -> None:
    with torch.inference_mode():
        look(calm)
    with torch.enable_grad():
        look(calm)
    with torch.inference_mode():
        look(calm)
    assert reused(calm) == 64


def test_answers_under_way_are_completed_by_what_was_there_when_they_were_asked_for(calm: Twins) -> None:
    look(calm)
    keys, payloads = calm.rows([1, 0])
    want = calm.reader.retrieve(keys, [1, 0], ALL).hits
    calm.network.script = [Fault.HELD]
    pending = calm.session.start_step(keys, [1, 0], retrieve=ALL, append=True, payloads=payloads, deadline_s=60.0)
    look(calm, replace(ALL, arrays=("number",)))  # gives up what was there
    look(calm, replace(ALL, arrays=("number",)))
    calm.network.release()
    assert_same(pending.result().hits, want)


def test_nothing_is_kept_where_it_shall_not(server: Embedded) -> None:
    twins = Twins(server, 1, 0)
    keys, payloads = twins.rows([4, 4])
    twins.other.append(keys, [4, 4], payloads=payloads)
    look(twins)
    look(twins)
    assert reused(twins) == 0
    assert not any(call.retrieve.known for call in twins.network.calls)  # type: ignore[attr-defined]


def test_small_retrievals_tell_nothing(calm: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "LEAST_NEIGHBOURS", 1 + CAPACITY * 2)
    look(calm)
    look(calm)
    assert reused(calm) == 0


def answer(num_rows: int, *, epoch: int = 5, dtype: torch.dtype = torch.float16) -> StepResult:
    """One of a server: the rows of the first positions of one sequence."""
    hits = Hits(
        rows={"key": torch.arange(num_rows * 2).reshape(-1, 2).to(dtype)},
        positions=torch.arange(num_rows),
        row_splits=torch.tensor([0, num_rows]),
        index=torch.zeros(1, 1, 1, 1, dtype=torch.int32),
        scores=None,
    )
    return StepResult(sequences=(pb.SequenceResult(epoch=epoch, as_of=num_rows),), hits=hits)


def asked_of(cache: RowCache) -> row_cache.Asked:
    asked = cache.ask(Retrieval(1), 1, [pb.SequencePart(sequence="a", num_rows=1)], 1)
    assert asked is not None
    return asked


def without(result: StepResult, num_sent: int) -> StepResult:
    """The answer with its first rows alone."""
    assert result.hits is not None
    return replace(result, hits=replace(result.hits, rows={"key": result.hits.rows["key"][:num_sent]}))


ALL_OF_FOUR = torch.ones(4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("result", "left_out"),
    [
        (without(answer(4, epoch=6), 0), ALL_OF_FOUR),
        (without(answer(5), 0), torch.ones(5, dtype=torch.uint8)),
        (without(answer(4), 1), ALL_OF_FOUR),
        (without(answer(4), 3), None),
        (without(answer(4), 0), torch.ones(3, dtype=torch.uint8)),
        (without(answer(4, dtype=torch.float32), 0), ALL_OF_FOUR),
        (replace(answer(4), sequences=()), None),
        (replace(answer(4), sequences=answer(4).sequences * 2), None),
    ],
    ids=[
        "another epoch",
        "a row too many",
        "a row came too",
        "a row lacks",
        "too few",
        "dtype",
        "no part",
        "two parts",
    ],
)
def test_an_answer_that_leaves_out_what_is_not_there_is_refused(
    result: StepResult, left_out: torch.Tensor | None
) -> None:
    cache = RowCache(1 << 20)
    cache.complete(asked_of(cache), answer(4), None)
    whole, num_left_out = cache.complete(asked_of(cache), without(answer(4), 0), ALL_OF_FOUR)
    assert num_left_out == 4
    assert whole.hits is not None
    assert torch.equal(whole.hits.rows["key"], torch.arange(8).reshape(4, 2).half())
    with pytest.raises(Internal):
        cache.complete(asked_of(cache), result, left_out)


@pytest.mark.parametrize("splits", [[0, 4, 4], [1, 4], [0, 3], [0]])
def test_an_answer_of_other_groups_is_refused(splits: list[int]) -> None:
    cache = RowCache(1 << 20)
    result = answer(4)
    assert result.hits is not None
    odd = replace(result, hits=replace(result.hits, row_splits=torch.tensor(splits)))
    with pytest.raises(Internal):
        cache.complete(asked_of(cache), odd, None)


def test_an_answer_that_comes_after_its_rows_have_left_is_whole() -> None:
    cache = RowCache(1 << 20)
    cache.complete(asked_of(cache), answer(4), None)
    before = asked_of(cache)
    later = answer(4)
    later.sequences[0].live_begin = 2
    cache.complete(asked_of(cache), without(later, 0), ALL_OF_FOUR)
    late = answer(5)
    assert late.hits is not None
    last_alone = replace(late, hits=replace(late.hits, rows={"key": late.hits.rows["key"][4:]}))
    whole, _ = cache.complete(before, last_alone, torch.tensor([1, 1, 1, 1, 0], dtype=torch.uint8))
    assert whole.hits is not None
    assert torch.equal(whole.hits.rows["key"], late.hits.rows["key"])


def told(cache: RowCache) -> int:
    """Positions that the next request would tell."""
    options = pb.RetrieveOptions()
    asked_of(cache).write(options)
    return sum(int.from_bytes(known.bits, "little").bit_count() for known in options.known)


def test_it_has_an_end() -> None:
    cache = RowCache(10 * (4 + 16))
    cache.complete(asked_of(cache), answer(6), None)
    assert told(cache) == 0  # more than half
    cache.complete(asked_of(cache), answer(5), None)
    assert told(cache) == 5
    cache.complete(asked_of(cache), answer(4, epoch=6), None)
    assert told(cache) == 4
    cache.complete(asked_of(cache), answer(3, epoch=7), None)  # there is no room beside the others
    assert told(cache) == 3
    assert cache._num_rows == 3
    assert len(cache._rows["key"]) <= 10


def test_rows_far_apart_are_not_told_one_by_one() -> None:
    cache = RowCache(1 << 20)
    result = answer(2)
    assert result.hits is not None
    apart = replace(result.hits, positions=torch.tensor([0, 1 << 40]))
    cache.complete(asked_of(cache), replace(result, hits=apart), None)
    assert told(cache) == 0
