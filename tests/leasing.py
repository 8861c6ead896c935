"""Clients of a server that lends, their memory, and what is in it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from model_client import MemoryClient, Retrieval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from model_client import Session
    from tests.serving import Serving


CAPACITY = 16


@contextmanager
def client_of(server: Serving, plane: str = "shm", **options: Any) -> Iterator[MemoryClient]:
    """A client whose sessions ask for leases of that plane."""
    with MemoryClient(server.target, plane=plane, timeout_s=20.0, **options) as client:
        yield client


def create(client: MemoryClient) -> None:
    """The memory that all of these tests use."""
    client.create_memory("m", dim=2, capacity=CAPACITY, max_sequences=4, dtype=torch.float32, exist_ok=True)


def rows(*numbers: int) -> torch.Tensor:
    """A row for each number, which stands in all of its elements."""
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1).expand(-1, 2).contiguous()


def content(session: Session, index: int = 0) -> list[int]:
    """The numbers of one sequence of a session, by position."""
    hits = session.retrieve(rows(0), [1], Retrieval(CAPACITY), parts=[index]).hits
    assert hits is not None
    assert hits.positions.tolist() == list(range(len(hits.positions)))
    return [int(number) for number in hits.rows["key"][:, 0].tolist()]


def until(condition: Callable[[], bool]) -> None:
    """Returns once it holds; the test's own time limit ends it otherwise."""
    while not condition():
        time.sleep(0.005)
