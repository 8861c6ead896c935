"""Servers, and memories with their oracle, for the tests of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from memstore.index import BUILDERS, INDEXES
from memstore.types import IndexKind
from memstore.v1 import memstore_pb2 as pb
from tests.pairing import SPEC, Pair, replace
from tests.serving import Serving, serving, spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from tests.processes import Process


@pytest.fixture(scope="module")
def shared() -> Iterator[Serving]:
    """A server with one memory, for tests that leave it as it was."""
    with serving() as server:
        server.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        yield server


@pytest.fixture
def server() -> Iterator[Serving]:
    """A server with one memory, for one test."""
    with serving() as made:
        made.stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))
        yield made


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Servers that a test starts as processes of their own, which end with it."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.close()


@pytest.fixture(params=list(IndexKind), ids=lambda kind: kind.value)
def pair(request: pytest.FixtureRequest, device: torch.device) -> Pair:
    """A memory of each index on each device, and its oracle."""
    if request.param is not IndexKind.EXACT:
        pytest.importorskip("faiss")
    if request.param not in INDEXES and device.type not in BUILDERS:
        pytest.skip(f"no builder for {device}")
    return Pair(device, replace(SPEC, index=request.param))
