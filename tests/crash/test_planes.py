"""SIGKILL on either side of a lease: the model goes on, and what was published is whole."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from model_client import MemoryClient, Retrieval
from tests.crash.holder import COUNTS, DIM, NAMES
from tests.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model_client import Session

pytestmark = pytest.mark.timeout(180)  # each start of a process imports torch, which takes seconds on a busy machine
CAPACITY = 100
NUM_KILLS = 4
STALL_S = 5.0
"""Far more than a step takes on a busy machine, and less than any deadline here."""
HOLDER = Path(__file__).with_name("holder.py")
ROOT = HOLDER.parents[2]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Servers:
    """One server after the other, at one address and over one folder."""

    def __init__(self, folder: Path, port: int, device: torch.device) -> None:
        self.target = f"127.0.0.1:{port}"
        self.running: list[Process] = []
        self._folder = folder
        self._arguments = ("--port", str(port), "--device", device.type, "--capacity", "256M")

    def start(self) -> Process:
        """The next one, ready."""
        self.running.append(Process(self._folder, *self._arguments))
        self.running[-1].until("ready")
        return self.running[-1]


@pytest.fixture
def servers(tmp_path: Path, port: int, device: torch.device) -> Iterator[Servers]:
    made = Servers(tmp_path, port, device)
    yield made
    for each in made.running:
        each.close()


def create(client: MemoryClient) -> None:
    client.create_memory("m", dim=DIM, capacity=CAPACITY, max_sequences=8, dtype=torch.float32)


def read(client: MemoryClient, name: str) -> list[int]:
    """The positions of a sequence; every row has its position in each element."""
    hits = client.session("m", [name]).retrieve(torch.zeros(1, DIM), [1], Retrieval(CAPACITY)).hits
    assert hits is not None
    rows = hits.rows["key"]
    assert torch.equal(rows, hits.positions.float()[:, None].expand(-1, DIM)), "a row that nobody published"
    return [int(position) for position in hits.positions.tolist()]


def test_a_killed_client_leaves_what_it_published(servers: Servers, device: torch.device) -> None:
    """It is killed again and again while it writes over old rows; each time another one goes on."""
    servers.start()
    with MemoryClient(servers.target, plane="inline", timeout_s=60.0) as client:
        create(client)
        for kill in range(NUM_KILLS):
            command = [sys.executable, str(HOLDER), servers.target, device.type, "m"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
                assert holder.stdout is not None
                num_steps = 10 + 7 * kill
                for _ in range(num_steps):
                    done = int(holder.stdout.readline())
                time.sleep(0.007 * kill)
                holder.send_signal(signal.SIGKILL)
                said = holder.stdout.read().split()
                done = max([done, *(int(word) for word in said)])
                # on a GPU an append is answered when it is under way, and published once the device has written it
                done -= device.type == "cuda"
            ends = {}
            for name, count in zip(NAMES, COUNTS, strict=True):
                positions = read(client, name)
                assert positions, "a whole prefix is there"
                assert positions == list(range(positions[0], positions[-1] + 1))
                assert positions[-1] + 1 >= count * done, "what was answered is published"
                assert positions[0] <= max(positions[-1] + 1 - CAPACITY, 0) + count, "and no more is lost than one step"
                ends[name] = positions[-1] + 1
            # Only the server writes to them now. The next holder begins at position 0 again.
            results = client.session("m", NAMES).append(torch.zeros(3, DIM), [1, 1, 1]).sequences
            assert [each.first_position for each in results] == list(ends.values())
            client.reset("m", NAMES)


def test_a_killed_server_neither_stalls_nor_faults_the_model(servers: Servers, device: torch.device) -> None:
    first = servers.start()
    plane = "cuda" if device.type == "cuda" else "shm"
    with MemoryClient(servers.target, plane=plane, timeout_s=60.0) as client:
        create(client)
        session = client.session("m", ["a"])
        epoch = append(session, 0, device)
        assert session.plane == plane
        first.tell(signal.SIGKILL)
        first.end()
        for number in range(1, 200):
            begun = time.monotonic()
            append(session, number, device)
            assert time.monotonic() - begun < STALL_S
        assert session.plane == plane
        while client.stats.orphaned_steps == 0:  # it takes notice when the kernel has closed the connection
            time.sleep(0.01)
            session.retrieve(torch.zeros(1, DIM, device=device), [1], Retrieval(1))
        hits = session.retrieve(torch.zeros(1, DIM, device=device), [1], Retrieval(CAPACITY)).hits
        assert hits is not None
        assert hits.positions.tolist() == list(range(100, 200))

        servers.start()
        while client.stats.leases < 2:
            time.sleep(0.01)
        assert append(session, 200, device) == epoch
        with MemoryClient(servers.target, plane="inline", timeout_s=60.0) as other:
            assert read(other, "a") == list(range(101, 201))
            assert other.describe_memory("m").status.num_rows == CAPACITY
        assert client.stats.lost_epochs == client.stats.failures == 0


def append(session: Session, number: int, device: torch.device) -> int:
    """Appends row `number`, which is its position; gives the epoch."""
    keys = torch.full((1, DIM), float(number), device=device)
    result = session.append(keys, [1]).sequences[0]
    assert result.first_position == number
    return int(result.epoch)
