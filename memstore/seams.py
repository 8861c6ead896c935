"""Clock and Disk: the only doors to time and to files. The real ones stand here, fakes in tests/fakes.py."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from memstore.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes."""

FILE_MODE, FOLDER_MODE = 0o600, 0o700
"""What lies in the data folder is its owner's only."""

MAX_PARTS = 1024
"""Buffers of one writev, the least that POSIX systems of today take."""


class Clock(Protocol):
    """Two times in seconds: `monotonic` for deadlines and durations, `wall` (Unix) for people."""

    def monotonic(self) -> float:
        """Seconds that never go backwards."""

    def wall(self) -> float:
        """Seconds since 1970."""


class AppendFile(Protocol):
    """A file that grows. Every call but `close` may raise OSError."""

    @property
    def size(self) -> int:
        """Its length in bytes, with what is not synced yet."""

    def write(self, parts: Sequence[Buffer]) -> None:
        """Adds bytes at the end. They outlive this process at once, and the machine's power once they are synced.

        When it raises, some of them may have been added.
        """

    def sync(self) -> None:
        """Everything written before outlives the machine's power. May be called beside `write`."""

    def truncate(self, size: int) -> None:
        """Forgets what lies beyond `size`."""

    def close(self) -> None:
        """Gives the file back, synced or not."""


class ReadFile(Protocol):
    """A file that is read, here and there. Every call but `close` may raise OSError."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fills `target` from `offset` on; gives the bytes that there were, fewer only at the end of the file."""

    def close(self) -> None:
        """Gives the file back."""


class Disk(Protocol):
    """Files and folders. Every call may raise OSError."""

    def boot_id(self) -> str:
        """Names this life of the machine: what was written but not synced in another one may be lost or torn."""

    def create(self, path: Path) -> AppendFile:
        """A new, empty file, whose name is synced. Makes the folder. FileExistsError where there is one."""

    def scratch(self, path: Path) -> AppendFile:
        """As `create`, for what nobody reads after this process: its name is not synced."""

    def open(self, path: Path) -> ReadFile:
        """A file to read. FileNotFoundError where there is none."""

    def truncate(self, path: Path, size: int) -> None:
        """Cuts a file, and syncs it."""

    def names(self, folder: Path) -> list[str]:
        """What lies in a folder, sorted; nothing where there is no such folder, but a file perhaps."""

    def rename(self, source: Path, target: Path) -> None:
        """Moves a file or folder within its folder, atomically, and syncs the name."""

    def remove_folder(self, path: Path) -> None:
        """A folder and all in it are gone; nothing happens when there was none."""

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


class SystemAppendFile:
    """A file of the machine's, open for writing. Takes short writes in its stride."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        self.size = 0

    def write(self, parts: Sequence[Buffer]) -> None:
        left = [view for view in (memoryview(part).cast("B") for part in parts) if len(view)]
        while left:
            written = os.writev(self._file, left[:MAX_PARTS])
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.size += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]

    def sync(self) -> None:
        os.fdatasync(self._file)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)
        self.size = size

    def close(self) -> None:
        os.close(self._file)


class SystemReadFile:
    """A file of the machine's, open for reading."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size

    def read_into(self, offset: int, target: memoryview) -> int:
        filled = 0
        while filled < len(target):
            count = os.preadv(self._file, [target[filled:]], offset + filled)
            if not count:
                break
            filled += count
        return filled

    def close(self) -> None:
        os.close(self._file)


class SystemDisk:
    """The machine's own files."""

    def boot_id(self) -> str:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()

    def create(self, path: Path) -> AppendFile:
        _make_folder(path.parent)
        file = SystemAppendFile(path)
        _sync_folder(path.parent)
        return file

    def scratch(self, path: Path) -> AppendFile:
        _make_folder(path.parent)
        return SystemAppendFile(path)

    def open(self, path: Path) -> ReadFile:
        return SystemReadFile(path)

    def truncate(self, path: Path, size: int) -> None:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)
        _sync_folder(target.parent)

    def remove_folder(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
            _sync_folder(path.parent)

    def read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def replace(self, path: Path, content: bytes) -> None:
        _make_folder(path.parent)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        with open(scratch, "wb", opener=_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_folder(path.parent)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        _make_folder(path.parent)
        with open(path, "a", opener=_private) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise NotReady(
                    f"{path}: another server holds this lock; give this one a --data (or socket) of its own"
                ) from error
            yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, FILE_MODE)


def _make_folder(path: Path) -> None:
    """Makes a folder, with those above it, each for its owner only and with its name synced."""
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    _make_folder(path.parent)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def new_epoch() -> int:
    """A random epoch, 1 to 2^63 - 1: no two servers, and no two lives of one, give the same."""
    return secrets.randbits(63) or 1
