"""The tables of a batch, and the room of a reply: what the GPU path does before anything is on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memstore.gpu.rings import AlikeRings, Block, Ring, TableSizes, tables
from memstore.gpu.room import ALIGNMENT, Field, ReplyRoom
from memstore.gpu.tuning import scan_shape
from memstore.search import SearchBatch
from memstore.slab import Slab
from memstore.types import MemorySpec

SPEC = MemorySpec(name="m", dim=8, capacity=100, max_sequences=4, num_layers=2)


def batch(counts: tuple[int, ...]) -> SearchBatch:
    return SearchBatch(
        queries=torch.zeros(2, sum(counts), 8),
        layers=(1, 0),
        places=(3, 0, 2)[: len(counts)],
        counts=counts,
        begins=(0, 50, 10)[: len(counts)],
        ends=(0, 150, 20)[: len(counts)],
        top_k=4,
    )


def test_rings_stand_in_the_order_of_the_reply_and_blocks_in_that_of_the_queries() -> None:
    slab = Slab(SPEC, torch.device("cpu"))
    groups = np.array([[5, 0, 3], [1, 2, 4]])
    sizes, flat = tables(slab, batch((3, 0, 5)), groups, block=2)
    of = sizes.split(torch.from_numpy(flat))
    assert (sizes.num_rings, sizes.num_blocks, sizes.num_queries) == (6, 10, 16)
    first_cells = slab.first_cells((1, 0), (3, 0, 2))
    for layer in range(2):
        for sequence, (last, seen, begin) in enumerate([(0, 0, 0), (49, 100, 50), (19, 10, 10)]):
            ring = of.rings[groups[layer, sequence]].tolist()
            assert ring == [first_cells[layer, sequence], last, seen, begin]
    assert of.query_rings.tolist() == [5] * 3 + [3] * 5 + [1] * 3 + [4] * 5
    firsts = [0, 2, 3, 5, 7, 8, 10, 11, 13, 15]
    assert of.blocks[:, Block.FIRST_QUERY].tolist() == firsts
    assert of.blocks[:, Block.NUM_QUERIES].tolist() == [3, 1, 5, 3, 1] * 2
    assert of.blocks[:, Block.RING].tolist() == [5, 5, 3, 3, 3, 1, 1, 4, 4, 4]
    for block in of.blocks:
        assert block[: Ring.BEGIN].tolist() == of.rings[block[Block.RING], : Ring.BEGIN].tolist()


@pytest.mark.parametrize(("count", "block"), [(1, 16), (5, 2), (4, 2), (300, 256)])
def test_rings_with_equally_many_queries(count: int, block: int) -> None:
    slab = Slab(SPEC, torch.device("cpu"))
    groups = np.array([[5, 0, 3], [1, 2, 4]])
    sizes, flat = tables(slab, batch((count,) * 3), groups, block)
    of = sizes.split(torch.from_numpy(flat))
    order, before = [5, 0, 3, 1, 2, 4], list(range(0, count, block))
    assert sizes == (6, 6 * len(before), 6 * count)
    assert of.query_rings.tolist() == [ring for ring in order for _ in range(count)]
    assert of.blocks[:, Block.RING].tolist() == [ring for ring in order for _ in before]
    assert of.blocks[:, Block.FIRST_QUERY].tolist() == [at * count + first for at in range(6) for first in before]
    assert of.blocks[:, Block.NUM_QUERIES].tolist() == [count - first for first in before] * 6
    first_cells = slab.first_cells((1, 0), (3, 0, 2)).reshape(-1)
    for at, ring in enumerate(order):
        assert of.rings[ring].tolist() == [first_cells[at], *[(0, 0, 0), (49, 100, 50), (19, 10, 10)][at % 3]]
    for row in of.blocks:
        assert row[: Ring.BEGIN].tolist() == of.rings[row[Block.RING], : Ring.BEGIN].tolist()


@pytest.mark.parametrize("counts", [(0, 0), ()])
def test_a_batch_without_queries_has_no_blocks(counts: tuple[int, ...]) -> None:
    groups = np.arange(2 * len(counts)).reshape(2, -1)
    sizes, flat = tables(Slab(SPEC, torch.device("cpu")), batch(counts), groups, block=16)
    assert sizes == (groups.size, 0, 0)
    assert len(flat) == sizes.size


def test_rings_that_are_alike_are_laid_as_any_others_and_the_rest_see_nothing() -> None:
    """Batch after batch into the same tables, with fewer rings and other places than the one before."""
    slab = Slab(SPEC, torch.device("cpu"))
    sizes = TableSizes(8, 8, 16)
    alike = AlikeRings(sizes)
    of = sizes.split(alike.flat)
    for number in (3, 1, 2, 3):
        asked = batch((2,) * number)
        groups = np.random.default_rng(number).permutation(2 * number).reshape(2, number)
        alike.lay(slab, asked, groups.reshape(-1))
        want_sizes, want_flat = tables(slab, asked, groups, block=16)
        want = want_sizes.split(torch.from_numpy(want_flat))
        assert torch.equal(of.rings[: 2 * number], want.rings)
        assert torch.equal(of.blocks[: 2 * number], want.blocks)
        assert torch.equal(of.query_rings[: 4 * number], want.query_rings)
        assert not of.rings[2 * number :].any()
        left = torch.arange(2 * number, 8)
        assert not of.blocks[2 * number :, : Block.FIRST_QUERY].any()
        assert torch.equal(of.blocks[2 * number :, Block.FIRST_QUERY], left * 2)
        assert torch.equal(of.blocks[2 * number :, Block.RING], left)
        assert torch.equal(of.query_rings[4 * number :], left.repeat_interleave(2))


def test_fields_of_a_reply_do_not_meet_and_are_aligned() -> None:
    fields = {"a": Field(torch.int64, (3,)), "b": Field(torch.float16, (5, 7)), "c": Field(torch.int32, (1, 4))}
    room = ReplyRoom(fields)
    flat = torch.zeros(room.num_bytes, dtype=torch.uint8)
    for name, field in fields.items():
        view = room.view(flat, name)
        assert (view.dtype, tuple(view.shape)) == field
        assert (view.data_ptr() - flat.data_ptr()) % ALIGNMENT == 0
    room.view(flat, "a").fill_(-1)
    assert not room.view(flat, "b").any()
    assert room.view(flat.clone(), "a").tolist() == [-1, -1, -1]
    room.view(flat, "b").copy_(torch.arange(35).view(5, 7))
    begins = room.begins(flat, {"a": (2,), "b": (2, 7), "c": (0, 4)})
    assert begins["a"].tolist() == [-1, -1]
    assert begins["b"].tolist() == torch.arange(14.0).view(2, 7).tolist()
    assert begins["c"].shape == (0, 4)
    assert all(begins[name].is_contiguous() for name in fields)


@pytest.mark.parametrize("dim", [1, 8, 16, 24, 64, 100, 256, 257, 512, 4096])
@pytest.mark.parametrize("most", [0, 1, 16, 17, 64, 100, 128, 129, 5000])
@pytest.mark.parametrize("rows", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scan_has_the_shape_that_its_kernel_needs(
    dim: int, most: int, rows: torch.dtype, queries: torch.dtype
) -> None:
    shape = scan_shape(dim, rows, queries, most)
    assert shape.queries >= 16
    assert shape.dims >= 16
    assert shape.dims & (shape.dims - 1) == 0
    assert shape.slots % 64 == 0
    assert 512 % shape.slots == 0
    part_bytes = rows.itemsize * shape.dims
    in_shared_memory = part_bytes * (shape.queries * max(shape.parts, 1) + shape.slots * shape.stages)
    assert in_shared_memory <= 227 << 10
