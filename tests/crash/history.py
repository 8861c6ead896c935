"""What a client that writes to a server through all its ends was told, and what the server has of it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import torch

from memstore.plane import InlinePlane
from memstore.v1 import memstore_pb2 as pb
from memstore.v1 import memstore_pb2_grpc
from tests.crash.killing import POINTS
from tests.serving import tensor

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

MEMORIES = {"always": pb.DURABILITY_ALWAYS, "interval": pb.DURABILITY_INTERVAL}
CAPACITY = 64
MOST_CALLS = 150
"""After so many calls a server that still lives is killed from outside."""


@dataclass
class Track:
    """One sequence: rows acknowledged, in order, and the append that is under way."""

    memory: str
    name: str
    epoch: int = 0
    next_seq: int = 0
    rows: list[int] = field(default_factory=list)
    under_way: list[int] | None = None


@dataclass
class Tally:
    """What was thrown at the servers, and what was lost."""

    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicates: int = 0
    points: set[str] = field(default_factory=set)


class History:
    """A client of servers that are killed."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.tally = Tally()
        self._folder = folder
        self._random = random
        self._tracks = [Track(memory, name) for memory in MEMORIES for name in ("a", "b")]
        self._next_row = 1
        self._servers = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.killing", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """Ends the process that servers are forked from."""
        with self._servers:
            assert self._servers.stdin is not None
            self._servers.stdin.close()

    def live(self, point: str, count: int) -> None:
        """One life of a server: what it has is checked, then it is written to until it is killed."""
        assert self._servers.stdin is not None
        self._servers.stdin.write(f"{point} {count}\n")
        self._servers.stdin.flush()
        ready = self._folder / "ready.json"
        while not ready.exists() and not self._has_ended():
            time.sleep(0.01)
        if ready.exists():
            self._use(json.loads(ready.read_text())["pid"])
            ready.unlink()
        assert self._servers.stdout is not None
        code = int(self._servers.stdout.readline())
        assert code == -signal.SIGKILL, f"the server ended with {code}"
        self.tally.kills += 1
        self.tally.points.add(point)

    def _use(self, pid: int) -> None:
        """Checks and writes until the server is gone; one that does not go is killed."""
        with grpc.insecure_channel(f"unix://{self._folder}/socket") as channel:
            stub = memstore_pb2_grpc.MemoryServiceStub(channel)
            try:
                self._check(stub)
                for _ in range(MOST_CALLS):
                    self._append(stub, self._random.choice(self._tracks))
                os.kill(pid, signal.SIGKILL)
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), error

    def _has_ended(self) -> bool:
        return bool(select.select([self._servers.stdout], [], [], 0)[0])

    def _check(self, stub: memstore_pb2_grpc.MemoryServiceStub) -> None:
        """Makes the memories where they are not there, finishes what was under way, and looks at every row."""
        for name, durability in MEMORIES.items():
            made = pb.MemorySpec(
                name=name,
                dim=2,
                capacity=CAPACITY,
                max_sequences=1,
                dtype=pb.DATA_TYPE_FP32,
                durability=durability,
                spill=pb.SpillSpec(max_sequences=1, host_sequences=int(name == "interval")),
            )
            stub.CreateMemory(pb.CreateMemoryRequest(spec=made, exist_ok=True))
        for track in self._tracks:
            if track.under_way is not None:
                self._send(stub, track)
            self._look(stub, track)

    def _append(self, stub: memstore_pb2_grpc.MemoryServiceStub, track: Track) -> None:
        """Appends one to three rows that no other append has."""
        count = self._random.randint(1, 3)
        track.under_way = list(range(self._next_row, self._next_row + count))
        self._next_row += count
        self._send(stub, track)

    def _send(self, stub: memstore_pb2_grpc.MemoryServiceStub, track: Track) -> None:
        """Sends what is under way, for the first time or once more, and takes note of the answer."""
        assert track.under_way is not None
        keys = torch.tensor([[[row, -row] for row in track.under_way]])
        part = pb.SequencePart(
            sequence=track.name, num_rows=len(track.under_way), epoch=track.epoch, seq=track.next_seq
        )
        request = pb.AppendRequest(memory=track.memory, sequences=[part], writer="w", keys=tensor(keys))
        (result,) = stub.Append(request).sequences
        assert result.epoch == track.epoch or track.next_seq == 0
        assert result.durability == MEMORIES[track.memory]
        if result.first_position < len(track.rows):
            self.tally.lost += len(track.rows) - result.first_position
        self.tally.duplicates += max(0, result.first_position - len(track.rows))
        track.epoch, track.next_seq = result.epoch, track.next_seq + 1
        track.rows += track.under_way
        self.tally.acknowledged += len(track.under_way)
        track.under_way = None

    def _look(self, stub: memstore_pb2_grpc.MemoryServiceStub, track: Track) -> None:
        """Counts live rows that are not what was acknowledged at their position."""
        part = pb.SequencePart(sequence=track.name, num_rows=1)
        request = pb.RetrieveRequest(
            memory=track.memory,
            sequences=[part],
            retrieve=pb.RetrieveOptions(top_k=CAPACITY, arrays=["key"]),
            keys=tensor(torch.zeros(1, 1, 2)),
        )
        reply = stub.Retrieve(request)
        plane = InlinePlane(1 << 20)
        positions = plane.read(reply.hits.positions, "positions").tolist()
        rows = plane.read(reply.hits.arrays[0].tensor, "key")[:, 0].tolist()
        want = dict(enumerate(track.rows))
        got = dict(zip(positions, rows, strict=True))
        live = range(max(len(track.rows) - CAPACITY, 0), len(track.rows))
        self.tally.lost += sum(got.get(position) != want[position] for position in live)
        self.tally.duplicates += max(0, reply.sequences[0].as_of - len(track.rows))


def lives(folder: Path, random: Random, number: int) -> Tally:
    """So many lives, at every point in turn, and what came of them."""
    history = History(folder, random)
    try:
        for at in range(number):
            point = POINTS[at % len(POINTS)]
            is_often = point.startswith(("log.write", "log.sync", "sequence"))
            history.live(point, random.randint(3, 40) if is_often else random.randint(1, 3))
        return history.tally
    finally:
        history.close()
