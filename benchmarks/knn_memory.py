"""The kNN memory of the package `memorizing-transformers-pytorch`, where it is installed: a rival for few rows.

A graph of FAISS (HNSW, inner product) for each sequence, on the host, and keys and values in a file mapped into memory.
It finds approximately, and takes seconds to build. The package is under the MIT licence and no dependency of ours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "memorizing-transformers-pytorch (approximate)"
MOST_ROWS = 70_000
"""Building a graph of more takes it too long."""


def knn_memory_search(rows: torch.Tensor, queries: torch.Tensor, top_k: int) -> Callable[[], object]:
    """rows: (S, C, dim); queries: (S, n, dim). ImportError where it is not installed, or would take too long."""
    num_sequences, capacity, dim = rows.shape
    if queries.shape[1] > 1 or num_sequences * capacity > MOST_ROWS:
        raise ImportError("left out, as building its graphs takes too long")
    from memorizing_transformers_pytorch.knn_memory import KNNMemory

    folder = tempfile.TemporaryDirectory(prefix="knn-memory-")
    memory = KNNMemory(
        dim=dim,
        max_memories=capacity,
        num_indices=num_sequences,
        memmap_filename=str(Path(folder.name, "rows")),
        multiprocessing=False,
    )
    keys = rows.float()
    memory.add(torch.stack((keys, keys), 2))
    asked = queries.float()

    def search() -> object:
        assert folder.name  # lives as long as what is in it
        return memory.search(asked, top_k)

    return search
