"""Victim: a server of its own process with all of its ports, and somebody who honestly uses it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from memstore.v1 import memstore_pb2 as pb
from tests.processes import Process, Usage
from tests.security.attacks import Target
from tests.serving import spec, step

if TYPE_CHECKING:
    from pathlib import Path

Attack = Callable[[Target, int], list[socket.socket]]
RISE_BYTES = 192 << 20
"""What attacks may make the server take while they go on; most of it is that glibc takes 64 MiB at a time."""
OPEN_BYTES = 2 << 20
"""What gRPC holds for each connection from which it has read, until that is closed."""
KEPT_BYTES = 96 << 20
"""What may be left of all attacks together: what the heap never gives up, and 64 MiB at the end of its second arena."""
SPARE = 6
"""Threads and descriptors that gRPC may keep for itself."""


class Victim:
    """A server, its ports, and somebody who honestly uses it."""

    def __init__(self, folder: Path, *arguments: str, metadata: Sequence[tuple[str, str]] = ()) -> None:
        """metadata: what honest calls carry."""
        self._metadata = tuple(metadata)
        self._process = Process(folder, "--port", "0", "--capacity", "64M", *arguments)
        ready = self._process.until("ready")
        self.front = Target(ready["address"])
        self.metrics = Target(ready["metrics"])
        self.pid = self._process.pid
        self._process.pass_over()
        self._stub = self._process.connect(ready["address"])
        self._stub.CreateMemory(pb.CreateMemoryRequest(spec=spec()), metadata=self._metadata)
        lend = pb.OpenPlaneRequest(memory="notes", sequences=["lent"], writer="w")
        offer = self._stub.OpenPlane(lend, metadata=self._metadata)
        self.sockets = Target(offer.socket_path, socket.SOCK_SEQPACKET)
        for _ in range(20):
            self.serve()
        self.before = Usage.of(self.pid)

    def serve(self) -> None:
        """Is as it should be."""
        self._stub.Step(step(("a",), append=False, writer=""), timeout=30, metadata=self._metadata)

    def endure(self, attack: Attack, target: Target, number: int) -> Usage:
        """Goes on during an attack, and lets go of everything after it."""
        opened = attack(target, number)
        self.serve()
        during = Usage.of(self.pid)
        for connection in opened:
            connection.close()
        self.until(lambda now: now.num_descriptors <= self.before.num_descriptors + SPARE)
        self.until(lambda now: now.num_threads <= self.before.num_threads + SPARE)
        self.until(lambda now: now.rss_bytes <= self.before.rss_bytes + KEPT_BYTES)
        self.serve()
        assert during.rss_bytes < self.before.rss_bytes + RISE_BYTES + OPEN_BYTES * len(opened), attack.__name__
        return during

    def until(self, is_well: Callable[[Usage], bool]) -> None:
        """Returns once it is; the test's own time limit ends it otherwise."""
        while not is_well(Usage.of(self.pid)):
            time.sleep(0.02)

    def close(self) -> None:
        self._process.close()
