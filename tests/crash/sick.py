"""`memstore` whose device fails for good at a step of the sequence POISON.

A GPU does so indeed: a kernel fails its assertion, which every later call in the process is told. With HANGS set, the
device's thread then never comes back. What runs at the end of the interpreter aborts, as libraries of a failed GPU may.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

import torch

from memstore.__main__ import main
from memstore.device import DeviceWorker
from memstore.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memstore.errors import MemstoreError
    from memstore.types import Hits, StepBatch, StepResult

POISON = "poison"
step = Memory.step


def poisoned(
    memory: Memory, batches: Sequence[StepBatch], carry: Callable[[int, Hits], None]
) -> list[StepResult | MemstoreError]:
    """See Memory.step."""
    if any(part.sequence == POISON for batch in batches for part in batch.parts):
        fail(memory.device)
    return step(memory, batches, carry)


def fail(device: torch.device) -> NoReturn:
    """What a call of the device raises once its context is lost."""
    if device.type == "cuda":
        torch.zeros(2, device=device)[torch.full((1,), 9, device=device)]
        torch.cuda.synchronize(device)
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def hang(*_: object) -> NoReturn:
    """What a driver may do that waits for a device that is gone."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    Memory.step = poisoned  # type: ignore[method-assign, assignment]
    if os.environ.get("HANGS"):
        DeviceWorker._fail = hang  # type: ignore[method-assign, assignment]
    atexit.register(os.abort)
    sys.exit(main())
