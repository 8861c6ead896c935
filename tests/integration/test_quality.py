"""The quality benchmarks: what is trained is what the service runs, and policies of what is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from models import random_weights
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.attending import Read as ReadRows
from benchmarks.quality.attending import attend, later, sooner
from benchmarks.quality.memorizing import MemorizingWeights
from benchmarks.quality.network import Gathered, Network, NetworkSpec, merge_forward
from benchmarks.quality.policies import POLICIES, PolicyCache
from benchmarks.quality.reading import Variant, read
from benchmarks.quality.ring import Ring, exact_top, nearness, widen
from integration.adapter import Adapter, add_lora
from integration.config import MemoryConfig
from integration.weights import MemoryWeights

if TYPE_CHECKING:
    from model_client import MemoryClient

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name of older versions

VOCABULARY, SEGMENT, CAPACITY = 64, 16, 64


def _model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _config(model: LlamaForCausalLM) -> MemoryConfig:
    changes: dict[str, Any] = {"retrieval_layer": 1, "attention_layers": (1, 2), "dim": 16, "top_k": 4, "after": 1}
    return MemoryConfig.for_model(model, capacity=CAPACITY, context=1, segment_length=SEGMENT, dtype="fp32", **changes)


def _windows(length: int = 12 * SEGMENT) -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCABULARY, (2, length + 1))


def _through_network(network: Network, windows: np.ndarray) -> np.ndarray:
    network.make_ring(len(windows), SEGMENT, torch.float32)
    parts = [windows[:, begin : begin + SEGMENT + 1] for begin in range(0, windows.shape[1] - 1, SEGMENT)]
    with torch.no_grad():
        return torch.cat([network.losses(torch.from_numpy(part)) for part in parts], dim=1).numpy()


def test_what_is_trained_is_what_the_service_runs(client: MemoryClient) -> None:
    model = _model()
    config = _config(model)
    weights = random_weights(model, config)
    network = Network(_model(), NetworkSpec(kind="memory", config=config, lora_rank=0))
    network.weights.load_state_dict(weights.state_dict())
    trained = _through_network(network, _windows())
    variant = Variant(model, {"segment": SEGMENT}, Adapter(config, weights.eval()))
    served = read(variant, _windows(), capacity=CAPACITY, client=client)
    without = read(variant, _windows())
    assert np.abs(served.losses - without.losses).max() > 0.05
    np.testing.assert_allclose(trained, served.losses, atol=2e-3)


def test_memorizing_transformers_are_trained_as_the_service_runs_them(client: MemoryClient) -> None:
    model = _model()
    config = replace(_config(model), top_k=4)
    network = Network(_model(), NetworkSpec(kind="mt", config=config, lora_rank=0))
    torch.nn.init.constant_(network.weights.gate, 1.0)
    own = MemorizingWeights(model.model.layers[1].self_attn)
    own.load_state_dict(network.weights.state_dict())
    network.make_ring(2, SEGMENT)
    parts = [_windows()[:, begin : begin + SEGMENT + 1] for begin in range(0, 12 * SEGMENT, SEGMENT)]
    with torch.no_grad():
        trained = torch.cat([network.losses(torch.from_numpy(part)) for part in parts], dim=1).numpy()
    variant = Variant(model, {"segment": SEGMENT, "layer": 1, "top_k": 4}, memorizing=own)
    served = read(variant, _windows(), capacity=CAPACITY, client=client)
    without = read(variant, _windows())
    assert np.abs(served.losses - without.losses).max() > 0.01
    assert np.abs(trained - served.losses).mean() < 2e-3  # both keep bf16; a tie may fall otherwise


def test_another_documents_memory_is_read_without_being_filled(client: MemoryClient) -> None:
    model = _model()
    config = _config(model)
    variant = Variant(model, {"segment": SEGMENT}, Adapter(config, random_weights(model, config).eval()))
    windows = _windows()
    same = np.stack([windows[0], windows[0]])
    own = read(variant, same, capacity=CAPACITY, client=client)
    other = read(variant, same, capacity=CAPACITY, client=client, other=True)
    np.testing.assert_allclose(own.losses, other.losses, atol=1e-4)  # another document that is the same one
    assert (
        np.abs(read(variant, windows, capacity=CAPACITY, client=client, other=True).losses[0] - own.losses[0]).max()
        > 0.01
    )


@pytest.mark.parametrize("columns", [64 * 5, 64 * 40, 100])
def test_top_by_tiles_is_exact(columns: int) -> None:
    scores = torch.randn(3, 7, columns)
    assert torch.equal(exact_top(scores, 5), scores.topk(5, dim=-1).indices)


def test_nearness_is_half_the_negative_squared_distance_and_nothing_where_empty() -> None:
    queries, kept = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    kept = torch.nn.functional.layer_norm(kept, (16,))
    queries = torch.nn.functional.layer_norm(queries, (16,))
    is_empty = torch.zeros(2, 9, dtype=torch.bool)
    is_empty[1, 4:] = True
    found = nearness(queries, kept, is_empty)
    wanted = (torch.cdist(queries, kept).square() / -2).masked_fill(is_empty[:, None], float("-inf"))
    assert torch.allclose(found, wanted, atol=1e-3)


def test_later_and_sooner_undo_each_other_within() -> None:
    values = torch.arange(1, 6).view(1, 5, 1).float()
    assert later(values, 2).flatten().tolist() == [0, 0, 1, 2, 3]
    assert sooner(values, 2).flatten().tolist() == [3, 4, 5, 0, 0]
    assert later(values, 0) is values


@pytest.mark.parametrize("context", [1, 2, 3])
def test_attention_over_rows_that_are_not_copied_is_that_over_copies(context: int) -> None:
    config = replace(_config(_model()), context=context, after=2)
    attention = random_weights(_model(), config).cache_attention(2)
    rows, is_live = torch.randn(2, 7, 12, config.dim, requires_grad=True), torch.rand(2, 7, 12) > 0.3
    keys, hidden = torch.randn(2, 7, config.dim), torch.randn(2, 7, 32)
    found = attend(attention, hidden, ReadRows(rows, is_live, keys, context))
    copied, live = widen(rows.masked_fill(~is_live[..., None], 0.0), is_live, context)
    entries = torch.where(live, 0, -1).flatten(0, 1)
    wanted = attention(hidden.flatten(0, 1), Gathered(copied.flatten(0, 1), entries, keys.flatten(0, 1)))
    assert torch.allclose(found.flatten(0, 1), wanted, atol=1e-4)
    ours, theirs = (torch.autograd.grad(each.square().sum(), rows, retain_graph=True)[0] for each in (found, wanted))
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_heads_with_hits_of_their_own_begin_as_one_retrieval_for_all() -> None:
    model = _model()
    config = replace(_config(model), context=2)
    weights, found = random_weights(model, config), []
    for kind in ("memory", "heads"):
        network = Network(_model(), NetworkSpec(kind=kind, config=config, lora_rank=0))
        network.weights.load_state_dict(weights.state_dict())
        network.part_heads()
        found.append(_through_network(network, _windows()))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert len(network.weights) == config.num_heads


def test_a_lora_layer_in_one_product_is_the_same() -> None:
    adapted = add_lora(_model(), 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.from_numpy(_windows(20))
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        merge_forward(adapted)
        assert torch.allclose(adapted(input_ids=ids).logits, before, atol=1e-4)


def test_a_ring_gives_neighbours_by_position_and_none_beyond_its_ends() -> None:
    ring = Ring(1, 8, 4, {"hidden": (1,)}, device="cpu")
    for begin in range(0, 12, 4):
        ring.append(hidden=torch.arange(begin, begin + 4).view(1, 4, 1).float())
    places, is_live = ring.neighbours(torch.tensor([[[3, 4]]]), 1, 1)  # positions 11 and 4 of 4..11
    assert is_live.tolist() == [[[[True, True, False], [False, True, True]]]]
    assert ring.hidden[0, places[0, 0, 0, :2], 0].tolist() == [10.0, 11.0]
    ring.begin(torch.tensor([True]))
    assert ring.is_empty().all()


def _positions(policy: str, *, hits: tuple[int, ...] = ()) -> set[int]:
    """What is kept of 12 rows in 8 places when row 9 onwards came; hits: positions hit before those."""
    cache = PolicyCache(policy, 1, 8, 4, 64, "cpu")
    rows = torch.nn.functional.normalize(torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    cache.append(rows[:, :8])
    if hits:
        slots = torch.tensor([[int(cache.slots[0, each]) for each in hits]])
        cache.credit(slots, torch.ones(1, len(hits)))
    cache.append(rows[:, 8:])
    return set(cache.positions[0].tolist())


def test_policies_keep_what_they_say() -> None:
    newest = {8, 9, 10, 11}
    assert _positions("fifo") == {4, 5, 6, 7} | newest
    assert _positions("lru", hits=(0, 1)) == {0, 1, 6, 7} | newest
    assert {0, 1} <= _positions("attention", hits=(0, 1))
    for policy in POLICIES:
        kept = _positions(policy)
        assert newest <= kept
        assert len(kept) == 8
    assert _positions("random") == _positions("random")


def test_a_duplicate_leaves_first() -> None:
    cache = PolicyCache("duplicates", 1, 8, 8, 64, "cpu")
    cache.append(torch.eye(8)[None])
    cache.append(torch.eye(8)[None, 2:4] * 1.0)
    assert set(cache.positions[0].tolist()) == {0, 1, 4, 5, 6, 7, 8, 9}


def test_weights_begin_as_their_layers_read() -> None:
    model = _model()
    config = replace(_config(model), dim=32, head_dim=8, num_kv_heads=2)
    weights = MemoryWeights.for_model(model, config)
    states = torch.randn(512, 32)
    weights.fit(model, states)
    layer = model.model.layers[2]
    wanted = layer.self_attn.v_proj(layer.input_layernorm(states - states.mean(dim=0)))
    own = weights.cache_attention(2)
    found = own.v_proj(weights.projection(states))
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.98
    assert 0.9 < (found.norm() / wanted.norm()).item() < 1.1
    assert not own.o_proj.weight.any()
