"""A key-value cache that is cropped or rearranged between two forwards: followed, or refused with a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import VOCABULARY, random_weights, tiny_config, tiny_model
from transformers import DynamicCache

from integration.attach import attach
from integration.errors import AttachError
from model_client import Retrieval

if TYPE_CHECKING:
    from model_client import MemoryClient

SEGMENT = 16

pytestmark = pytest.mark.usefixtures("each_device")


def _text(batch: int = 1, length: int = 2 * SEGMENT + 4) -> torch.Tensor:
    """Tokens that repeat themselves."""
    generator = torch.Generator().manual_seed(3)
    part = torch.randint(3, VOCABULARY, (batch, 7), generator=generator, device="cpu").to(torch.get_default_device())
    return part.repeat(1, -(-length // 7))[:, :length]


def _rows(client: MemoryClient, memory: str, name: str) -> torch.Tensor:
    """What a sequence holds, by position."""
    described = client.describe_memory(memory).spec
    session = client.session(memory, [name])
    hits = session.retrieve(torch.zeros(1, described.dim), [1], Retrieval(described.capacity)).hits
    assert hits is not None
    return hits.rows["key"].float().cpu()


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_assisted_decoding_equals_greedy_decoding(family: str, context: int, client: MemoryClient) -> None:
    """Candidates that are refused are cropped from the cache: no answer of theirs, and no row, is used."""
    model, text = tiny_model(family), _text()
    config = tiny_config(model, context=context, segment_length=64, capacity=128)
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        found = []
        for name, more in (("greedy", {}), ("assisted", {"prompt_lookup_num_tokens": 4})):
            memory.new_documents([name])
            memory.read(text)
            found.append(model.generate(text, **settings, **more))
            memory.flush()
        rows = [_rows(client, config.memory, name) for name in ("greedy", "assisted")]
    assert torch.equal(*found)
    assert len(rows[0]) == len(rows[1]) == 2 * text.shape[1] + 23
    torch.testing.assert_close(*rows, rtol=1e-2, atol=1e-2)


def test_candidates_that_are_refused_leave_no_rows(client: MemoryClient) -> None:
    """Over several segments, with rows leaving for the memory meanwhile."""
    model, text = tiny_model("llama"), _text()
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        model.generate(text, max_new_tokens=40, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=4)
        memory.flush()
        assert memory.stats.appended_rows == text.shape[1] + 39


@pytest.mark.parametrize("context", [1, 3])
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been(context: int, client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text(batch=2)
    config = tiny_config(model, context=context)
    first, second, wrong = text[:, :SEGMENT], text[:, SEGMENT : SEGMENT + 6], text[:, :5]
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        answers = []
        for is_cropped in (False, True):
            memory.new_documents([f"{is_cropped} {row}" for row in range(2)])
            memory.read(first)
            past = DynamicCache(config=model.config)
            model(input_ids=second[:, :3], past_key_values=past, use_cache=True)
            if is_cropped:
                model(input_ids=wrong, past_key_values=past, use_cache=True)
                past.crop(-5)
                model(input_ids=torch.cat([second[:, 3:4], wrong], dim=1), past_key_values=past, use_cache=True)
                past.crop(-5)
            else:
                model(input_ids=second[:, 3:4], past_key_values=past, use_cache=True)
            answers.append(model(input_ids=second[:, 4:], past_key_values=past, use_cache=True).logits)
            memory.flush()
            assert len(_rows(client, config.memory, f"{is_cropped} 1")) == SEGMENT + 6
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-3)


def test_beam_search_is_refused_while_the_memory_is_on(client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text(length=10)
    config = tiny_config(model)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    with torch.inference_mode():
        expected = model.generate(text, **settings)
        with attach(model, client, config, random_weights(model, config)) as memory:
            with pytest.raises(AttachError, match="beam search"):
                model.generate(text, **settings)
            memory.enabled = False
            assert torch.equal(model.generate(text, **settings), expected)


def test_a_cache_whose_rows_stay_in_their_order_is_taken(client: MemoryClient) -> None:
    model, text = tiny_model("llama"), _text(batch=2, length=12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)):
        past = DynamicCache(config=model.config)
        model(input_ids=text[:, :6], past_key_values=past, use_cache=True)
        past.reorder_cache(torch.tensor([0, 1]))
        model(input_ids=text[:, 6:8], past_key_values=past, use_cache=True)
        past.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(AttachError, match="beam search"):
            model(input_ids=text[:, 8:], past_key_values=past, use_cache=True)


def test_a_cache_that_another_text_filled_is_taken(client: MemoryClient) -> None:
    """Its tokens were read with the memory off: nothing is known of them, and nothing is missed."""
    model, text = tiny_model("llama"), _text(length=12)
    config = tiny_config(model)
    with torch.inference_mode(), attach(model, client, config, random_weights(model, config)) as memory:
        model(input_ids=text[:, :3], past_key_values=DynamicCache(config=model.config), use_cache=True)
        memory.enabled = False
        past = DynamicCache(config=model.config)
        model(input_ids=text[:, :6], past_key_values=past, use_cache=True)
        memory.enabled = True
        model(input_ids=text[:, 6:8], past_key_values=past, use_cache=True)
        memory.flush()
        assert memory.stats.appended_rows == 5
