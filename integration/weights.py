"""MemoryWeights: everything that is learned beside the model, as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, cast

import torch
from torch import nn

from integration.families import find_decoder
from model_client.cache_attention import CacheAttention, StateProjection

if TYPE_CHECKING:
    from integration.config import MemoryConfig


SCALE_SAMPLE = 4096
"""States by which the size of a restored state is told."""


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
    def fit(self, model: nn.Module, states: torch.Tensor) -> None:
        """Begins from the model: keys are principal directions of states, read as each layer reads its own states.

        states: (n, hidden_size), a sample of what enters the retrieval layer.
        """
        self.projection.fit(states)
        self.read_as_layers(model, states)

    @torch.no_grad()
    def read_as_layers(self, model: nn.Module, states: torch.Tensor) -> None:
        """The key and value matrices of each cache attention become those of its layer, for states restored from keys.

        Where a layer has none of that shape they stay as they are. Outputs stay what they are without a memory.
        """
        directions = torch.linalg.pinv(self.projection.linear.weight.float())
        sample = states[:SCALE_SAMPLE].float()
        restored = self.projection(sample).float() @ directions.T
        decoder = find_decoder(model)
        for number, own in self.layers.items():
            layer = decoder.layers[int(number)]
            norm = getattr(layer, "input_layernorm", None)
            entering = sample if norm is None else norm(sample.to(next(norm.parameters()).dtype)).float()
            back = directions * (entering.norm() / restored.norm())
            attention = decoder.attention(int(number))
            _read_as(cast("CacheAttention", own).k_proj, getattr(attention, "k_proj", None), back)
            _read_as(cast("CacheAttention", own).v_proj, getattr(attention, "v_proj", None), back)

    @torch.no_grad()
    def _copy_queries(self, layer_idx: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        own = self.cache_attention(layer_idx).q_proj
        if own.weight.shape != weight.shape or not weight.is_floating_point():
            return
        own.weight.copy_(weight)
        if bias is not None:
            own.bias.copy_(bias)


def _read_as(own: nn.Linear, source: nn.Module | None, back: torch.Tensor) -> None:
    """own: width of a key -> heads; source: hidden_size -> heads; back: (hidden_size, width of a key)."""
    weight = getattr(source, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.shape != (own.out_features, len(back)):
        return
    own.weight.copy_(weight.float() @ back)
