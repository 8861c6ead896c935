"""Admission: the budgets of one device, for requests in flight and for bytes that memories reserve."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from memstore.errors import DeviceMemoryFull, Overloaded

SHORTEST_DELAY_S = 0.005
LONGEST_DELAY_S = 1.0
ROOM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """The most that may be in flight, and the share of it that one tenant may hold.

    leaves_room: a tenant never holds more than ROOM times what it leaves free, so that there is always room for one
    that comes; and whoever holds nothing is not refused for bytes.
    """

    max_requests: int = 1024
    max_bytes: int = 256 << 20
    tenant_ratio: float = 1.0
    leaves_room: bool = False


class Admission:
    """Requests in flight on one device: admitted or refused at once, released when answered. Thread safe."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, int]] = {}
        self._total = self._total_bytes = 0
        self._mean_s = 0.001

    @property
    def num_requests(self) -> int:
        """Requests admitted and not yet released."""
        return self._total

    @property
    def num_bytes(self) -> int:
        """Bytes of those requests."""
        return self._total_bytes

    def admit(self, tenant: str, num_bytes: int) -> None:
        """Takes the request into the budget. Overloaded when it has no room; a lone request is never refused."""
        limits = self._limits
        with self._lock:
            requests, size = self._held.get(tenant, (0, 0))
            total, total_bytes = self._total, self._total_bytes
            own_full = requests >= max(1, int(limits.max_requests * limits.tenant_ratio))
            own_full |= requests > 0 and size + num_bytes > limits.max_bytes * limits.tenant_ratio
            full = total >= limits.max_requests or (total > 0 and total_bytes + num_bytes > limits.max_bytes)
            if limits.leaves_room:
                left, left_bytes = limits.max_requests - total, limits.max_bytes - total_bytes - num_bytes
                own_full |= requests > 0 and (requests >= ROOM * left or size + num_bytes > ROOM * left_bytes)
                full = left <= 0
            if own_full or full:
                delay = min(max(self._mean_s * max(total, 1), SHORTEST_DELAY_S), LONGEST_DELAY_S)
                whose = "this tenant's share of the queue" if own_full and not full else "the queue"
                raise Overloaded(f"{whose} is full", delay)
            self._held[tenant] = (requests + 1, size + num_bytes)
            self._total, self._total_bytes = total + 1, total_bytes + num_bytes

    def release(self, tenant: str, num_bytes: int, served_s: float) -> None:
        """Gives the room back. `served_s`: the device's time it took, for the delay told to others."""
        with self._lock:
            requests, size = self._held.pop(tenant)
            if requests > 1:
                self._held[tenant] = (requests - 1, size - num_bytes)
            self._total -= 1
            self._total_bytes -= num_bytes
            if served_s > 0:
                self._mean_s += 0.1 * (served_s - self._mean_s)


class CapacityBudget:
    """Bytes of a device that memories may reserve. Thread safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = 0
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int) -> None:
        """Takes the bytes. DeviceMemoryFull, and nothing is taken, when they are not left."""
        with self._lock:
            is_left = num_bytes <= self.capacity_bytes - self.reserved_bytes
            self.reserved_bytes += num_bytes if is_left else 0
        if not is_left:  # how much is left would tell of other tenants
            raise DeviceMemoryFull(
                f"the memory would reserve {num_bytes} bytes, which the device has not left", needed_bytes=num_bytes
            )

    def release(self, num_bytes: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self.reserved_bytes -= num_bytes
