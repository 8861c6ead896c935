"""Turns: equal shares of the device's time, order within a tenant, and honest waits."""

from __future__ import annotations

import pytest

from memstore.turns import FIRST_JOBS, LEAST_JOBS, MAX_LANES, SERVER, TURN_S, Turns


class Device:
    """Serves turns, at a price a job that depends on the tenant; time is a number."""

    def __init__(self, **prices: float) -> None:
        self.turns: Turns[tuple[str, int]] = Turns()
        self.prices = prices
        self.now = 100.0
        self.used: dict[str, float] = dict.fromkeys(prices, 0.0)

    def put(self, name: str, *numbers: int) -> None:
        for number in numbers:
            self.turns.put(name, (name, number))

    def serve(self) -> list[tuple[str, int]]:
        jobs = self.turns.take(self.now)
        for name, _ in jobs:
            self.now += self.prices[name]
            self.used[name] += self.prices[name]
        self.turns.end(self.now, len(jobs))
        return jobs


def test_jobs_are_served_in_order_and_a_few_at_first() -> None:
    device = Device(a=0.0001)
    device.put("a", *range(100))
    assert device.serve() == [("a", number) for number in range(FIRST_JOBS)]
    assert len(device.serve()) == pytest.approx(TURN_S / 0.0001, abs=1)
    assert device.serve()[-1] == ("a", 99)
    assert device.serve() == []
    assert len(device.turns) == 0


def test_jobs_that_take_no_time_by_the_clock_are_served_all_the_same() -> None:
    """What they took once is then halved with each turn, down to numbers by which nothing can be divided."""
    device = Device(a=1e-6)
    device.put("a", *range(4))
    device.serve()
    device.prices["a"] = 0.0
    for _ in range(1100):
        device.put("a", *range(4))
        assert len(device.serve()) == 4
    assert 0 < device.turns._lanes["a"].pace.job_s < 1e-310  # or else this test shows nothing
    device.put("a", *range(100))
    assert len(device.serve()) == 100


def test_backlogged_tenants_get_equal_time_whatever_their_jobs_cost() -> None:
    device = Device(cheap=0.0001, dear=0.003)
    for name in device.prices:
        device.put(name, *range(100_000))
    seen: dict[str, list[int]] = {"cheap": [], "dear": []}
    while device.now < 110:
        for name, number in device.serve():
            seen[name].append(number)
    assert device.used["cheap"] == pytest.approx(device.used["dear"], rel=0.02)
    assert all(numbers == sorted(numbers) for numbers in seen.values())


def test_a_turn_is_short_but_may_be_joined() -> None:
    device = Device(a=0.0001)
    for _ in range(100):
        device.put("a", *range(20))
        device.serve()
    device.put("a", *range(1000))
    assert len(device.serve()) == pytest.approx(TURN_S / 0.0001, rel=0.1)
    slow = Device(a=1.0)
    for number in range(30):
        slow.put("a", number)
        slow.serve()
    slow.put("a", *range(100))
    assert len(slow.serve()) == LEAST_JOBS


def test_whoever_was_quiet_has_saved_nothing_up() -> None:
    device = Device(busy=0.001, quiet=0.001)
    device.put("quiet", 0)
    device.serve()
    device.put("busy", *range(100_000))
    while device.now < 130:
        device.serve()
    device.put("quiet", *range(100_000))
    before = dict(device.used)
    while device.now < 140:
        device.serve()
    got = {name: device.used[name] - before[name] for name in before}
    assert got["quiet"] == pytest.approx(got["busy"], rel=0.02)


def test_the_servers_own_work_goes_first_and_costs_nobody() -> None:
    device = Device(a=0.01, **{SERVER: 5.0})
    device.put("a", 1, 2)
    device.put(SERVER, 1, 2)
    assert device.serve() == [(SERVER, 1), (SERVER, 2)]
    assert device.turns.finish_s("a", device.now) == 0  # nothing is known of its jobs yet
    assert device.serve() == [("a", 1), ("a", 2)]


def learnt(**prices: float) -> Device:
    """A device that has served turns of four jobs of each tenant for a while."""
    device = Device(**prices)
    for name in prices:
        for _ in range(200):
            device.put(name, *range(4))
            device.serve()
    return device


def test_a_job_is_answered_after_what_is_ahead_the_turns_of_others_and_its_own() -> None:
    device, turn_s = learnt(a=0.001, b=0.001), 0.004
    assert device.turns.finish_s("a", device.now) == 0
    device.put("a", *range(10))
    assert device.turns.finish_s("a", device.now) == pytest.approx(1.1 * (0.010 + turn_s), rel=0.05)
    device.put("b", *range(1000))
    # a's ten, and as much of b's as b's turns come to meanwhile, not the thousand
    assert device.turns.finish_s("a", device.now) == pytest.approx(1.1 * (0.010 + 0.010 + TURN_S + turn_s), rel=0.05)
    assert device.turns.finish_s("new", device.now) == pytest.approx(TURN_S + TURN_S, rel=0.05)
    assert device.turns.finish_s("b", device.now) == pytest.approx(1.1 * (1.0 + 0.010 + turn_s), rel=0.05)


def test_a_turn_that_is_being_served_is_waited_for_as_long_as_it_should_last() -> None:
    device = learnt(a=0.001)
    device.put("a", *range(4))
    device.turns.take(device.now)
    assert device.turns.finish_s("a", device.now + 0.002) == pytest.approx(1.1 * (0.002 + 0.004), rel=0.05)
    assert device.turns.finish_s("a", device.now + 1.0) == 0


def test_what_others_have_now_and_then_is_counted_too() -> None:
    """A rival that has nothing queued at the moment, but a quarter of the time."""
    device = learnt(a=0.0009, b=0.0009)
    device.put("a", *range(2000))
    for _ in range(100):
        for _ in range(3):
            device.serve()
        device.put("b", *range(5))
        device.serve()
    left_s = (2000 - 3 * 100 * 5) * 0.0009
    assert device.turns.finish_s("a", device.now) == pytest.approx(1.1 * (left_s * 4 / 3 + 5 * 0.0009), rel=0.1)


def test_jobs_that_were_late_and_cost_nothing_do_not_make_others_look_cheap() -> None:
    device = learnt(a=0.001)
    for _ in range(50):
        device.put("a", *range(4))
        device.turns.take(device.now)
        device.now += 0.001
        device.turns.end(device.now, 1)
        device.put("a", *range(4))
        device.turns.take(device.now)
        device.turns.end(device.now, 0)
    device.put("a", *range(100))
    assert device.turns.finish_s("a", device.now) >= 0.1


def test_one_slow_turn_is_soon_forgotten() -> None:
    """Such as the first, which compiles; or else it would get others refused."""
    device = Device(a=10.0)
    device.put("a", 0)
    device.serve()
    device.prices["a"] = 0.001
    for _ in range(24):
        device.put("a", 0)
        device.serve()
    device.put("a", 0)
    assert device.turns.finish_s("a", device.now) < 0.004


def test_lanes_in_which_nothing_waits_are_forgotten_where_there_are_too_many() -> None:
    turns: Turns[int] = Turns()
    turns.put("waits", 0)
    for number in range(3 * MAX_LANES):
        turns.put(f"t{number}", 0)
        while len(turns) > 1:
            turns.take(0.0)
            turns.end(0.0, 1)
            if not turns._lanes["waits"].jobs:
                turns.put("waits", 0)
        assert len(turns._lanes) <= MAX_LANES + 1
    assert turns._lanes["waits"].jobs
