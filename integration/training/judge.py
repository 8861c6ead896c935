"""Judge: what a memory is worth on held-out documents: perplexity with it, without it, and with another document's."""

from __future__ import annotations

import contextlib
import math
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from integration.attach import attach

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from integration.config import MemoryConfig
    from integration.training.documents import Documents
    from integration.weights import MemoryWeights
    from model_client import MemoryClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Perplexity a token over the same held-out segments.

    with_memory: each row reads its own document's past. without_memory: the memory is off. other_document: each row
    reads the past of another row's document. late_*: the same over the last third of the segments, when memories are
    full. steps_without_memory: forwards whose rows did not come; 0 unless something was wrong.
    """

    tokens: int
    with_memory: float
    without_memory: float
    other_document: float
    late_with_memory: float
    late_without_memory: float
    late_other_document: float
    steps_without_memory: int

    @property
    def gain_ratio(self) -> float:
        """By what share of itself the memory lowers perplexity."""
        return 1.0 - self.with_memory / self.without_memory

    def as_dict(self) -> dict[str, float]:
        """The fields and the gain, by name."""
        return {**asdict(self), "gain_ratio": self.gain_ratio}


class Judge:
    """Fixed windows of held-out documents, one document a row, read in lockstep."""

    def __init__(self, documents: Documents, *, rows: int, segments: int, segment: int) -> None:
        """Takes `rows` evenly spaced documents that have so many segments; fewer and shorter where there are not.

        Raises ValueError where there are not two documents, or parts of documents, of two segments.
        """
        for wanted in range(segments, 1, -1):
            spans = documents.spans(wanted * segment + 1, wanted * segment + 1)
            if len(spans) >= min(rows, 2):
                break
        else:
            raise ValueError(f"--validation: two documents of {2 * segment + 1} tokens or more are needed")
        rows = min(rows, len(spans))
        chosen = [spans[number * len(spans) // rows] for number in range(rows)]
        self._segment = segment
        length = wanted * segment + 1
        self._windows = np.stack([documents.ids[begin : begin + length] for begin, _ in chosen]).astype(np.int64)

    @property
    def rows(self) -> int:
        """Documents that are read."""
        return len(self._windows)

    @torch.no_grad()
    def judge(self, model: nn.Module, weights: MemoryWeights, client: MemoryClient, config: MemoryConfig) -> Verdict:
        """Reads all documents three times over; the memory it makes for that is dropped again."""
        name = f"judge-{uuid.uuid4().hex[:12]}"
        config = config.with_changes(memory=name, max_sequences=self.rows, training_payload=False)
        device = next(model.parameters()).device
        windows = torch.from_numpy(self._windows).to(device)
        names = [f"document-{row}" for row in range(self.rows)]
        losses: dict[str, list[torch.Tensor]] = {"with_memory": [], "without_memory": [], "other_document": []}
        was_training = weights.training
        weights.eval()
        with attach(model, client, config, weights, sequences=names) as memory:
            for begin in range(0, windows.shape[1] - 1, self._segment):
                part = windows[:, begin : begin + self._segment + 1]
                memory.enabled = False
                losses["without_memory"].append(_loss(model, part))
                memory.enabled = True
                with memory.reading(names[1:] + names[:1]):
                    losses["other_document"].append(_loss(model, part))
                losses["with_memory"].append(_loss(model, part))
        client.drop_memory(name)
        weights.train(was_training)
        return self._verdict(losses, memory.stats.steps_without_memory)

    def _verdict(self, losses: dict[str, list[torch.Tensor]], steps_without_memory: int) -> Verdict:
        figures: dict[str, float] = {}
        for name, values in losses.items():
            series = torch.stack(values).double().cpu()
            figures[name] = math.exp(series.mean().item())
            figures[f"late_{name}"] = math.exp(series[-max(1, len(series) // 3) :].mean().item())
        tokens = self.rows * (self._windows.shape[1] - 1)
        return Verdict(tokens=tokens, steps_without_memory=steps_without_memory, **figures)


def _loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean loss of windows (batch, segment + 1), on the device."""
    with autocast(windows.device):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return next_token_loss(logits, windows)


def next_token_loss(logits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Mean nats of logits (batch, segment, vocabulary) over the tokens that follow, windows (batch, segment + 1)."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[Any]:
    """bf16 matrix products on CUDA; nothing elsewhere."""
    if device.type != "cuda":
        yield
        return
    with torch.autocast("cuda", torch.bfloat16):
        yield
