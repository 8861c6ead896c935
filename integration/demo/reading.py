"""One pass of a model over a long text, segment by segment: what each token cost, and what the memory was read for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from integration.attach import AttachedMemory
    from integration.trace import ReadTrace

BINS = 128
"""Stretches of text, and of its past, that the picture of what was read distinguishes."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a pass found.

    losses: (num_tokens - 1,) float32, nats, of every token but the first given those before it in its segment.
    seconds: wall time of the pass. retrieval_seconds: the part of it that the model spent waiting for the memory.
    """

    losses: np.ndarray
    seconds: float
    retrieval_seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(float(self.losses.mean(dtype=np.float64)))

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits that one byte of the text costs; num_bytes: UTF-8 length of the tokens that were scored."""
        return float(self.losses.sum(dtype=np.float64)) / math.log(2) / num_bytes


@dataclass(slots=True)
class ReadMap:
    """Which past positions each stretch of the text read. In this demo a position is the number of a token.

    mass: (BINS, BINS) float64, attention that stretch [row] gave to the past stretch [column].
    source: (num_tokens,) int64, the position that each token attended to most; -1 where there was none.
    share: (num_tokens,) float32, the attention that it gave to that position.
    """

    num_tokens: int
    mass: np.ndarray = field(init=False)
    source: np.ndarray = field(init=False)
    share: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mass = np.zeros((BINS, BINS))
        self.source = np.full(self.num_tokens, -1, dtype=np.int64)
        self.share = np.zeros(self.num_tokens, dtype=np.float32)

    def add(self, start: int, trace: ReadTrace) -> None:
        """Counts what the tokens from `start` on read: positions and mass are both (tokens, entries), -1 for none."""
        positions, mass = trace.positions.numpy(), trace.mass.numpy()
        tokens = np.arange(start, start + len(positions))
        best = mass.argmax(axis=1)
        rows = np.arange(len(positions))
        self.source[tokens] = positions[rows, best]
        self.share[tokens] = mass[rows, best]
        is_read = positions >= 0
        stretch = np.broadcast_to((tokens * BINS // self.num_tokens)[:, None], positions.shape)[is_read]
        np.add.at(self.mass, (stretch, positions[is_read] * BINS // self.num_tokens), mass[is_read])


def read(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    segment_length: int,
    on_tokens: Callable[[int], object],
    memory: AttachedMemory | None = None,
    read_map: ReadMap | None = None,
) -> Reading:
    """Reads `tokens` (num_tokens,) int64 in segments; on_tokens is told how many were read, each time.

    Every segment is a forward of its own without a key-value cache, so that all the model knows of earlier segments is
    what its memory gives back.
    """
    device = next(model.parameters()).device
    losses = np.empty(len(tokens) - 1, dtype=np.float32)
    waited = memory.stats.waited_s if memory else 0.0
    begin = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, segment_length):
            end = min(start + segment_length, len(tokens) - 1)
            logits = model(input_ids=tokens[None, start:end].to(device), use_cache=False).logits[0]
            targets = tokens[start + 1 : end + 1].to(device)
            losses[start:end] = functional.cross_entropy(logits.float(), targets, reduction="none").cpu().numpy()
            if memory and read_map and memory.last_trace:
                read_map.add(start, memory.last_trace)
            on_tokens(end - start)
    seconds = time.perf_counter() - begin
    return Reading(losses=losses, seconds=seconds, retrieval_seconds=memory.stats.waited_s - waited if memory else 0.0)
