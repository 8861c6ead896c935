"""Quotas: what each tenant may take of bytes, sequences, calls, leases and files."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memstore.errors import Overloaded, QuotaExceeded

if TYPE_CHECKING:
    from memstore.auth import Authenticator
    from memstore.seams import Clock
    from memstore.tokens import Quota

BURST_S = 1.0
"""So many seconds' calls may come at once."""
SEQUENCES_A_LEASE = 32
"""Sequences that can be lent for each lease that may be given out; one lease may have more, and others fewer."""
MAX_TENANTS = 4096
"""Tenants whose calls are remembered; those that have their whole burst are forgotten beyond that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What all memories of a tenant have reserved of device and host, and sequences that they have room for."""

    reserved_bytes: int
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """Leases that a tenant has, or was offered, and sequences of them all."""

    leases: int
    sequences: int


@dataclass(slots=True)
class _Calls:
    """How many calls a tenant may make at `at` (monotonic seconds)."""

    left: float
    at: float


class Quotas:
    """The quota of every tenant, the calls it has made, and what it has in files of spilled sequences.

    Calls are counted by one thread; any may ask the rest.
    """

    def __init__(self, authenticator: Authenticator, default: Quota, clock: Clock) -> None:
        """default: for tenants, and fields, that the credentials' file says nothing of."""
        self._authenticator = authenticator
        self._default = default
        self._clock = clock
        self._calls: dict[str, _Calls] = {}
        self._lock = threading.Lock()
        self._spilled: dict[str, int] = {}

    def of(self, tenant: str) -> Quota:
        """What a tenant may take."""
        own = self._authenticator.quota(tenant)
        if own is None:
            return self._default
        return replace(
            own,
            reserved_bytes=own.reserved_bytes or self._default.reserved_bytes,
            sequences=own.sequences or self._default.sequences,
            calls_per_s=own.calls_per_s or self._default.calls_per_s,
            leases=own.leases or self._default.leases,
            spilled_bytes=own.spilled_bytes or self._default.spilled_bytes,
        )

    def check(self, tenant: str, held: Held, needed: Held) -> None:
        """QuotaExceeded where a tenant that holds so much would hold more than it may."""
        quota = self.of(tenant)
        rows = (
            ("bytes", held.reserved_bytes, needed.reserved_bytes, quota.reserved_bytes),
            ("sequences", held.sequences, needed.sequences, quota.sequences),
        )
        for name, has, more, limit in rows:
            if limit and has + more > limit:
                text = f"the memory would reserve {more}; {limit} are allowed, and {has} are reserved"
                raise _exceeded(name, text, (limit, has, more))

    def check_lent(self, tenant: str, held: Lent, num_sequences: int) -> None:
        """QuotaExceeded where a tenant that has so much lent may have no lease of so many sequences besides."""
        limit = self.of(tenant).leases
        if limit and held.leases + 1 > limit:
            raise _exceeded("leases", f"{limit} are allowed, and {held.leases} are held", (limit, held.leases, 1))
        most, lent = limit * SEQUENCES_A_LEASE, held.sequences
        if limit and lent + num_sequences > most:
            text = f"of sequences {most} can be lent, {lent} are, and {num_sequences} are asked for"
            raise _exceeded("leases", text, (most, lent, num_sequences))

    def spilled(self, tenant: str) -> SpilledBytes:
        """What a memory of this tenant takes its files from."""
        return SpilledBytes(self, tenant)

    def take_spilled(self, tenant: str, num_bytes: int, *, is_bounded: bool) -> None:
        """See SpilledBytes.take."""
        limit = self.of(tenant).spilled_bytes if is_bounded else 0
        with self._lock:
            has = self._spilled.get(tenant, 0)
            if limit and has + num_bytes > limit:
                text = f"a file would take {num_bytes}; {limit} are allowed, and {has} are taken"
                raise _exceeded("spilled_bytes", text, (limit, has, num_bytes))
            self._spilled[tenant] = has + num_bytes

    def give_back_spilled(self, tenant: str, num_bytes: int) -> None:
        """See SpilledBytes.give_back."""
        with self._lock:
            left = self._spilled.get(tenant, 0) - num_bytes
            if left > 0:
                self._spilled[tenant] = left
            else:
                self._spilled.pop(tenant, None)

    def call(self, tenant: str) -> None:
        """Counts a call. Overloaded, and it is not counted, where the tenant has made too many."""
        rate = self._rate(tenant)
        if not rate:
            return
        now, most = self._clock.monotonic(), max(1.0, rate * BURST_S)
        calls = self._calls.get(tenant)
        if calls is None:
            self._forget(now)
            calls = self._calls[tenant] = _Calls(most, now)
        calls.left = min(most, calls.left + (now - calls.at) * rate)
        calls.at = now
        if calls.left < 1.0:
            raise Overloaded(f"quota calls_per_s: {rate:g} calls a second are allowed", (1.0 - calls.left) / rate)
        calls.left -= 1.0

    def _rate(self, tenant: str) -> float:
        own = self._authenticator.quota(tenant)
        return (own.calls_per_s if own is not None else 0.0) or self._default.calls_per_s

    def _forget(self, now: float) -> None:
        """Keeps the table of tenants bounded. Whoever has been quiet for a burst is as good as never seen."""
        if len(self._calls) >= MAX_TENANTS:
            self._calls = {tenant: calls for tenant, calls in self._calls.items() if now - calls.at < BURST_S}


class SpilledBytes:
    """What a tenant has in files of spilled sequences; see Allowance in filed.py."""

    def __init__(self, quotas: Quotas, tenant: str) -> None:
        self._quotas = quotas
        self._tenant = tenant

    def take(self, num_bytes: int, *, is_bounded: bool) -> None:
        self._quotas.take_spilled(self._tenant, num_bytes, is_bounded=is_bounded)

    def give_back(self, num_bytes: int) -> None:
        self._quotas.give_back_spilled(self._tenant, num_bytes)


def _exceeded(quota: str, text: str, numbers: tuple[int, int, int]) -> QuotaExceeded:
    """numbers: what is allowed, held and asked for, all of the tenant's own."""
    limit, held, needed = numbers
    return QuotaExceeded(f"quota {quota}: {text}", quota=quota, limit=limit, held=held, needed=needed)
