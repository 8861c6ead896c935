"""ClientStats: what a client has done so far, in numbers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class ClientStats:
    """Counters of one client since it was made; only ever grow. Safe to add to from any thread.

    calls: calls begun, steps included. failures: calls that raised, late and skipped ones included.
    late: calls without an answer in time. skipped: calls that the open breaker kept from the network.
    retries: attempts after the first of a call. resends: appends asked for again because their outcome was not known.
    lost_epochs: sequences found reset or lost, and begun again. dropped_rows: rows that were to be appended and were
    not, per layer. sent_bytes, received_bytes: tensor bytes inside messages; 0 in process.
    reused_rows: rows of answers that did not travel, as the session had them of former ones.
    waited_s: seconds callers spent waiting for answers. leases: times that sequences were lent to this process.
    mapped_steps: calls answered in this process, on memory that a server has lent. orphaned_steps: the same after the
    server had gone.
    """

    calls: int = 0
    failures: int = 0
    late: int = 0
    skipped: int = 0
    retries: int = 0
    resends: int = 0
    lost_epochs: int = 0
    dropped_rows: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    reused_rows: int = 0
    waited_s: float = 0.0
    leases: int = 0
    mapped_steps: int = 0
    orphaned_steps: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, name: str, amount: float = 1) -> None:
        """Raises one counter."""
        with self._lock:
            setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, float]:
        """The counters by name, at one moment."""
        with self._lock:
            return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "_lock"}
