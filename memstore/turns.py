"""Turns: whose queued jobs the device serves next, and how long a job would wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

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
_NEW, _NEW_IF_FAR, _FAR = 0.2, 0.5, 4.0
"""Weights of the last turn in what is known of a lane. One that took more than four times as long counts as four times,
and is soon forgotten: it shall not get others refused.
"""
_KEPT = 0.9
"""Of what is known of the turns of others, with each turn."""
_MARGIN = 1.1
"""For what is not known: whoever is admitted at the very limit should still be answered in time."""
MAX_LANES = 1024
"""Lanes that are remembered while nothing waits in them."""


@dataclass(slots=True)
class _Lane(Generic[T]):
    """One tenant's jobs, in order.

    used_s: time of the device it has had, or gave up. mean_s, turn_s: what a job and a turn take, lately. ended:
    the end of the last turn, where that left jobs behind. passed_s, had_s: lately, the time from such ends to the next
    ones, and what the lane had of it.
    """

    jobs: deque[T] = field(default_factory=deque)
    used_s: float = 0.0
    mean_s: float = 0.0
    turn_s: float = 0.0
    ended: float | None = None
    passed_s: float = 0.0
    had_s: float = 0.0

    @property
    def ahead_s(self) -> float:
        """What its queued jobs should take."""
        return len(self.jobs) * self.mean_s

    @property
    def stretch(self) -> float:
        """How much longer its jobs take to be served than the device needs for them: what others have meanwhile."""
        return max(1.0, self.passed_s / self.had_s) if self.had_s > 0 else 1.0

    def learn(self, seconds: float, now: float) -> None:
        """Takes note of a turn."""
        if self.ended is not None:
            self.passed_s = _KEPT * self.passed_s + now - self.ended
            self.had_s = _KEPT * self.had_s + seconds
        self.ended = now if self.jobs else None


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
        number = len(lane.jobs)
        if lane is not self._server:
            number = min(number, max(LEAST_JOBS, int(TURN_S / lane.mean_s)) if lane.mean_s > 0 else FIRST_JOBS)
        self._turn, self._begun, self._ends = lane, now, now + number * lane.mean_s
        self._num_jobs -= number
        if number == len(lane.jobs):
            jobs = list(lane.jobs)
            lane.jobs.clear()
            return jobs
        return [lane.jobs.popleft() for _ in range(number)]

    def end(self, now: float, num_served: int) -> None:
        """The turn that was taken has been served, but for those of its jobs that were late or given up."""
        lane, self._turn = self._turn, None
        if lane is None or lane is self._server:
            return
        seconds = now - self._begun
        self._used_s = max(self._used_s, lane.used_s)  # whoever comes now begins where this turn began
        lane.used_s += max(seconds, LEAST_COST_S)
        lane.learn(seconds, now)
        if num_served:  # or else jobs that cost nothing would make others look cheap
            lane.mean_s = _mean(lane.mean_s, seconds / num_served)
            lane.turn_s = _mean(lane.turn_s, seconds)

    def finish_s(self, name: str, now: float) -> float:
        """How long until a job that is put into a lane now should be answered; 0 where nothing is in its way.

        It is answered with all others of its turn.
        """
        wait_s, lane = self._wait_s(name, now), self._lanes.get(name)
        return _MARGIN * (wait_s + max(lane.mean_s, lane.turn_s)) if wait_s and lane is not None else wait_s

    def _wait_s(self, name: str, now: float) -> float:
        left_s = 0.0 if self._turn is None else max(0.0, self._ends - now)
        if not self._num_jobs:
            return left_s
        own = self._lanes.get(name)
        own_s = 0.0 if own is None else own.ahead_s
        share_s = own_s + TURN_S
        rivals = (lane.ahead_s for other, lane in self._lanes.items() if lane.jobs and other != name)
        rivals_s = sum(min(ahead_s, share_s) for ahead_s in rivals)
        return left_s + max(own_s + rivals_s, own_s * (1.0 if own is None else own.stretch))

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


def _mean(known: float, last: float) -> float:
    if known <= 0:
        return last
    weight = _NEW_IF_FAR if last * _FAR < known else _NEW
    return known + weight * (min(last, _FAR * known) - known)
