"""Generations: nothing that a background build does, or fails to do, changes what is found."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from memstore import index as index_module
from memstore.index import BUILDERS, building, host_parts
from memstore.index.building import Precedence, build_thread, precedence_of
from memstore.index.courtesy import Courtesy
from memstore.index.generation import Generation, Line
from memstore.index.settings import index_bytes
from memstore.memory import Memory
from memstore.types import IndexKind, IndexSettings, Metric, SequencePart, StepBatch
from tests.building import KINDS, ROWS, Pair, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.index.generation import Part, PartBuilder, RowSource

pytest.importorskip("faiss")
CPU = torch.device("cpu")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.value)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(spec_of(request.param), CPU)


def test_a_row_is_found_before_its_generation_is_built_and_after(pair: Pair) -> None:
    pair.append("a", ROWS)
    assert pair.counts.builds_under_way == 1
    pair.look("a")
    pair.append("a", 5)
    assert pair.counts.tail_rows == (ROWS + 5) * 2
    pair.builds.run()
    pair.look("a")
    assert (pair.counts.num_generations, pair.counts.tail_rows) == (1, 5 * 2)
    assert pair.counts.builds_done == 1
    pair.append("a", 3)
    pair.look("a", "nobody")


@pytest.mark.parametrize("lengths", [(7,) * 20, (100, 100, 3), (33, 65, 31, 96, 1, 64), (250,)])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_full_ring_keeps_the_newest_rows_whenever_builds_end(pair: Pair, lengths: tuple[int, ...], lag: int) -> None:
    for length in lengths:
        pair.append("a", length)
        pair.builds.run(len(pair.builds) - lag)
        pair.look("a")
    assert pair.counts.num_generations <= -(-100 // ROWS)
    pair.builds.run()
    assert pair.counts.builds_done > 0
    pair.look("a")


def test_a_prefix_is_read_through_whole_generations_and_parts_of_them(pair: Pair) -> None:
    pair.append("a", 90)
    pair.append("a", 37)
    pair.builds.run()
    for as_of in range(0, 128, 3):
        pair.look("a", as_of=as_of)


def test_as_many_are_found_as_can_be_seen(pair: Pair) -> None:
    pair.append("a", 70)
    pair.builds.run()
    for top_k in (1, 69, 200):
        pair.look("a", top_k=top_k)


def test_lists_that_are_not_probed_leave_no_hit_out_that_is_needed() -> None:
    settings = IndexSettings(generation_rows=ROWS, nlist=16, nprobe=1)
    pair = Pair(spec_of(IndexKind.FAISS_IVF_FLAT, index_settings=settings), CPU)
    pair.append("a", 64)
    pair.builds.run()
    assert pair.counts.tail_rows == 0
    pair.look("a", top_k=64)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_reset_forgets_generations_and_builds(pair: Pair, when: str) -> None:
    pair.append("a", 70)
    pair.append("b", 40)
    pair.builds.run({"before": 0, "between": 1, "after": 3}[when])
    pair.reset(["a"])
    pair.look("a", "b")
    pair.append("a", 50)
    pair.look("a", "b")
    pair.builds.run()
    assert pair.counts.num_generations == 2
    pair.look("a", "b")
    pair.append("b", 9, start=True)
    pair.builds.run()
    assert pair.counts.num_generations == 1
    pair.look("a", "b")


def test_a_released_place_has_nothing_of_the_one_before(pair: Pair) -> None:
    pair.append("a", 70)
    pair.builds.run(1)
    pair.reset(["a"], release=True)
    pair.append("c", 70)
    pair.builds.run()
    pair.look("a", "c")
    assert pair.counts.num_generations == 2


@pytest.mark.parametrize("as_of", [None, 31, 32, 50, 64, 0])
@pytest.mark.parametrize("num_built", [0, 1, 2])
def test_a_fork_shares_generations_and_diverges_while_builds_go_on(
    pair: Pair, as_of: int | None, num_built: int
) -> None:
    pair.append("a", 75)
    pair.builds.run(num_built)
    pair.fork("a", "b", as_of)
    pair.look("a", "b")
    pair.append("b", 40)
    pair.append("a", 3)
    pair.look("a", "b")
    pair.builds.run()
    pair.look("a", "b")
    pair.reset(["a"], release=True)
    pair.builds.run()
    pair.look("a", "b")


def test_a_fork_of_a_wrapped_ring_is_built_from_where_it_begins(pair: Pair) -> None:
    pair.append("a", 150)
    pair.fork("a", "b")
    pair.append("b", 60)
    pair.builds.run()
    pair.look("a", "b")
    assert pair.counts.num_generations > 2


class Failing:
    """A builder that fails as often as it is told, and then builds like the one it stands before."""

    def __init__(self, builder: PartBuilder, failures: list[Exception]) -> None:
        self.can_mask = builder.can_mask
        self.candidates = builder.candidates
        self._builder = builder
        self._failures = failures

    def build(self, rows: RowSource, check: Callable[[], None]) -> Part:
        """Fails, or builds."""
        if self._failures:
            raise self._failures.pop()
        return self._builder.build(rows, check)


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What the next builds raise."""
    expected: list[Exception] = []
    real = BUILDERS["cpu"]
    monkeypatch.setitem(index_module.BUILDERS, "cpu", lambda spec, device: Failing(real(spec, device), expected))
    return expected


def test_a_build_that_finds_no_memory_is_put_off_and_tried_again(
    failures: list[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    failures.append(MemoryError("no room"))
    pair = Pair(spec_of(IndexKind.FAISS_IVF_FLAT), CPU)
    pair.append("a", 70)
    with caplog.at_level(logging.ERROR):
        pair.builds.run()
    assert [record.getMessage() for record in caplog.records] == ["build failed"]
    pair.look("a")
    counts = pair.counts
    assert (counts.builds_put_off, counts.num_generations, counts.tail_rows) == (2, 0, 140)
    pair.append("a", ROWS // 4 - 1)
    assert len(pair.builds) == 0
    pair.append("a", 1)
    pair.builds.run()
    pair.look("a")
    assert (pair.counts.builds_done, pair.counts.num_generations) == (2, 2)


def test_a_build_of_one_layer_that_fails_shows_no_layer(failures: list[Exception]) -> None:
    pair = Pair(spec_of(IndexKind.FAISS_IVF_FLAT), CPU)
    pair.append("a", ROWS)
    built: list[Part] = []

    def fail_at_the_second(rows: RowSource, check: Callable[[], None]) -> Part:
        if built:
            raise RuntimeError("Failed to cudaMalloc")
        built.append(real(rows, check))
        return built[0]

    builder = pair.memory._index._builder  # type: ignore[attr-defined]
    real, builder.build = builder.build, fail_at_the_second
    pair.builds.run()
    pair.look("a")
    assert (pair.counts.num_generations, pair.counts.builds_put_off) == (0, 1)


def test_what_has_left_before_it_is_built_is_not_built(pair: Pair) -> None:
    pair.append("a", 64)
    pair.append("a", 100)
    pair.append("a", 100)
    pair.builds.run()
    assert pair.counts.num_generations == pair.counts.builds_done <= 4
    pair.look("a")


def test_reserved_bytes_count_every_generation_and_a_build() -> None:
    for kind in KINDS:
        spec = spec_of(kind)
        assert Memory.bytes_needed(spec, CPU) - Memory.bytes_needed(
            dataclasses.replace(spec, index=IndexKind.EXACT, index_settings=None), CPU
        ) == index_bytes(spec, CPU)
        one = dataclasses.replace(spec, max_sequences=1, num_layers=1)
        assert index_bytes(spec, CPU) > index_bytes(one, CPU) > 0
    rarely = IndexSettings(generation_rows=128, nlist=2)
    assert index_bytes(spec_of(IndexKind.FAISS_IVF_FLAT, index_settings=rarely), CPU) == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_generation_takes_no_more_than_is_reserved_for_it(kind: IndexKind, dtype: torch.dtype) -> None:
    faiss = pytest.importorskip("faiss")
    spec = spec_of(kind, num_layers=1, dtype=dtype, index_settings=IndexSettings(), capacity=16_384, dim=32)
    if kind is IndexKind.FAISS_IVF_PQ:
        spec = dataclasses.replace(spec, index_settings=IndexSettings(pq_m=4))
    memory = Memory(spec, CPU, new_epoch=lambda: 1, builds=(builds := Pair(spec_of(kind), CPU).builds))
    part = SequencePart(sequence="a", num_rows=16_384)
    keys = torch.randn(1, 16_384, 32)
    memory.step([StepBatch(parts=(part,), layers=(0,), keys=keys, append=True)])
    builds.run()
    memory.counts()
    (line,) = memory._index._lines.values()  # type: ignore[attr-defined]
    (generation,) = line.generations
    size = len(faiss.serialize_index(generation.parts[0]._index))
    assert size * spec.max_sequences <= index_bytes(spec, CPU)


def test_a_dropped_memory_waits_for_the_build_that_runs_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    is_building, may_go_on = threading.Event(), threading.Event()
    real = host_parts.HostBuilder.build

    def slow(self: host_parts.HostBuilder, rows: RowSource, check: Callable[[], None]) -> Part:
        is_building.set()
        may_go_on.wait()
        return real(self, rows, check)

    monkeypatch.setattr(host_parts.HostBuilder, "build", slow)
    with build_thread() as builds:
        spec = spec_of(IndexKind.FAISS_IVF_FLAT)
        memory = Memory(spec, CPU, new_epoch=itertools.count(1).__next__, builds=builds)
        part = SequencePart(sequence="a", num_rows=100)
        memory.step([StepBatch(parts=(part,), layers=(0, 1), keys=torch.randn(2, 100, 8), append=True)])
        is_building.wait()
        memory.free()
        waiting = threading.Thread(target=memory.join)
        waiting.start()
        assert waiting.is_alive()
        may_go_on.set()
        waiting.join()
    counts = memory.counts().index
    assert counts is not None
    assert (counts.builds_under_way, counts.num_generations, counts.builds_done) == (0, 0, 0)


def test_after_the_builds_are_stopped_everything_is_scanned(pair: Pair) -> None:
    pair.append("a", 70)
    pair.builds.run()
    pair.look("a")
    pair.memory.stop_builds()
    pair.append("a", 70)
    pair.builds.run()
    assert pair.counts.num_generations == 0
    pair.look("a")


def test_a_thread_that_is_gone_builds_nothing_and_fails_nothing() -> None:
    pair = Pair(spec_of(IndexKind.FAISS_IVF_FLAT), CPU)
    builds = build_thread()
    builds.shutdown()
    pair.memory = Memory(pair.spec, CPU, new_epoch=itertools.count(1).__next__, builds=builds)
    pair.append("a", 70)
    pair.append("a", 70)
    pair.look("a")
    assert pair.counts.builds_under_way == 0


def test_the_build_thread_leaves_the_cores_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    made = Courtesy(lambda: 0.0, lambda seconds: None)

    def of_this_thread() -> Courtesy:
        threads.append(threading.get_ident())
        return made

    monkeypatch.setattr(building, "of_this_thread", of_this_thread)
    with build_thread() as builds:
        thread = builds.submit(threading.get_ident).result()
        assert precedence_of(builds).courtesy is made
    assert threads == [thread]


def test_a_build_thread_that_nobody_holds_ends() -> None:
    builds = build_thread()
    thread = builds.submit(threading.current_thread).result()
    del builds
    thread.join(10)
    assert not thread.is_alive()


def test_a_build_rests_before_it_waits_for_the_retrieval_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    precedence, done = Precedence(), []
    waited_s = iter((0.0, 1.0))
    precedence.courtesy = Courtesy(lambda: next(waited_s), lambda seconds: done.append("rests"))
    monkeypatch.setattr(precedence._is_free, "wait", lambda seconds: done.append("waits"))
    precedence.wait()
    assert done == ["rests", "waits"]


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_metric_and_precision(kind: IndexKind, metric: Metric, dtype: torch.dtype) -> None:
    pair = Pair(spec_of(kind, metric=metric, dtype=dtype), CPU)
    for _ in range(3):
        pair.append("a", 41)
        pair.builds.run()
    assert pair.counts.num_generations == 3
    pair.look("a")


@pytest.mark.parametrize(
    ("begin", "end", "can_mask", "used", "front", "back"),
    [
        (0, 70, True, 2, (0, 0), (64, 70)),
        (10, 70, True, 2, (10, 10), (64, 70)),
        (10, 70, False, 1, (10, 32), (64, 70)),
        (16, 70, True, 1, (16, 32), (64, 70)),
        (0, 60, False, 1, (0, 0), (32, 60)),
        (0, 60, True, 2, (0, 0), (60, 60)),
        (40, 50, True, 0, (40, 40), (40, 50)),
        (5, 5, True, 0, (5, 5), (5, 5)),
    ],
)
def test_what_is_seen_is_in_a_generation_or_scanned(
    begin: int, end: int, can_mask: bool, used: int, front: tuple[int, int], back: tuple[int, int]
) -> None:
    line = Line(generations=[Generation(0, 32, ()), Generation(32, 64, ())])
    view = line.view(begin, end, can_mask=can_mask)
    assert (len(view.generations), view.front, view.back) == (used, front, back)


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(0, 31, None), (0, 32, (0, 32)), (10, 40, (10, 32)), (17, 40, None), (17, 64, (32, 64)), (33, 64, (33, 64))],
)
def test_half_a_generation_or_more_is_built(begin: int, end: int, expected: tuple[int, int] | None) -> None:
    assert Line(begin=begin, end=end).next_range(32) == expected
