"""attach: what a memory changes in a model, and what it leaves as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from models import FAMILIES, VOCABULARY, SlowMemory, random_weights, tiny_config, tiny_model

from integration.attach import attach
from integration.errors import AttachError
from integration.families import UnknownFamily, find_decoder

if TYPE_CHECKING:
    from torch import nn

    from integration.attach import AttachedMemory
    from model_client import MemoryClient

SEGMENT = 16

pytestmark = pytest.mark.usefixtures("each_device")


def _text(batch: int = 1, length: int = 4 * SEGMENT, seed: int = 3) -> torch.Tensor:
    """Tokens that repeat themselves, so that looking back pays."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(3, VOCABULARY, (batch, 23), generator=generator, device="cpu").to(torch.get_default_device())
    return part.repeat(1, -(-length // 23))[:, :length]


@torch.inference_mode()
def _logits(model: nn.Module, text: torch.Tensor, *, use_cache: bool = False) -> torch.Tensor:
    """Logits of a text read segment by segment."""
    parts = text.split(SEGMENT, dim=1)
    return torch.cat([model(input_ids=part, use_cache=use_cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_off_is_bit_equal_before_within_and_after(family: str, client: MemoryClient) -> None:
    model, text = tiny_model(family), _text()
    config = tiny_config(model)
    before = _logits(model, text)
    with attach(model, client, config, random_weights(model, config)) as memory:
        on = _logits(model, text)
        memory.enabled = False
        within = _logits(model, text)
    assert torch.equal(before, within)
    assert torch.equal(before, _logits(model, text))
    assert torch.equal(before[:, :SEGMENT], on[:, :SEGMENT])  # nothing was remembered yet
    assert not torch.allclose(before[:, SEGMENT:], on[:, SEGMENT:], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_weights_change_nothing(family: str, client: MemoryClient) -> None:
    model, text = tiny_model(family), _text()
    before = _logits(model, text)
    with attach(model, client, tiny_config(model)) as memory:
        torch.testing.assert_close(_logits(model, text), before)
        assert memory.stats.steps_with_memory == 4
        assert memory.stats.steps_without_memory == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_on_equals_lists_and_loops(family: str, client: MemoryClient) -> None:
    model, text = tiny_model(family), _text()
    config = tiny_config(model, capacity=24)
    weights = random_weights(model, config)
    slow = SlowMemory(model, config, weights)
    expected = _logits(model, text)
    slow.remove()
    with attach(model, client, config, weights):
        torch.testing.assert_close(_logits(model, text), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 1, "before": 0, "after": 0},
        {"context": 3, "before": 2, "after": 2},
        {"retrieval_layer": 1, "attention_layers": (1, 2), "null_slot": False},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 12, "dim": 12},
    ],
)
def test_every_shape_equals_lists_and_loops(changes: dict[str, int], client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text()
    config = tiny_config(model, **changes)
    weights = random_weights(model, config)
    slow = SlowMemory(model, config, weights)
    expected = _logits(model, text)
    slow.remove()
    with attach(model, client, config, weights):
        torch.testing.assert_close(_logits(model, text), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_equals_one_forward(family: str, client: MemoryClient) -> None:
    """A segment is remembered; the next is read in one forward, and token by token with the key-value cache."""
    model, text = tiny_model(family), _text(length=2 * SEGMENT)
    config = tiny_config(model)
    first, second = text.split(SEGMENT, dim=1)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        memory.new_documents(["whole"])
        memory.read(first)
        whole = model(input_ids=second, use_cache=False).logits
        memory.new_documents(["pieces"])
        memory.read(first)
        past, pieces = None, []
        for part in second.split([5, *[1] * (SEGMENT - 5)], dim=1):
            answer = model(input_ids=part, past_key_values=past, use_cache=True)
            past, pieces = answer.past_key_values, [*pieces, answer.logits]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_generate_equals_greedy_forwards(client: MemoryClient) -> None:
    """Over several segments of new tokens, with rows leaving for the memory while their keys are still cached."""
    model, text = tiny_model("llama"), _text(length=20)
    config = tiny_config(model)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        memory.new_documents(["greedy"])
        past, read, greedy = None, text, text
        for _ in range(30):
            answer = model(input_ids=read, past_key_values=past, use_cache=True)
            past, read = answer.past_key_values, answer.logits[:, -1:].argmax(dim=-1)
            greedy = torch.cat([greedy, read], dim=1)
        memory.new_documents(["generated"])
        generated = model.generate(text, **settings)
        assert torch.equal(generated, greedy)
        assert memory.stats.appended_rows >= 2 * 3 * SEGMENT
        chunked = model.generate(text, prefill_chunk_size=SEGMENT, **settings)
        memory.enabled = False
        assert not torch.equal(model.generate(text, **settings), generated)
    assert chunked.shape == generated.shape


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "opt", "gptj", "gpt_neox"])
def test_padding_changes_nothing(family: str, side: str, client: MemoryClient) -> None:
    """Rows of 16 and 11 tokens, twice over, equal the same rows read alone."""
    model, text = tiny_model(family), _text(batch=2, length=2 * SEGMENT)
    config = tiny_config(model)
    alone = []
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        for row, length in enumerate((16, 11)):
            memory.new_documents([f"alone-{row}"])
            parts = [text[row : row + 1, begin : begin + length] for begin in (0, SEGMENT)]
            alone.append([model(input_ids=part, use_cache=False).logits[0] for part in parts])
        memory.new_documents(["padded-0", "padded-1"])
        for number, begin in enumerate((0, SEGMENT)):
            part = text[:, begin : begin + SEGMENT].clone()
            mask = torch.ones_like(part)
            pads, tokens = (slice(0, 5), slice(5, 16)) if side == "left" else (slice(11, 16), slice(0, 11))
            part[1, tokens] = text[1, begin : begin + 11]
            part[1, pads], mask[1, pads] = 0, 0
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(input_ids=part, attention_mask=mask, position_ids=places, use_cache=False).logits
            torch.testing.assert_close(logits[0], alone[0][number], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(logits[1, tokens], alone[1][number], rtol=1e-3, atol=1e-3)
        described = client.describe_memory(config.memory)
    assert described.status.appended_rows == 2 * 2 * (16 + 11)


def test_hooks_are_gone_after_an_exception(client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text()
    config = tiny_config(model)
    before = _logits(model, text)
    with pytest.raises(KeyError), attach(model, client, config, random_weights(model, config)):
        _logits(model, text)
        raise KeyError
    assert torch.equal(before, _logits(model, text))
    assert _hooks(model) == 0
    with attach(model, client, config):
        assert _hooks(model) > 0


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_model_takes_one_memory_at_a_time(client: MemoryClient) -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    with attach(model, client, config), pytest.raises(AttachError, match="attached already"):
        attach(model, client, config).__enter__()
    with attach(model, client, config):
        pass


def test_another_batch_size_is_refused(client: MemoryClient) -> None:
    model = tiny_model("llama")
    with attach(model, client, tiny_config(model)) as memory:
        _logits(model, _text(batch=2))
        with pytest.raises(AttachError, match="3 rows, the memory 2 sequences"):
            _logits(model, _text(batch=3))
        memory.new_documents(["a", "b", "c"])
        _logits(model, _text(batch=3))
        with pytest.raises(AttachError, match="max_sequences=4"):
            memory.new_documents(list("abcde"))
        with pytest.raises(AttachError, match="each another one"):
            memory.new_documents(["a", "a"])


def test_rows_begin_new_documents_on_their_own(client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text(batch=2)
    config = tiny_config(model)
    with attach(model, client, config, random_weights(model, config)) as memory:
        first = _logits(model, text)
        memory.new_documents(rows=[1])
        again = _logits(model, text)
    torch.testing.assert_close(again[1], first[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(again[0], first[0], atol=1e-3)


def test_named_sequences_are_read_on_and_unnamed_ones_released(client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text()
    config = tiny_config(model)
    weights = random_weights(model, config)
    with attach(model, client, config, weights) as memory:
        fresh = _logits(model, text)
        assert len(memory.sequences) == 1
    assert client.describe_memory(config.memory).status.num_sequences == 0
    with attach(model, client, config, weights, sequences=["kept"]):
        torch.testing.assert_close(_logits(model, text), fresh)
    with attach(model, client, config, weights, sequences=["kept"]):
        assert not torch.allclose(_logits(model, text)[:, :SEGMENT], fresh[:, :SEGMENT], atol=1e-3)


def test_another_document_is_read_and_left_as_it_is(client: MemoryClient) -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    with attach(model, client, config, random_weights(model, config)) as memory:
        memory.new_documents(["own", "other"])
        _logits(model, _text(batch=2))
        own = _next(model, memory)
        with memory.reading(["other", "own"]):
            swapped = _next(model, memory)
            torch.testing.assert_close(_next(model, memory), swapped)
        rows = memory.stats.appended_rows
        memory.read_only = True
        torch.testing.assert_close(_next(model, memory), _next(model, memory), rtol=1e-4, atol=1e-4)
        assert memory.stats.appended_rows == rows
    assert not torch.allclose(own, swapped, atol=1e-3)


def _next(model: nn.Module, memory: AttachedMemory) -> torch.Tensor:
    """Logits of one more segment, without the context that earlier answers give to its first token."""
    memory._carries.clear()
    return _logits(model, _text(batch=2, length=SEGMENT, seed=5))


def test_the_trace_tells_positions_and_mass(client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text()
    config = tiny_config(model)
    with attach(model, client, config, random_weights(model, config)) as memory:
        plain = _logits(model, text)
        assert memory.last_trace is None
        memory.new_documents(["traced"])
        memory.is_tracing = True
        torch.testing.assert_close(_logits(model, text), plain)
        trace = memory.last_trace
    assert trace is not None
    assert trace.counts == (SEGMENT,)
    assert trace.positions.shape == trace.mass.shape == (SEGMENT, 2 * 3 * 2)
    assert trace.positions.max() < 3 * SEGMENT
    assert (trace.mass[trace.positions < 0] == 0).all()
    assert 0 < trace.mass.sum(dim=1).min()


def test_models_that_are_none_are_refused() -> None:
    with pytest.raises(UnknownFamily, match="no transformers configuration"):
        find_decoder(torch.nn.Linear(2, 2))


def test_a_cached_forward_appends_when_its_keys_are_gone(client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text()
    config = tiny_config(model)
    weights = random_weights(model, config)
    with attach(model, client, config, weights) as memory:
        plain = _logits(model, text)
        memory.new_documents(["cached"])
        torch.testing.assert_close(_logits(model, text, use_cache=True), plain)
        assert client.describe_memory(config.memory).status.appended_rows == 4 * SEGMENT + 3 * SEGMENT
        memory.flush()
        assert client.describe_memory(config.memory).status.appended_rows == 8 * SEGMENT
