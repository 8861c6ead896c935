"""Capturing of CUDA graphs, beside which others go on."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of a high priority, which the graph's kernels have from it; builds have none of these streams."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class _Collection:
    """Collection of garbage, which is put off for as long as anybody wants that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_pauses = 0
        self._was_on = False

    @contextmanager
    def put_off(self) -> Iterator[None]:
        with self._lock:
            if not self._num_pauses:
                self._was_on = gc.isenabled()
                gc.disable()
            self._num_pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_pauses -= 1
                if self._was_on and not self._num_pauses:
                    gc.enable()


_collection = _Collection()


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Work of this thread becomes the graph's.

    Unlike torch.cuda.graph it neither waits for all that is under way on the device nor gives cached memory back, which
    others would then have to ask for again. Relaxed: an object of another index may give memory back meanwhile, which
    other modes forbid. No garbage is collected: what lets go of pinned pages waits for the device, in whatever thread,
    which ends a capture, and an event of pinned memory that is given back would become a part of the graph.
    """
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with _collection.put_off(), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            yield
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
