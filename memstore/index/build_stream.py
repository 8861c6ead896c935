"""BuildStream: where a build works on a GPU, beside retrievals and never far ahead of the device."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all memories of a device, as libraries keep working memory for each stream that there ever was."""
    return torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]


class BuildStream:
    """The stream of a device's builds, of the lowest priority there is. On the host there is none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """This thread's work goes there."""
        if self._stream is None and self._device.type == "cuda":
            self._stream = _stream(self._device)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream), torch.no_grad():
            yield

    def wait(self) -> None:
        """Until all of it is done."""
        if self._stream is not None:
            self._stream.synchronize()
