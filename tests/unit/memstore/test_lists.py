"""Inverted lists as tensors: every row is in one list, near its centre, whatever the distribution."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock
from weakref import ref

import pytest
import torch

from memstore.gpu.listing import ListShape, listed
from memstore.index.building import BuildThread, Precedence, precedence_of
from memstore.index.generation import Generation, Line
from memstore.index.generations import GenerationIndex
from memstore.index.list_parts import ListBuilder
from memstore.index.settings import MOST_LISTS, has_lists, index_bytes, list_shape
from memstore.index.stored_rows import StoredRows
from memstore.slab import Slab
from memstore.types import IndexKind, IndexSettings, MemorySpec, Metric
from tests.fakes import HeldBuilds

if TYPE_CHECKING:
    from collections.abc import Callable

    from memstore.gpu.listing import Lists
    from memstore.index.generation import RowSource

CPU = torch.device("cpu")
SHAPE = ListShape(span=200, num_centres=5, width=32, num_chosen=4, num_generations=2, nowhere=9.0)


@pytest.mark.parametrize("num_rows", [200, 120])
@pytest.mark.parametrize("skew", ["even", "one", "some"])
def test_each_row_is_in_one_list_of_its_centre(num_rows: int, skew: str) -> None:
    centres = torch.arange(5.0)[:, None].expand(-1, 3).contiguous()
    assigned = {
        "even": torch.arange(num_rows) % 5,
        "one": torch.full((num_rows,), 3),
        "some": torch.randint(2, (num_rows,)) * 4,
    }[skew]
    first = 200 - num_rows
    lists = listed(centres, assigned, first, SHAPE)
    assert lists.rows.shape == (SHAPE.num_together, SHAPE.width) == (12, 32)
    numbers = lists.rows[lists.rows >= 0]
    assert numbers.sort().values.tolist() == list(range(first, 200))
    owner = lists.centres[:, 0].long()[:, None].expand_as(lists.rows)
    assert torch.equal(owner[lists.rows >= 0], assigned[numbers.long() - first])
    lengths = (lists.rows >= 0).sum(-1)
    assert not lengths[lists.centres[:, 0] == 9.0].any()
    for centre, num in enumerate(torch.bincount(assigned, minlength=5).tolist()):
        of_centre = lengths[lists.centres[:, 0] == centre]
        assert len(of_centre) == -(-num // 32)
        assert not num or of_centre.max() - of_centre.min() <= 1  # they share its rows evenly


def slab_with(spec: MemorySpec, keys: torch.Tensor) -> Slab:
    """A slab whose only ring these rows fill."""
    slab = Slab(spec, CPU)
    slab.write(slab.stage(keys[None], {}), torch.arange(len(keys)))
    return slab


@pytest.mark.parametrize("metric", list(Metric), ids=lambda metric: metric.value)
def test_rows_are_listed_with_the_centre_that_they_are_nearest_to(metric: Metric) -> None:
    settings = IndexSettings(generation_rows=512, nlist=8, nprobe=2)
    spec = MemorySpec(
        name="m", dim=16, capacity=1024, metric=metric, index=IndexKind.FAISS_IVF_FLAT, index_settings=settings
    )
    groups = 10 * torch.randn(8, 16)
    keys = (groups[torch.randint(8, (1024,))] + 0.1 * torch.randn(1024, 16)).half()
    rows = StoredRows(slab_with(spec, keys), 0, 0, 512, 1024, lambda: None)
    lists = ListBuilder(spec, CPU).build(rows, lambda: None)
    wide = keys.float()[512:]
    if metric is Metric.COSINE:
        wide = torch.nn.functional.normalize(wide, dim=-1)
    scores = -torch.cdist(wide, lists.centres) if metric is Metric.L2 else wide @ lists.centres.T
    owner = torch.empty(512, dtype=torch.int64)
    which = (lists.rows >= 0).nonzero()
    owner[lists.rows[lists.rows >= 0].long()] = which[:, 0]
    torch.testing.assert_close(scores.gather(1, owner[:, None])[:, 0], scores.amax(-1), atol=1e-2, rtol=1e-3)


def test_a_build_of_lists_stops_where_it_is_told_to() -> None:
    settings = IndexSettings(generation_rows=64, nlist=4, nprobe=1)
    spec = MemorySpec(name="m", dim=8, capacity=64, index=IndexKind.FAISS_IVF_FLAT, index_settings=settings)

    def check() -> None:
        raise InterruptedError

    rows = StoredRows(slab_with(spec, torch.randn(64, 8)), 0, 0, 0, 64, lambda: None)
    with pytest.raises(InterruptedError):
        ListBuilder(spec, CPU).build(rows, check)


def test_a_rehearsal_leaves_the_random_numbers_of_others_as_they_are() -> None:
    settings = IndexSettings(generation_rows=64, nlist=4, nprobe=1)
    spec = MemorySpec(name="m", dim=8, capacity=64, index=IndexKind.FAISS_IVF_FLAT, index_settings=settings)
    before = torch.get_rng_state()
    ListBuilder(spec, CPU).prepare()
    assert torch.equal(torch.get_rng_state(), before)


def test_lists_are_counted_in_what_is_reserved_and_few_are_read() -> None:
    gpu = torch.device("cuda", 0)
    spec = MemorySpec(name="m", dim=256, capacity=10_000_000, index=IndexKind.FAISS_IVF_FLAT)
    shape = list_shape(spec)
    assert shape.num_chosen == MOST_LISTS
    assert shape.num_together == shape.num_centres + -(-shape.span // shape.width)
    each = spec.dim * 2 + 4 + 4 * shape.width
    lists = shape.num_generations * shape.num_together * each
    assert lists < index_bytes(spec, gpu) < lists + (4 << 30)
    assert has_lists(spec, gpu)
    assert not has_lists(spec, CPU)
    settings = IndexSettings(generation_rows=64, nlist=4, nprobe=1)
    small = MemorySpec(name="m", dim=8, capacity=128, index=IndexKind.FAISS_IVF_FLAT, index_settings=settings)
    assert list_shape(small).num_chosen == 3  # a quarter of the 10 lists of both generations


def test_a_generation_that_is_dying_is_seen_to_its_end_where_it_is_kept() -> None:
    generations = [Generation(0, 32, ()), Generation(32, 64, ())]
    for keeps_dying, num_used in ((False, 1), (True, 2)):
        line = Line(keeps_dying=keeps_dying, generations=generations, begin=30, end=70)
        view = line.view(30, 70, can_mask=True)
        assert len(view.generations) == num_used
        assert view.front == ((30, 30) if keeps_dying else (30, 32))
        assert line.view(30, 40, can_mask=True).generations == (tuple(generations[:1]) if keeps_dying else ())


def test_a_build_waits_for_the_retrieval_that_is_under_way() -> None:
    precedence, order = Precedence(), []

    def build() -> None:
        precedence.wait()
        order.append("build")

    thread = threading.Thread(target=build)
    with precedence.asking():
        thread.start()
        order.append("retrieval")
    thread.join()
    precedence.wait()
    assert order == ["retrieval", "build"]


def test_a_retrieval_that_is_a_part_of_another_does_not_end_its_precedence() -> None:
    precedence = Precedence()
    with precedence.asking():
        with precedence.asking():
            pass
        assert not precedence._is_free.is_set()
    assert precedence._is_free.is_set()


def test_memories_of_a_device_share_one_precedence() -> None:
    with BuildThread() as builds:
        assert precedence_of(builds) is precedence_of(builds) is builds.precedence
    assert precedence_of(HeldBuilds()) is not precedence_of(HeldBuilds())


class FullLists:
    """Searches nothing; has no room for what is put there while `is_full`."""

    keeps_dying = True

    def __init__(self) -> None:
        self.is_full = True
        self.numbers: list[int] = []

    def put(self, place: int, number: int, layers: tuple[Lists, ...]) -> None:
        if self.is_full:
            raise torch.OutOfMemoryError("no room")
        self.numbers.append(number)


def test_lists_that_there_is_no_room_for_are_built_again_and_leave_no_gap() -> None:
    """Their rows, and those behind them, stay in the tail; nobody's call fails for it."""
    settings = IndexSettings(generation_rows=64, nlist=4, nprobe=1)
    spec = MemorySpec(name="m", dim=8, capacity=256, index=IndexKind.FAISS_IVF_FLAT, index_settings=settings)
    lists: Any = FullLists()
    slab, builds = Slab(spec, CPU), HeldBuilds()
    slab.keys.normal_()
    index = GenerationIndex(spec, ListBuilder(spec, CPU), builds, lists)
    index.appended(slab, 0, 0, 128)
    builds.run()
    index.appended(slab, 0, 0, 130)
    lists.is_full = False
    counts = index.counts()
    assert (counts.num_generations, counts.tail_rows, counts.builds_put_off) == (0, 130, 2)
    index.appended(slab, 0, 0, 150)
    builds.run()
    counts = index.counts()
    assert (counts.num_generations, counts.tail_rows, lists.numbers) == (2, 22, [0, 1])


class Parts:
    """Builds what only its life is known of. `built`: references to it."""

    can_mask = True

    def __init__(self) -> None:
        self.built: list[ref[Any]] = []

    def candidates(self, top_k: int) -> int:
        return top_k

    def build(self, rows: RowSource, check: Callable[[], None]) -> Any:
        part = Mock()
        self.built.append(ref(part))
        return part


def test_what_is_dead_is_let_go_before_the_next_build_begins() -> None:
    """However many wait before it: all that generations can take is reserved, and no more."""
    settings = IndexSettings(generation_rows=64, nlist=4, nprobe=1)
    spec = MemorySpec(
        name="m", dim=8, capacity=128, max_sequences=2, index=IndexKind.FAISS_IVF_FLAT, index_settings=settings
    )
    parts, builds, slab = Parts(), HeldBuilds(), Slab(spec, CPU)
    index = GenerationIndex(spec, parts, builds)
    index.appended(slab, 0, 0, 64)
    builds.run()
    index.appended(slab, 1, 0, 128)
    index.appended(slab, 0, 64, 128)
    assert [part() is None for part in parts.built] == [False]
    builds.run(1)
    assert [part() is None for part in parts.built] == [True, False]
