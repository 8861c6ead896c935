"""Retrieval for few rings with one query each: three launches, and a fourth that makes the whole reply.

Beside `launch`, which does it for any batch, it spares what takes longer than the work itself where that is so little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from memstore.gpu import launch
from memstore.gpu.kernels.reply import reply_kernel
from memstore.gpu.launcher import can_chain, start
from memstore.gpu.tuning import power_of_two

if TYPE_CHECKING:
    from memstore.gpu.launch import Asked, Located
    from memstore.slab import Slab

MOST_RINGS = 128
"""Programs that wait for one another: all of them must be running at once."""

MOST_NEIGHBOURS = 64
"""Rows that a query's windows ask for, in whole powers of two: each is compared with each."""

_TILE = 4096


class Shared(NamedTuple):
    """What the programs of a reply tell one another, int32 of 0 before and after: published (R,), ticket (1,)."""

    published: torch.Tensor
    ticket: torch.Tensor


def is_few(asked: Asked) -> bool:
    """Whether one kernel can make the reply to this, every ring of which has as many queries as the others."""
    sizes = asked.sizes
    neighbours = power_of_two(asked.top_k) * power_of_two(asked.window)
    is_alone = sizes.num_queries == sizes.num_rings <= MOST_RINGS
    return is_alone and asked.window > 0 and neighbours <= MOST_NEIGHBOURS and launch.is_at_once(asked)


def shared_for(asked: Asked) -> Shared:
    """What `retrieve` needs, once."""
    zeros = torch.zeros(asked.sizes.num_rings + 1, dtype=torch.int32, device=asked.queries.device)
    return Shared(zeros[1:], zeros[:1])


def retrieve(
    slab: Slab, asked: Asked, shared: Shared, scores: torch.Tensor, located: Located, copies: dict[str, torch.Tensor]
) -> None:
    """Fills scores (Q, k), `located`, and each of `copies`: what is to have the rows of an array."""
    names = list(copies)
    scored = launch.score(slab, asked)
    source, target = (
        launch.in_words(slab.array(names[0]), copies[names[0]]) if names else (located.cells, located.cells)
    )
    num_words = source[0].numel() if names else 0
    window = power_of_two(asked.window)
    start(
        reply_kernel,
        (asked.sizes.num_queries,),
        asked.tables.rings,
        asked.tables.query_rings,
        scored.chosen,
        scored.scores,
        *shared,
        located.row_splits,
        located.positions,
        located.cells,
        located.index,
        scores,
        source,
        target,
        asked.sizes.num_rings,
        slab.capacity,
        asked.top_k,
        asked.window_before,
        asked.window,
        LEAVES=scored.num_leaves,
        TOP=asked.top,
        WINDOW=window,
        RINGS=max(power_of_two(asked.sizes.num_rings), 2),
        WORDS=num_words,
        BLOCK_W=max(min(power_of_two(num_words), _TILE // (asked.top * window)), 16),
        num_warps=4,
        is_chained=can_chain(slab.device),
    )
    for name in names[1:]:
        launch.gather(slab, name, located, copies[name])
