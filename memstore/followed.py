"""Followed: what files say, read again when they have changed."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from memstore.config import ConfigError
from memstore.logs import event, trouble

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from memstore.seams import Clock

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Followed(Generic[T]):
    """What `parse` makes of some files. What cannot be read later leaves what was known, and is logged once.

    What is wrong in a file is looked at again when it has changed; what the disk or the process refused, or was a bug,
    at every look. Any thread may ask.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[], T], clock: Clock, every_s: float) -> None:
        """parse: reads the files; raises ConfigError or OSError, which stops the start. every_s: least time between two
        looks at whether a file has changed.
        """
        self._paths = tuple(paths)
        self._parse = parse
        self._clock = clock
        self._every_s = every_s
        self._lock = threading.Lock()
        self._seen = self._look()
        self._value = parse()
        self._is_stale = self._is_unread = False
        self._next_look = clock.monotonic() + every_s

    def now(self) -> T:
        """What they say now."""
        if self._clock.monotonic() >= self._next_look:
            self._refresh()
        return self._value

    @property
    def known(self) -> T:
        """What they said when they were looked at last: for threads that must not wait for the disk."""
        return self._value

    @property
    def is_stale(self) -> bool:
        """True while the files say something that could not be taken."""
        self.now()
        return self._is_stale

    def _refresh(self) -> None:
        with self._lock:
            self._next_look = self._clock.monotonic() + self._every_s
            found = self._look()
            has_changed, self._seen = found != self._seen, found
            if not (has_changed or self._is_unread):
                return
            names = ", ".join(map(str, self._paths))
            try:
                self._value = self._parse()
            except Exception as error:  # a root: a bug in reading must not fail whoever asks, a handshake for one
                self._is_stale, self._is_unread = True, not isinstance(error, ConfigError)
                if has_changed:
                    self._say(error, names)
            else:
                self._is_stale = self._is_unread = False
                event(_log, logging.INFO, "changed file taken", files=names)

    def _say(self, error: Exception, names: str) -> None:
        what = "changed file not taken, what was known stays"
        if isinstance(error, ConfigError | OSError):
            event(_log, logging.ERROR, what, files=names, reason=error)
        else:
            trouble(_log, what, error, files=names)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What tells one state of the files from another; None for one that is not there."""
        return tuple(map(_mark, self._paths))


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
