"""Servers for the tests of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from memstore.v1 import memstore_pb2 as pb
from tests.serving import Serving, serving, spec

if TYPE_CHECKING:
    from collections.abc import Iterator


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
