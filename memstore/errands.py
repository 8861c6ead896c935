"""Errands: work for tenants, one piece at a time of each, in one thread that never waits for a device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Steps = Generator["Future[Any]", Any, T]
"""Work that yields each future that it has to wait for, and is sent its result, or has its error raised there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errand:
    """Whose it is, what is left of it, and what comes of it."""

    tenant: str
    steps: Steps[Any]
    outcome: Future[Any] = field(default_factory=Future)


class Errands:
    """Begins the errands of one tenant in order, each when the one before has ended; tenants take turns.

    While one waits, those of others go on. Thread safe, but nothing is added once it is being closed.
    """

    def __init__(self, name: str) -> None:
        """name: of the thread."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lines: dict[str, deque[_Errand]] = {}  # the first of each has begun, or is about to
        self._changed = threading.Condition()  # holds the lines

    def submit(self, run: Callable[[], T]) -> Future[T]:
        """Runs something in the thread, before what is added later; it may wait, and all wait for it then."""
        return self._thread.submit(run)

    def add(self, tenant: str, steps: Steps[T]) -> Future[T]:
        """What comes of an errand. Until it has begun it can be cancelled."""
        errand = _Errand(tenant=tenant, steps=steps)
        with self._changed:
            line = self._lines.setdefault(tenant, deque())
            line.append(errand)
            if len(line) == 1:
                self._thread.submit(self._begin, errand)
        return errand.outcome

    def close(self) -> None:
        """Waits for the end of all that was added, and ends the thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines)
        self._thread.shutdown()

    def _begin(self, errand: _Errand) -> None:
        if errand.outcome.set_running_or_notify_cancel():
            self._go_on(errand, partial(next, errand.steps))
        else:
            self._end(errand)

    def _go_on(self, errand: _Errand, advance: Callable[[], Future[Any]]) -> None:
        try:
            awaited = advance()
        except StopIteration as done:
            errand.outcome.set_result(done.value)
        except BaseException as error:  # as an executor does: whatever it is, it is the outcome
            errand.outcome.set_exception(error)
        else:
            awaited.add_done_callback(
                lambda _: self._thread.submit(self._go_on, errand, _sending(errand.steps, awaited))
            )
            return
        self._end(errand)

    def _end(self, errand: _Errand) -> None:
        with self._changed:
            line = self._lines[errand.tenant]
            line.popleft()
            if line:
                self._thread.submit(self._begin, line[0])  # behind what others have waiting
            else:
                del self._lines[errand.tenant]
                self._changed.notify_all()


def _sending(steps: Steps[Any], awaited: Future[Any]) -> Callable[[], Future[Any]]:
    """What goes on with what was waited for; waits for it where it is not there yet."""
    error = awaited.exception()
    return partial(steps.send, awaited.result()) if error is None else partial(steps.throw, error)


def run(steps: Steps[T]) -> T:
    """Does an errand in this thread, which waits for what it has to wait for."""
    advance: Callable[[], Future[Any]] = partial(next, steps)
    while True:
        try:
            awaited = advance()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # as the generator says
        advance = _sending(steps, awaited)
