"""Clients, streams, memories and leases come and go, in order and broken off; nothing of them stays with the server."""

from __future__ import annotations

import os
import socket
import statistics
import time
from typing import TYPE_CHECKING

import grpc
import pytest
import torch

from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval
from tests.processes import Process, Usage
from tests.serving import spec, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from memstore.v1.memstore_pb2_grpc import MemoryServiceStub

ROUNDS = int(os.environ.get("LEAK_ROUNDS", "32"))
WARM_UP = 8
SPARE = 4
"""Threads and descriptors that gRPC may keep for itself."""
NOISE_BYTES = 8 << 20
SLOPE_BYTES = 4 << 10
"""What a round may leave behind, of memory that is not given back in pieces so small."""
RETRIEVAL = Retrieval(top_k=2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path, "--port", "0", "--capacity", "256M")
    yield made
    made.close()


class Guests:
    """What comes and goes in one round, each in a manner of its own."""

    def __init__(self, target: str, stub: MemoryServiceStub) -> None:
        self._target = target
        self._stub = stub
        stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()))

    def come_and_go(self, number: int) -> None:
        """One round."""
        self._client("inline", number)
        self._client("shm", number)
        self._memory(number)
        self._broken_stream()
        self._broken_lease(is_claimed=True)
        self._broken_lease(is_claimed=False)

    def _client(self, plane: str, number: int) -> None:
        with MemoryClient(self._target, plane=plane, timeout_s=30.0) as client:  # type: ignore[arg-type]
            session = client.session("notes", [f"{plane}"])
            session.step(torch.full((1, 4), float(number)), [1], retrieve=RETRIEVAL, append=True)
            session.reset()
        self._release(plane)

    def _release(self, sequence: str) -> None:
        """Once its lease has ended."""
        while True:
            try:
                self._stub.Reset(pb.ResetRequest(memory="notes", sequences=[sequence], release=True))
                return
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error

    def _memory(self, number: int) -> None:
        durability = (pb.DURABILITY_VOLATILE, pb.DURABILITY_INTERVAL, pb.DURABILITY_ALWAYS)[number % 3]
        self._stub.CreateMemory(pb.CreateMemoryRequest(spec=spec("passing", durability=durability)))
        self._stub.Step(step(("a", "b"), memory="passing"))
        self._stub.DropMemory(pb.DropMemoryRequest(name="passing"))

    def _broken_stream(self) -> None:
        """Given up with an answer under way."""
        asked = [pb.StepStreamRequest(call_id=at, step=step(("q",), append=False, writer="")) for at in range(5)]
        answers = self._stub.StepStream(iter(asked))
        next(answers)
        answers.cancel()
        with pytest.raises(grpc.RpcError):
            list(answers)

    def _broken_lease(self, *, is_claimed: bool) -> None:
        """Closed without a word, as the kernel does it for a process that is killed."""
        wanted = pb.OpenPlaneRequest(memory="notes", sequences=["lent"], writer="w")
        try:
            offer = self._stub.OpenPlane(wanted)
        except grpc.RpcError as error:  # offers that nobody claims are bounded, too, and last ten seconds
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.connect(offer.socket_path)
            if is_claimed:
                link.send(pb.ClaimRequest(token=offer.token).SerializeToString())
                _, descriptors, _, _ = socket.recv_fds(link, 1 << 16, 2)
                for descriptor in descriptors:
                    os.close(descriptor)


def until(server: Process, is_well: Callable[[Usage], bool]) -> None:
    """Returns once it is; the test's own time limit ends it otherwise."""
    while not is_well(Usage.of(server.pid)):
        time.sleep(0.02)


@pytest.mark.timeout(120 + 2 * ROUNDS)
def test_nothing_stays_of_those_who_have_gone(server: Process) -> None:
    target = server.until("ready")["address"]
    server.pass_over()
    guests = Guests(target, server.connect(target))
    for number in range(WARM_UP):
        guests.come_and_go(number)
    before = Usage.of(server.pid)
    sizes = []
    for number in range(ROUNDS):
        guests.come_and_go(number)
        sizes.append(Usage.of(server.pid).rss_bytes)
    until(server, lambda now: now.num_descriptors <= before.num_descriptors + SPARE)
    until(server, lambda now: now.num_threads <= before.num_threads + SPARE)
    quarter = ROUNDS // 4
    early, late = (statistics.median(sizes[at : at + quarter]) for at in (quarter, 3 * quarter))
    assert late - early < NOISE_BYTES + SLOPE_BYTES * 2 * quarter
