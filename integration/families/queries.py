"""The query projection of an attention, out of a module of its own or out of a fused one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    Projection = tuple[torch.Tensor, torch.Tensor | None]


def own_projection(attention: nn.Module, num_heads: int, head_dim: int) -> Projection:
    """Weight (num_heads * head_dim, hidden_size) and bias of `q_proj`."""
    linear: Any = attention.q_proj
    return linear.weight, linear.bias


def fused_first(name: str) -> Callable[[nn.Module, int, int], Projection]:
    """For a fused projection with all query heads first."""

    def queries(attention: nn.Module, num_heads: int, head_dim: int) -> Projection:
        linear: Any = getattr(attention, name)
        rows = slice(0, num_heads * head_dim)
        return linear.weight[rows], None if linear.bias is None else linear.bias[rows]

    return queries


def fused_per_head(name: str) -> Callable[[nn.Module, int, int], Projection]:
    """For a fused projection with query, key and value of each head behind one another."""

    def queries(attention: nn.Module, num_heads: int, head_dim: int) -> Projection:
        linear: Any = getattr(attention, name)
        weight = linear.weight.view(num_heads, 3, head_dim, -1)[:, 0].flatten(0, 1)
        bias = None if linear.bias is None else linear.bias.view(num_heads, 3, head_dim)[:, 0].flatten()
        return weight, bias

    return queries
