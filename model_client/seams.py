"""Clock: the client's only door to time. Tests put one in its place that takes no time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

    from google.protobuf.message import Message


class Clock:
    """The real one. Seconds throughout."""

    def monotonic(self) -> float:
        """Now; never goes back."""
        return time.monotonic()

    def pause(self, seconds: float) -> None:
        """Lets time pass, blocking."""
        time.sleep(seconds)

    async def pause_async(self, seconds: float) -> None:
        """Lets time pass, awaiting."""
        await asyncio.sleep(seconds)

    def wait(self, future: Future[Message], seconds: float) -> None:
        """Blocks until the future has its outcome, or the time is over."""
        with contextlib.suppress(TimeoutError):
            future.exception(seconds)

    async def wait_async(self, future: Future[Message], seconds: float) -> None:
        """Awaits until the future has its outcome, or the time is over. Cancelling it leaves the future alone."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def tell(_: Future[Message]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by then
                loop.call_soon_threadsafe(done.set)

        future.add_done_callback(tell)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), seconds)
