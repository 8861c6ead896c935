"""MemoryWeights: everything that is learned beside the model, as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, cast

import torch
from torch import nn

from integration.families import find_decoder
from model_client.cache_attention import CacheAttention, StateProjection

if TYPE_CHECKING:
    from integration.config import MemoryConfig


class MemoryWeights(nn.Module):
    """The projection of the retrieval layer and one cache attention a layer."""

    def __init__(self, config: MemoryConfig, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.projection = StateProjection(config.hidden_size, config.dim, dtype=dtype)
        layers = {str(layer): CacheAttention(config.sizes, dtype=dtype) for layer in config.attention_layers}
        self.layers = nn.ModuleDict(layers)

    def cache_attention(self, layer_idx: int) -> CacheAttention:
        """The cache attention of a decoder layer."""
        return cast("CacheAttention", self.layers[str(layer_idx)])

    @classmethod
    def for_model(cls, model: nn.Module, config: MemoryConfig, *, dtype: torch.dtype | None = None) -> Self:
        """Untrained weights, on the model's device: the queries are the model's own where the shapes agree.

        dtype: the model's, by default. With these the model's outputs are what they are without a memory.
        """
        config.check_model(model)
        decoder = find_decoder(model)
        parameter = next(decoder.module.parameters())
        weights = cls(config, dtype=dtype or parameter.dtype)
        for layer in config.attention_layers:
            weights._copy_queries(layer, *decoder.query_projection(layer))
        return weights.to(parameter.device).train(model.training)

    @torch.no_grad()
    def _copy_queries(self, layer_idx: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        own = self.cache_attention(layer_idx).q_proj
        if own.weight.shape != weight.shape or not weight.is_floating_point():
            return
        own.weight.copy_(weight)
        if bias is not None:
            own.bias.copy_(bias)
