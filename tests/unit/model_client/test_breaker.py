"""The breaker: opens, lets one probe through, closes; an open one costs nothing."""

from __future__ import annotations

import pytest

from model_client.breaker import Breaker
from model_client.errors import CircuitOpen
from tests.faulty import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> Breaker:
    return Breaker(3, 2.0, clock)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.check()
        breaker.record(False)


def test_opens_after_failures_in_a_row(breaker: Breaker) -> None:
    fail(breaker, 2)
    breaker.check()
    breaker.record(True)
    fail(breaker, 3)
    assert breaker.is_open
    with pytest.raises(CircuitOpen) as raised:
        breaker.check()
    assert raised.value.retry_after_s == pytest.approx(2.0)


def test_one_probe_when_the_time_is_over(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 2.0
    breaker.check()
    with pytest.raises(CircuitOpen):
        breaker.check()
    breaker.record(True)
    breaker.check()
    assert not breaker.is_open


def test_a_probe_that_fails_keeps_it_open(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 2.0
    fail(breaker, 1)
    clock.now += 1.9
    with pytest.raises(CircuitOpen):
        breaker.check()


def test_a_probe_nobody_hears_of_again_does_not_close_the_door_for_ever(breaker: Breaker, clock: FakeClock) -> None:
    fail(breaker, 3)
    clock.now += 2.0
    breaker.check()
    clock.now += 2.0
    breaker.check()


@pytest.mark.parametrize(("failures", "open_s"), [(0, 1.0), (1, 0.0)])
def test_limits(clock: FakeClock, failures: int, open_s: float) -> None:
    with pytest.raises(ValueError, match="breaker"):
        Breaker(failures, open_s, clock)
