"""BuildStream: where a build works on a GPU, beside retrievals and never far ahead of the device."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class BuildStream:
    """A stream of the lowest priority there is, always the same, as torch keeps memory for each. On the host none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """This thread's work goes there."""
        if self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device, priority=0)  # type: ignore[no-untyped-call]
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream), torch.no_grad():
            yield

    def wait(self) -> None:
        """Until all of it is done."""
        if self._stream is not None:
            self._stream.synchronize()
