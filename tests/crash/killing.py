"""Servers that are killed at a point of their own files, one life after another, each a fork of one process.

A point is WHAT:WHEN, such as `log.write:torn`. The process kills itself, as `kill -9` would, at the COUNT-th time that
it comes there. `python -m tests.crash.killing FOLDER` reads lines `POINT COUNT`, and says how each life ended.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memstore import config, server
from memstore.seams import SystemDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memstore.seams import AppendFile, Buffer

POINTS = [
    "log.write:before",
    "log.write:torn",
    "log.write:after",
    "log.sync:before",
    "log.sync:after",
    "log.create:after",
    "rows.write:torn",
    "rows.sync:before",
    "replies.sync:after",
    "manifest.replace:before",
    "manifest.replace:after",
    "snapshot.rename:before",
    "snapshot.rename:after",
    "log.remove:before",
    "log.remove:after",
    "sequence.create:after",
    "sequence.write:torn",
    "sequence.write:after",
    "sequence.remove:after",
]
"""Every change of files that a durable memory makes while it serves, before and after it; `sequence`: a spilled one."""


class KillingDisk(SystemDisk):
    """The machine's own files, and one moment at which the process ends."""

    def __init__(self, point: str, count: int) -> None:
        self._point = point
        self._left = count

    def passes(self, point: str) -> bool:
        """Counts the times that a point is reached; ends the process at the last, unless it is for the caller to do."""
        if point != self._point:
            return False
        self._left -= 1
        if self._left == 0 and not point.endswith(":torn"):
            kill()
        return self._left == 0

    def around(self, what: str, run: Callable[[], object]) -> None:
        """A change, with the points before and after it."""
        self.passes(f"{what}:before")
        run()
        self.passes(f"{what}:after")

    def create(self, path: Path) -> AppendFile:
        file = KillingFile(super().create(path), _kind(path), self)
        self.passes(f"{_kind(path)}.create:after")
        return file

    def scratch(self, path: Path) -> AppendFile:
        file = KillingFile(super().scratch(path), _kind(path), self)
        self.passes(f"{_kind(path)}.create:after")
        return file

    def replace(self, path: Path, content: bytes) -> None:
        self.around(f"{_kind(path)}.replace", lambda: super(KillingDisk, self).replace(path, content))

    def rename(self, source: Path, target: Path) -> None:
        self.around(f"{_kind(target)}.rename", lambda: super(KillingDisk, self).rename(source, target))

    def remove(self, path: Path) -> None:
        self.around(f"{_kind(path)}.remove", lambda: super(KillingDisk, self).remove(path))


class KillingFile:
    """A file of a KillingDisk."""

    def __init__(self, file: AppendFile, kind: str, disk: KillingDisk) -> None:
        self._file = file
        self._kind = kind
        self._disk = disk

    @property
    def size(self) -> int:
        return self._file.size

    def write(self, parts: Sequence[Buffer]) -> None:
        if self._disk.passes(f"{self._kind}.write:torn"):
            content = b"".join(bytes(part) for part in parts)
            self._file.write([content[: len(content) // 2]])
            kill()
        self._disk.around(f"{self._kind}.write", lambda: self._file.write(parts))

    def sync(self) -> None:
        self._disk.around(f"{self._kind}.sync", self._file.sync)

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


def _kind(path: Path) -> str:
    """log, rows, replies, manifest, catalog, closed, ..."""
    return path.name.split("-")[0].split(".")[0]


def kill() -> None:
    """The end, without any word."""
    os.kill(os.getpid(), signal.SIGKILL)


def serve(folder: Path, point: str, count: int) -> int:
    """Serves until it is killed."""
    flags = {
        "data": str(folder / "data"),
        "unix_socket": str(folder / "socket"),
        "ready_file": str(folder / "ready.json"),
        "metrics_port": "-1",
        "snapshot_interval": "0.15",
        "log_level": "error",
        "device": "cpu",
        "threads": "1",
    }
    return server.run(config.from_sources(flags, {}), KillingDisk(point, count))


def main(arguments: Sequence[str]) -> int:
    """Lives until there is no line any more."""
    folder = Path(arguments[0])
    for line in sys.stdin:
        point, count = line.split()
        child = os.fork()
        if child == 0:
            os._exit(serve(folder, point, int(count)))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
