"""Model families: where a decoder of each keeps its layers, its attention and its query projection.

A new family is one line of FAMILIES, by the `model_type` of its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from integration.families.queries import fused_first, fused_per_head, own_projection

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class UnknownFamily(ValueError):
    """The model is no decoder that memstore knows how to attach to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The names of one family's parts.

    layers: the list of layers within the decoder. attention: the self-attention within a layer; it takes its hidden
    states first or by that name, and gives its output alone or first.
    queries: the weight (heads * head_dim, hidden_size) and bias of the query projection of an attention.
    feed_forward: linear parts of the feed-forward block, for LoRA.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    queries: Callable[[nn.Module, int, int], tuple[torch.Tensor, torch.Tensor | None]] = own_projection
    feed_forward: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")


_LLAMA_LIKE = Family()
_TWO_LINEAR = Family(feed_forward=("fc1", "fc2"))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "olmo2"), _LLAMA_LIKE),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _LLAMA_LIKE),
    **dict.fromkeys(("opt", "phi"), _TWO_LINEAR),
    "mixtral": Family(feed_forward=()),
    "qwen3_moe": Family(feed_forward=()),
    "starcoder2": Family(feed_forward=("c_fc", "c_proj")),
    "phi3": Family(queries=fused_first("qkv_proj"), feed_forward=("gate_up_proj", "down_proj")),
    "gptj": Family(layers="h", attention="attn", feed_forward=("fc_in", "fc_out")),
    "gpt_neox": Family(
        attention="attention",
        queries=fused_per_head("query_key_value"),
        feed_forward=("dense_h_to_4h", "dense_4h_to_h"),
    ),
}
"""model_type -> family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The part of a model that runs the layers, and its sizes."""

    module: nn.Module
    layers: nn.ModuleList
    family: Family
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_cache_default: bool

    def attention(self, layer_idx: int) -> nn.Module:
        """The self-attention of a layer."""
        attention: nn.Module = getattr(self.layers[layer_idx], self.family.attention)
        return attention

    def query_projection(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (num_heads * head_dim, hidden_size) and bias of a layer's query projection; views, not copies."""
        return self.family.queries(self.attention(layer_idx), self.num_heads, self.head_dim)

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass runs layers again (gradient checkpointing)."""
        return self.module.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder within a model, wrapped by a head, by peft or by nothing. Raises UnknownFamily."""
    given: Any = getattr(model, "config", None)
    if given is None or not hasattr(given, "get_text_config"):
        raise UnknownFamily(f"{type(model).__name__} has no transformers configuration")
    config = given.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnknownFamily(f"model_type {config.model_type!r} is not among {sorted(FAMILIES)}")
    for module in model.modules():
        layers = getattr(module, family.layers, None)
        if isinstance(layers, nn.ModuleList) and len(layers) and hasattr(layers[0], family.attention):
            return _decoder(module, layers, family, config)
    raise UnknownFamily(f"{type(model).__name__} has no list {family.layers!r} of layers with {family.attention!r}")


def _decoder(module: nn.Module, layers: nn.ModuleList, family: Family, config: Any) -> Decoder:
    num_heads = int(config.num_attention_heads)
    return Decoder(
        module=module,
        layers=layers,
        family=family,
        hidden_size=int(config.hidden_size),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        is_cache_default=bool(getattr(config, "use_cache", True)),
    )
