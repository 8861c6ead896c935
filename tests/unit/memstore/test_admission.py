"""Admission: budgets are exact, and refusals change nothing."""

from __future__ import annotations

import pytest

from memstore.admission import LONGEST_DELAY_S, SHORTEST_DELAY_S, Admission, CapacityBudget, QueueLimits
from memstore.errors import DeviceMemoryFull, Overloaded


def test_requests_are_counted() -> None:
    admission = Admission(QueueLimits(max_requests=2))
    admission.admit("t", 10)
    admission.admit("t", 20)
    with pytest.raises(Overloaded, match="queue is full") as caught:
        admission.admit("t", 0)
    assert SHORTEST_DELAY_S <= caught.value.retry_delay_s <= LONGEST_DELAY_S
    assert (admission.num_requests, admission.num_bytes) == (2, 30)
    admission.release("t", 10, 0.1)
    admission.admit("t", 5)
    assert (admission.num_requests, admission.num_bytes) == (2, 25)


def test_bytes_are_counted_but_a_lone_request_may_have_any() -> None:
    admission = Admission(QueueLimits(max_bytes=100))
    admission.admit("t", 1000)
    with pytest.raises(Overloaded):
        admission.admit("t", 1)
    admission.release("t", 1000, 0.1)
    admission.admit("t", 60)
    admission.admit("t", 40)
    with pytest.raises(Overloaded):
        admission.admit("t", 1)


def test_one_tenant_leaves_room_for_others() -> None:
    admission = Admission(QueueLimits(max_requests=4, tenant_ratio=0.5))
    admission.admit("loud", 1)
    admission.admit("loud", 1)
    with pytest.raises(Overloaded, match="tenant's share"):
        admission.admit("loud", 1)
    admission.admit("quiet", 1)
    admission.admit("quiet", 1)
    with pytest.raises(Overloaded, match="the queue is full"):
        admission.admit("third", 1)


def test_a_tenant_that_leaves_room_never_fills_the_queue() -> None:
    admission = Admission(QueueLimits(max_requests=100, max_bytes=1000, leaves_room=True))
    for _ in range(80):
        admission.admit("loud", 1)
    with pytest.raises(Overloaded, match="tenant's share"):
        admission.admit("loud", 1)
    held = 0
    while True:
        try:
            admission.admit("late", 1)
        except Overloaded:
            break
        held += 1
    assert held == 16  # four times what is still free then
    admission.admit("third", 1)


def test_whoever_holds_nothing_is_not_refused_for_the_bytes_of_others() -> None:
    admission = Admission(QueueLimits(max_requests=100, max_bytes=1000, leaves_room=True))
    admission.admit("loud", 800)
    with pytest.raises(Overloaded):
        admission.admit("loud", 100)
    admission.admit("late", 900)
    with pytest.raises(Overloaded):
        admission.admit("late", 1)


def test_the_delay_grows_with_what_requests_cost() -> None:
    def delay(served_s: float) -> float:
        admission = Admission(QueueLimits(max_requests=20))
        for _ in range(20):
            admission.admit("t", 1)
        for _ in range(10):
            admission.release("t", 1, served_s)
            admission.admit("t", 1)
        with pytest.raises(Overloaded) as caught:
            admission.admit("t", 1)
        return caught.value.retry_delay_s

    assert delay(0.0001) < delay(0.01) <= LONGEST_DELAY_S
    assert delay(10.0) == LONGEST_DELAY_S


def test_capacity_is_taken_whole_or_not_at_all() -> None:
    budget = CapacityBudget(100)
    budget.reserve(60)
    with pytest.raises(DeviceMemoryFull, match="41 bytes, which the device has not left") as caught:
        budget.reserve(41)
    assert caught.value.metadata == {"needed_bytes": "41"}
    budget.reserve(40)
    budget.release(60)
    assert budget.reserved_bytes == 40
