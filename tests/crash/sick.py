"""`memstore` whose device fails for good at the first step; with HANGS set, its thread then never comes back."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import torch

from memstore.__main__ import main
from memstore.device import DeviceWorker
from memstore.memory import Memory


def fail(*_: object) -> NoReturn:
    """What a call of the device raises once its context is lost."""
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def hang(*_: object) -> NoReturn:
    """What a driver may do that waits for a device that is gone."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    Memory.step = fail  # type: ignore[method-assign, assignment]
    if os.environ.get("HANGS"):
        DeviceWorker._fail = hang  # type: ignore[method-assign, assignment]
    sys.exit(main())
