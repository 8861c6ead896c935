"""Turns: whose queued jobs the device serves next, and how long a job would wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from memstore.pace import Pace

T = TypeVar("T")
SERVER = ""
"""The lane of the server's own work, which goes before all others."""
TURN_S = 0.005
"""Time of the device that one turn should take."""
LEAST_JOBS = 4
"""Jobs of a turn, however long they take: they may be joined."""
FIRST_JOBS = 32
"""Jobs of a turn of which it is not known what they take."""
LEAST_COST_S = 1e-6
"""What a turn counts as at least, and each job of a turn that is to be filled: by the clock they may take no time."""
_MARGIN = 1.1
"""For what is not known: whoever is admitted at the very limit should still be answered in time."""
MAX_LANES = 1024
"""Lanes that are remembered while nothing waits in them."""


@dataclass(slots=True)
class _Lane(Generic[T]):
    """One tenant's jobs, in order. used_s: time of the device that it has had, or gave up by having no jobs."""

    jobs: deque[T] = field(default_factory=deque)
    used_s: float = 0.0
    pace: Pace = field(default_factory=Pace)

    @property
    def ahead_s(self) -> float:
        """What its queued jobs should take."""
        return len(self.jobs) * self.pace.job_s

    @property
    def num_next(self) -> int:
        """How many of them its next turn should have."""
        job_s = self.pace.job_s
        fit = int(TURN_S / max(job_s, LEAST_COST_S)) if job_s > 0 else FIRST_JOBS
        return min(len(self.jobs), max(LEAST_JOBS, fit))


class Turns(Generic[T]):
    """Lanes that take turns, so that each gets an equal share of the device's time for as long as it has jobs.

    The lane that has had the least time is next. A lane that had no jobs meanwhile saves nothing up. Within a lane jobs
    keep their order. Used under a lock; times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._server: _Lane[T] = _Lane()
        self._lanes: dict[str, _Lane[T]] = {}
        self._num_jobs = 0
        self._used_s = 0.0
        self._turn: _Lane[T] | None = None  # whose turn it is, since when, and when it should be over
        self._begun = self._ends = 0.0

    def __len__(self) -> int:
        """Jobs that wait."""
        return self._num_jobs

    def put(self, name: str, job: T) -> None:
        """Queues a job in the lane of this name."""
        lane = self._server if name == SERVER else self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = self._new_lane()
        if not lane.jobs:
            lane.used_s = max(lane.used_s, self._used_s)
        lane.jobs.append(job)
        self._num_jobs += 1

    def take(self, now: float) -> list[T]:
        """The jobs of the next turn; none where none wait. As many as should fit into TURN_S."""
        lane = self._server if self._server.jobs else self._next()
        if lane is None:
            return []
        number = len(lane.jobs) if lane is self._server else lane.num_next
        self._turn, self._begun, self._ends = lane, now, now + number * lane.pace.job_s
        self._num_jobs -= number
        if number == len(lane.jobs):
            jobs = list(lane.jobs)
            lane.jobs.clear()
            return jobs
        return [lane.jobs.popleft() for _ in range(number)]

    def clear(self) -> list[T]:
        """All jobs that wait, which wait no more."""
        lanes = (self._server, *self._lanes.values())
        jobs = [job for lane in lanes for job in lane.jobs]
        for lane in lanes:
            lane.jobs.clear()
        self._num_jobs = 0
        return jobs

    def end(self, now: float, num_served: int) -> None:
        """The turn that was taken has been served, but for those of its jobs that were late or given up."""
        lane, self._turn = self._turn, None
        if lane is None or lane is self._server:
            return
        seconds = now - self._begun
        self._used_s = max(self._used_s, lane.used_s)  # whoever comes now begins where this turn began
        lane.used_s += max(seconds, LEAST_COST_S)
        lane.pace.turned(seconds, now, num_served=num_served, has_more=bool(lane.jobs))

    def finish_s(self, name: str, now: float) -> float:
        """How long until a job that is put into a lane now should be answered; 0 where nothing is in its way.

        It is answered with all others of its turn.
        """
        wait_s, lane = self._wait_s(name, now), self._lanes.get(name)
        if not wait_s or lane is None:
            return wait_s
        return _MARGIN * (wait_s + max(lane.pace.job_s, lane.pace.turn_s))

    def _wait_s(self, name: str, now: float) -> float:
        """How long until the turn of such a job should begin.

        What is left of the present turn, then the larger of two estimates: by what is queued now, which does not see
        who will come while it waits; and by how long those before it in its own lane lately had to wait, which does not
        see who has come since.
        """
        left_s = 0.0 if self._turn is None else max(0.0, self._ends - now)
        if not self._num_jobs:
            return left_s
        own = self._lanes.get(name) or _Lane()
        by_queues_s = own.ahead_s + sum(
            min(lane.ahead_s, own.ahead_s + TURN_S)  # each other lane gets as much as this one, and a turn more at most
            for other, lane in self._lanes.items()
            if lane.jobs and other != name
        )
        return left_s + max(by_queues_s, own.ahead_s * own.pace.stretch)

    def _next(self) -> _Lane[T] | None:
        best = None
        for lane in self._lanes.values():
            if lane.jobs and (best is None or lane.used_s < best.used_s):
                best = lane
        return best

    def _new_lane(self) -> _Lane[T]:
        """A lane; those that nothing waits in are forgotten where there are too many."""
        if len(self._lanes) >= MAX_LANES:
            self._lanes = {name: lane for name, lane in self._lanes.items() if lane.jobs}
        return _Lane()
