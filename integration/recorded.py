"""Recorded: work on tensors that stay where they are, which a GPU is given as one CUDA graph."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CAPTURE_ERRORS = range(900, 910)
"""cudaErrorStreamCaptureUnsupported and those after it: something else in this process has spoilt a recording."""


class Recorder:
    """Where work is recorded: a stream, and the memory that all of its graphs share. They run one after the other."""

    def __init__(self, device: torch.device) -> None:
        """On another device than a GPU nothing is recorded, and work is done anew each time."""
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def event(self) -> torch.cuda.Event | None:
        """A moment on the GPU; None where nothing waits for one."""
        return None if self.stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the block the stream is the current one, behind what was queued before.

        After it all is done, also where it fails: who knows whose the memory is that it works on by then.
        """
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self.stream.synchronize()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does the work; within `at_work`. On a GPU it is done once, so that all is compiled, and then captured.

        Raises torch.AcceleratorError, RuntimeError where it cannot be captured.
        """
        if self.stream is None:
            return work
        graph = torch.cuda.CUDAGraph()
        work()
        self.stream.synchronize()
        # relaxed: what is collected meanwhile may give memory back, which other modes forbid
        graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
        try:
            work()
        finally:
            graph.capture_end()
        return graph.replay
