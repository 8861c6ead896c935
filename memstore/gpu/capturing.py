"""Capturing of CUDA graphs, beside which others go on."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from memstore import garbage

if TYPE_CHECKING:
    from collections.abc import Iterator


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of a high priority, which the graph's kernels have from it; builds have none of these streams."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Work of this thread becomes the graph's.

    Unlike torch.cuda.graph it neither waits for all that is under way on the device nor gives cached memory back, which
    others would then have to ask for again. Relaxed: an object of another index may give memory back meanwhile, which
    other modes forbid. No garbage is collected meanwhile.
    """
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with garbage.put_off(), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            yield
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
