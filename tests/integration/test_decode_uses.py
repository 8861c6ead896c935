"""Whatever is done with an attached model, in whatever order, gives the same with decode loops and without them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import VOCABULARY, random_weights, tiny_config, tiny_model
from transformers import DynamicCache

from integration import loops
from integration.attach import attach
from integration.errors import AttachError
from model_client import MemoryClient, Retrieval

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from integration import AttachedMemory, MemoryConfig

BATCH, NUM_USES = 2, 60


class Uses:
    """A model in use. found: all that was seen of it; num_looped: uses after which a loop was under way."""

    def __init__(self, seed: int, model: nn.Module, client: MemoryClient, memory: AttachedMemory) -> None:
        self.found: list[Any] = []
        self.num_looped = 0
        self._chance = random.Random(seed)
        self._numbers = torch.Generator().manual_seed(seed)
        self._model, self._client, self._memory = model, client, memory
        self._begin()

    def run(self) -> None:
        """Does this and that, mostly decoding."""
        others: list[Callable[[], None]] = [
            self._decode_two,
            self._decode_embedded,
            self._crop,
            self._begin_documents,
            self._flush,
            self._read_text,
            self._without_memory,
            self._read_only,
            self._trace,
            self._append_beside,
            self._reset_beside,
            self._drop_memory,
            self._read_others,
            self._padded_prompt,
        ]
        self._decode(5)
        for _ in range(NUM_USES):
            use = self._chance.choice([self._decode_some, self._chance.choice(others)])
            use()
            loop = self._memory._loops.loop  # it has no outer sign
            self.num_looped += loop is not None and loop.num_passes > 0
        self._flush()
        self._look_into()

    def _begin(self) -> None:
        self._past = DynamicCache(config=self._model.config)
        self._mask = torch.ones(BATCH, 0, dtype=torch.long)

    def _tokens(self, length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (BATCH, length), generator=self._numbers)

    def _decode(self, length: int, padding: int = 0, is_embedded: bool = False) -> None:
        tokens, part = self._tokens(length), torch.ones(BATCH, length, dtype=torch.long)
        part[0, :padding] = 0
        mask = torch.cat([self._mask, part], 1)
        given: dict[str, Any] = {"input_ids": tokens}
        if is_embedded:
            given = {"inputs_embeds": self._model.get_input_embeddings()(tokens)}
        if not mask.all() or self._chance.random() < 0.5:
            given["attention_mask"] = mask
        try:
            logits = self._model(past_key_values=self._past, use_cache=True, **given).logits
        except AttachError:
            self.found.append("refused")
            self._begin()
        else:
            self.found.append(logits[:, -1])
            self._mask = mask

    def _decode_some(self) -> None:
        for _ in range(self._chance.randint(1, 6)):
            self._decode(1)

    def _decode_two(self) -> None:
        self._decode(2)

    def _decode_embedded(self) -> None:
        self._decode(1, is_embedded=True)

    def _padded_prompt(self) -> None:
        self._begin()
        self._decode(5, padding=self._chance.randint(0, 4))
        self._decode_some()

    def _crop(self) -> None:
        if self._past.get_seq_length() > 4:
            cropped = self._chance.choice([1, 1, 1, 2])
            self._past.crop(-cropped)
            self._mask = self._mask[:, :-cropped]
            self._decode(1)

    def _begin_documents(self) -> None:
        rows = self._chance.choice([None, [0], [1]])
        self._memory.new_documents(rows=rows)
        if rows is None:
            self._begin()

    def _flush(self) -> None:
        self._memory.flush()

    def _read_text(self) -> None:
        self._memory.read(self._tokens(20))

    def _without_memory(self) -> None:
        self._memory.enabled = False
        self._decode(1)
        self._memory.enabled = True

    def _read_only(self) -> None:
        self._memory.read_only = True
        self._decode_some()
        self._memory.read_only = False

    def _trace(self) -> None:
        self._memory.is_tracing = True
        self._decode(1)
        self._memory.is_tracing = False
        trace = self._memory.last_trace
        self.found.append(trace if trace is None else trace.positions)

    def _append_beside(self) -> None:
        config = self._memory.config
        rows = torch.randn(2 * BATCH, config.dim, generator=self._numbers)
        self._client.session(config.memory, self._memory.sequences).append(rows, [2] * BATCH)

    def _reset_beside(self) -> None:
        self._client.reset(self._memory.config.memory, [self._memory.sequences[0]])

    def _drop_memory(self) -> None:
        self._client.drop_memory(self._memory.config.memory)
        self._decode(1)
        self._decode(1)

    def _read_others(self) -> None:
        with self._memory.reading(self._memory.sequences[::-1]):
            self._decode(1)

    def _look_into(self) -> None:
        config, stats = self._memory.config, self._memory.stats
        for name in self._memory.sequences:
            session = self._client.session(config.memory, [name])
            hits = session.retrieve(torch.zeros(1, config.dim), [1], Retrieval(config.capacity)).hits
            assert hits is not None
            self.found.append(hits.rows["key"])
        self.found.append((stats.steps_with_memory, stats.steps_without_memory, stats.appended_rows, stats.lost_rows))


def _uses(seed: int, model: nn.Module, config: MemoryConfig) -> Uses:
    weights = random_weights(model, config)
    with (
        MemoryClient(":memory:", timeout_s=20.0) as client,
        torch.inference_mode(),
        attach(model, client, config, weights) as memory,
    ):
        uses = Uses(seed, model, client, memory)
        uses.run()
    return uses


@pytest.mark.parametrize("seed", range(4))
def test_random_uses_give_the_same_with_loops_and_without(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    model = tiny_model("llama")
    config = tiny_config(
        model,
        context=chance.choice([1, 2, 3]),
        segment_length=chance.choice([4, 6, 16]),
        before=chance.choice([0, 1]),
        capacity=chance.choice([16, 64]),
    )
    monkeypatch.setattr(loops, "DEVICES", set())
    expected = _uses(seed, model, config)
    monkeypatch.setattr(loops, "DEVICES", {"cpu"})
    uses = _uses(seed, model, config)
    assert uses.num_looped > NUM_USES / 4
    assert not expected.num_looped
    for one, other in zip(uses.found, expected.found, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        else:
            assert one == other
