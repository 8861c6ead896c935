"""The server as a process of its own, whose log the test reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from memstore.v1 import memstore_pb2_grpc

if TYPE_CHECKING:
    import signal


@dataclass(frozen=True)
class Usage:
    """What a process has of its machine. peak_bytes: the most that rss_bytes ever was."""

    rss_bytes: int
    peak_bytes: int
    num_threads: int
    num_descriptors: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """As the kernel says it."""
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        number = len(os.listdir(f"/proc/{pid}/fd"))
        rss_bytes, peak_bytes = (int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
        return cls(rss_bytes, peak_bytes, int(lines["Threads"]), number)


class Process:
    """`memstore serve` with a JSON log, its data in a folder."""

    def __init__(self, folder: Path, *arguments: str, optimised: bool = False, program: str = "memstore") -> None:
        command = [sys.executable, *(["-O"] if optimised else []), "-m", program, "serve"]
        command += ["--data", str(folder), "--log-format", "json", "--metrics-port", "0", "--threads", "1"]
        self._process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        self.channel: grpc.Channel | None = None

    def until(self, name: str) -> dict[str, Any]:
        """The line of the log with this event."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == name:
                return entry
        raise AssertionError(f"the log ended without {name!r}")

    @property
    def pid(self) -> int:
        """The number that the kernel knows it by."""
        return self._process.pid

    def pass_over(self) -> None:
        """Reads whatever else it logs, so that it never waits for a reader. Nothing may be asked of the log after."""
        assert self._process.stderr is not None
        threading.Thread(target=lambda log: deque(log, maxlen=0), args=(self._process.stderr,), daemon=True).start()

    def connect(self, address: str = "") -> memstore_pb2_grpc.MemoryServiceStub:
        """A connection, once the server is ready. address: as it said then, where that has been read."""
        self.channel = grpc.insecure_channel(address or self.until("ready")["address"])
        return memstore_pb2_grpc.MemoryServiceStub(self.channel)

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Exit code and what was left of the log."""
        assert self._process.stderr is not None
        rest = self._process.stderr.read()
        return self._process.wait(), rest

    def close(self) -> None:
        """Ends it whatever its state is."""
        if self.channel is not None:
            self.channel.close()
        self._process.kill()
        with self._process:
            """Waits, and closes its pipes."""
