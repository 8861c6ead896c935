"""Capturing of CUDA graphs, beside which others go on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Work of this thread becomes the graph's.

    Unlike torch.cuda.graph it neither waits for all that is under way on the device nor gives cached memory back, which
    others would then have to ask for again. Relaxed: a collected object of another index may give memory back
    meanwhile, which other modes forbid.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            yield
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
