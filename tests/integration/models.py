"""Tiny random models of every family, and a slow reading of memory to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from integration.config import MemoryConfig
from integration.families import FAMILIES as SUPPORTED
from integration.families import find_decoder
from integration.weights import MemoryWeights

if TYPE_CHECKING:
    from model_client.cache_attention import CacheAttention

VOCABULARY = 64
LAYERS = 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "head_dim": 16},
    "mistral": {**_GROUPED, "sliding_window": None},
    "qwen2": {**_GROUPED},
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GROUPED, "head_dim": 16, "attn_implementation": "eager"},
    "gemma3_text": {**_GROUPED, "head_dim": 16},
    "olmo2": {**_GROUPED},
    "phi3": {**_GROUPED},
    "mixtral": {**_GROUPED, "num_local_experts": 2},
    "qwen2_moe": {
        **_GROUPED,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
    "starcoder2": {**_GROUPED},
    "phi": {**_COMMON},
    "gpt_neox": {**_COMMON},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gptj": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 256,
        "rotary_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
FAMILIES = tuple(CONFIGS)
assert set(FAMILIES) == set(SUPPORTED)


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    """A random model of a family, in eval mode."""
    torch.manual_seed(seed)
    given = dict(CONFIGS[family])
    implementation = given.pop("attn_implementation", None)
    config = AutoConfig.for_model(family, **given)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than fresh weights, so that what attention adds shows
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def tiny_config(model: nn.Module, **changes: Any) -> MemoryConfig:
    """A configuration whose segments, hits and rings are small."""
    defaults = {"top_k": 3, "capacity": 64, "segment_length": 16, "max_sequences": 4, "dtype": "fp32", "dim": 8}
    return MemoryConfig.for_model(model, **(defaults | {"deadline_s": 20.0} | changes))


def random_weights(model: nn.Module, config: MemoryConfig, seed: int = 1) -> MemoryWeights:
    """Weights that read their memory with a vengeance."""
    torch.manual_seed(seed)
    weights = MemoryWeights.for_model(model, config)
    with torch.no_grad():
        for name, parameter in weights.named_parameters():
            if name.startswith("layers."):
                parameter.normal_(std=0.3)
    return weights.eval()


def slow_read(
    attention: CacheAttention, state: torch.Tensor, key: torch.Tensor, slots: list[torch.Tensor | None]
) -> torch.Tensor:
    """What a token reads, by loops: state (hidden_size,), key (d,), a row (d,) or None a slot, (c, k, w)."""
    sizes = attention.sizes
    hits = len(slots) // (sizes.context * sizes.window)
    query = attention.q_proj(state).view(sizes.num_heads, sizes.head_dim)
    heads = []
    for head in range(sizes.num_heads):
        group = head * sizes.num_kv_heads // sizes.num_heads
        logits, values = [], []
        if attention.null_logit is not None:
            logits, values = [attention.null_logit[head]], [torch.zeros(sizes.head_dim)]
        for number, row in enumerate(slots):
            if row is None:
                continue
            place, neighbour = number // (hits * sizes.window), number % sizes.window
            slot_key = attention.k_proj(row).view(sizes.num_kv_heads, -1)[group]
            logit = query[head] @ slot_key * sizes.head_dim**-0.5
            logit = logit + attention.similarity[head] * (key @ row) * sizes.dim**-0.5
            logits.append(logit + attention.slot_bias[head, place, neighbour])
            values.append(attention.v_proj(row).view(sizes.num_kv_heads, -1)[group])
        if logits:
            shares = torch.softmax(torch.stack(logits), dim=0)
            heads.append((shares[:, None] * torch.stack(values)).sum(dim=0))
        else:
            heads.append(torch.zeros(sizes.head_dim))
    return attention.o_proj(torch.cat(heads))


class SlowMemory:
    """A memory of one sequence as lists and loops, hooked into a model that reads one text at a time."""

    def __init__(self, model: nn.Module, config: MemoryConfig, weights: MemoryWeights) -> None:
        self.config = config
        self.weights = weights
        self.rows: list[torch.Tensor] = []
        self.answers: list[list[torch.Tensor | None]] = []
        decoder = find_decoder(model)
        self.handles = [
            decoder.layers[config.retrieval_layer].register_forward_pre_hook(self.look_up, with_kwargs=True)
        ]
        for layer in config.attention_layers:
            hook = self.reader(weights.cache_attention(layer))
            self.handles.append(decoder.attention(layer).register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def look_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Every token asks what was there before the segment; then all of them are kept."""
        states = (args[0] if args else kwargs["hidden_states"])[0]
        self.keys = list(self.weights.projection(states))
        self.first = len(self.answers)
        live = range(max(0, len(self.rows) - self.config.capacity), len(self.rows))
        for key in self.keys:
            nearest = sorted(live, key=lambda position: float(((self.rows[position] - key) ** 2).sum()))
            slots: list[torch.Tensor | None] = []
            for rank in range(self.config.top_k):
                for offset in range(-self.config.before, self.config.after + 1):
                    place = nearest[rank] + offset if rank < len(nearest) else -1
                    slots.append(self.rows[place] if place in live else None)
            self.answers.append(slots)
        self.rows += self.keys

    def reader(self, attention: CacheAttention) -> Any:
        """The hook of one attention layer."""

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            states = (args[0] if args else kwargs["hidden_states"])[0]
            added = []
            for number, (state, key) in enumerate(zip(states, self.keys, strict=True)):
                slots: list[torch.Tensor | None] = []
                for back in range(self.config.context):
                    token = self.first + number - back
                    empty: list[torch.Tensor | None] = [None] * (self.config.top_k * self.config.window)
                    slots += self.answers[token] if token >= 0 else empty
                added.append(slow_read(attention, state, key, slots))
            return (output[0] + torch.stack(added)[None], *output[1:])

        return read
