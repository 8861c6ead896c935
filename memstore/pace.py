"""Pace: what the jobs of one lane take, and how long they wait between turns, learnt from the turns it has had.

Three things are known of a lane, all of them of lately, and all 0 or 1 before its first turn:

    job_s     time of the device that one of its jobs takes
    turn_s    the same of one of its turns: jobs are answered when their turn is over
    stretch   while its jobs wait, how much longer than the device needs for them it takes until they are served,
              as others have their turns meanwhile: 1.0 for a lane that has the device to itself
"""

from __future__ import annotations

NEW, NEW_IF_FAR, FAR = 0.2, 0.5, 4.0
"""Weights of the last turn in job_s and turn_s. One that took more than four times as long counts as four times, and
after one that took less than a fourth the old is soon forgotten: a slow turn shall not get others refused for long.
"""
KEPT = 0.9
"""Of what earlier turns say of the stretch, with each turn."""


class Pace:
    """See above. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.job_s = 0.0
        self.turn_s = 0.0
        self._waits_since: float | None = None  # the end of the last turn, where that left jobs behind
        self._passed_s = 0.0  # from such ends to those of the next turns, ...
        self._had_s = 0.0  # ... and what the lane had of that; older ones count for less

    @property
    def stretch(self) -> float:
        """See above; 1.0 at least."""
        return max(1.0, self._passed_s / self._had_s) if self._had_s > 0 else 1.0

    def turned(self, seconds: float, now: float, *, num_served: int, has_more: bool) -> None:
        """A turn of the lane is over, and took so long. num_served: of its jobs. has_more: others still wait."""
        if self._waits_since is not None:
            self._passed_s = KEPT * self._passed_s + now - self._waits_since
            self._had_s = KEPT * self._had_s + seconds
        self._waits_since = now if has_more else None
        if num_served:  # or else jobs that cost nothing, as they were late, would make others look cheap
            self.job_s = _mean(self.job_s, seconds / num_served)
            self.turn_s = _mean(self.turn_s, seconds)


def _mean(known: float, last: float) -> float:
    if known <= 0:
        return last
    weight = NEW_IF_FAR if last * FAR < known else NEW
    return known + weight * (min(last, FAR * known) - known)
