"""Clock and Disk: the only doors to time and to files. The real ones stand here, fakes in tests/fakes.py."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from memstore.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


class Clock(Protocol):
    """Two times in seconds: `monotonic` for deadlines and durations, `wall` (Unix) for people."""

    def monotonic(self) -> float:
        """Seconds that never go backwards."""

    def wall(self) -> float:
        """Seconds since 1970."""


class Disk(Protocol):
    """Whole small files, replaced atomically."""

    def read(self, path: Path) -> bytes | None:
        """The content of a file; None where there is none."""

    def replace(self, path: Path, content: bytes) -> None:
        """The file has this content, or after a crash its old one: never a part of either. Makes the folder."""

    def remove(self, path: Path) -> None:
        """The file is gone; nothing happens when there was none."""

    def lock(self, path: Path) -> AbstractContextManager[None]:
        """Holds `path` as the lock of its folder; NotReady while another process holds it. Makes the folder."""


class SystemClock:
    """The machine's own time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class SystemDisk:
    """The machine's own files."""

    def read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise NotReady(f"{path}: another server holds this lock; give this one a place of its own") from error
            yield


def new_epoch() -> int:
    """A random epoch, 1 to 2^63 - 1: no two servers, and no two lives of one, give the same."""
    return secrets.randbits(63) or 1
