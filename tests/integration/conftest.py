"""A memstore in this process for every test of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from model_client import MemoryClient

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def client() -> Iterator[MemoryClient]:
    """A client with an engine of its own."""
    with MemoryClient(":memory:", timeout_s=20.0) as opened:
        yield opened
