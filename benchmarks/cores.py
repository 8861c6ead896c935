"""Cores: how long this thread waited for one while other processes had one. Linux tells; elsewhere nothing is known."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memstore.index.courtesy import NotCounted, waited_for_a_core_s

if TYPE_CHECKING:
    from collections.abc import Mapping

PROCESSES = Path("/proc")
CLOCK_OF_A_PROCESS = 2
"""Linux has a clock for each process, whose number is made of the process's (clock_getcpuclockid(3))."""


@dataclass(frozen=True, slots=True)
class Moment:
    """waited_s: how long the thread that looked had waited for a core by then. others_ns: time of cores by process."""

    waited_s: float
    others_ns: Mapping[int, int]

    def others_s(self, before: Moment) -> float:
        """Seconds of cores that other processes had between the two."""
        return sum(after - before.others_ns.get(number, 0) for number, after in self.others_ns.items()) / 1e9

    def lost_s(self, before: Moment) -> float:
        """Seconds that the thread waited for a core, as far as others had one meanwhile."""
        return min(self.waited_s - before.waited_s, self.others_s(before))


def now() -> Moment:
    """Of this thread. Takes a fraction of a millisecond."""
    try:
        waited_s, numbers = waited_for_a_core_s(), os.listdir(PROCESSES)
    except (NotCounted, OSError):
        return Moment(0.0, {})
    others, mine = {}, os.getpid()
    for name in numbers:
        if name.isdigit() and (number := int(name)) != mine:
            with suppress(OSError):  # it has ended
                others[number] = time.clock_gettime_ns(~number << 3 | CLOCK_OF_A_PROCESS)
    return Moment(waited_s, others)
