"""A memstore in this process for every test of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from model_client import MemoryClient

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def each_device(device: torch.device) -> Iterator[None]:
    """Runs the test on each device that is here: what it makes, models and tensors, lies there by default."""
    with device:
        yield


@pytest.fixture
def client() -> Iterator[MemoryClient]:
    """A client with an engine of its own, on the default device."""
    with MemoryClient(":memory:", device=torch.get_default_device().type, timeout_s=20.0) as opened:
        yield opened
