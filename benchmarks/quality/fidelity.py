"""Fidelity: how well neighbours among keys are those among whole states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.quality.reading import states_at
from benchmarks.quality.table import K
from model_client.cache_attention import StateProjection

if TYPE_CHECKING:
    from benchmarks.quality.table import Table


def fidelity(table: Table) -> None:
    """Table 3: how well neighbours among keys are those among whole states; learned, PCA and random projections."""
    for domain in ("books", "code"):
        windows = table.windows(domain, length=min(table.options.length, 16 * K))
        variant = table.variant("ours")
        layer = int(variant.report["layer"])
        states = states_at(variant, windows.ids, layer)
        for name in ("ours", "dim-256", "dim-64", "dim-32", "dim-16"):
            _recall(table, f"{domain}, learned, {name}", states, _learned(table, name))
        for dim in (256, 128, 64, 32, 16):
            for method in ("pca", "random"):
                _recall(table, f"{domain}, {method}, dim-{dim}", states, _made(states, method, dim))


def _learned(table: Table, name: str) -> Any:
    try:
        return table.variant(name).adapter.weights.projection
    except KeyError:
        return None


def _made(states: torch.Tensor, method: str, dim: int) -> Any:
    torch.manual_seed(0)
    projection = StateProjection(states.shape[-1], min(dim, states.shape[-1])).to(states.device)
    if method == "pca":
        projection.fit(states[:, 1:4097])
    return projection


@torch.no_grad()
def _recall(table: Table, case: str, states: torch.Tensor, projection: Any, top_k: int = 16) -> None:
    """recall@k against neighbours among whole states (of unit variance), and how much farther those found are."""
    if projection is None:
        return
    recalls, ratios = [], []
    for document in states:
        full = torch.nn.functional.layer_norm(document, document.shape[-1:])
        narrow = projection(document)
        queries = torch.arange(len(full) * 3 // 4, len(full), 16, device=full.device)
        kept = torch.arange(len(full) * 3 // 4, device=full.device)
        true = torch.cdist(full[queries], full[kept])
        near = true.topk(top_k, dim=1, largest=False)
        found = torch.cdist(narrow[queries], narrow[kept]).topk(top_k, dim=1, largest=False).indices
        recalls.append((found[:, :, None] == near.indices[:, None, :]).any(dim=2).float().mean().item())
        ratios.append((true.gather(1, found).mean() / near.values.mean()).item())
    table.report.add(case, f"recall@{top_k}", float(np.mean(recalls)), "ratio", better="higher")
    table.report.add(case, "distance of those found / of the nearest", float(np.mean(ratios)), "ratio")
