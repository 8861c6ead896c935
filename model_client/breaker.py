"""Breaker: keeps a failing server from being asked at every step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from model_client.errors import CircuitOpen

if TYPE_CHECKING:
    from model_client.seams import Clock


class Breaker:
    """Opens after `failures` consecutive failures; then lets one probe through every `open_s` seconds.

    A probe that succeeds closes it. A probe whose outcome is never told counts as failed once `open_s` have passed.
    Safe from any thread.
    """

    def __init__(self, failures: int, open_s: float, clock: Clock) -> None:
        if failures < 1 or open_s <= 0:
            raise ValueError("breaker: failures must be 1 or more, and the open time above 0")
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._closed_until: float | None = None

    @property
    def is_open(self) -> bool:
        """True while calls fail at once; a probe may be due."""
        return self._closed_until is not None

    def check(self) -> None:
        """Lets a call through, or raises CircuitOpen at once. The call that is let through while open is the probe."""
        if self._closed_until is None:
            return
        with self._lock:
            now = self._clock.monotonic()
            if self._closed_until is not None and now < self._closed_until:
                wait_s = self._closed_until - now
                raise CircuitOpen(
                    f"{self._failures} calls failed in a row; next try in {wait_s:.3g} s", retry_after_s=wait_s
                )
            if self._closed_until is not None:
                self._closed_until = now + self._open_s

    def record(self, is_success: bool) -> None:
        """Tells the outcome of a call that `check` let through."""
        with self._lock:
            if is_success:
                self._failures = 0
                self._closed_until = None
                return
            self._failures += 1
            if self._failures >= self._limit:
                self._closed_until = self._clock.monotonic() + self._open_s
