"""Load: fairness, refusals and order, in virtual time on a made-up device with the real queue."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from memstore.admission import Admission, QueueLimits
from memstore.turns import Turns
from tests.loading import Cost, Load, Source, every

if TYPE_CHECKING:
    from tests.loading import Tally

SECONDS = 2.0
ALONE = Cost(call_s=0.0, row_s=0.001)
"""1,000 requests a second, however they are joined."""


def run(*sources: Source, admission: Admission | None = None, cost: Cost = ALONE) -> dict[str, Tally]:
    """What became of every tenant's requests."""
    return Load(sources, admission, cost=cost).run()


@pytest.mark.parametrize("flood_per_s", [1_000, 3_000, 8_000])
@pytest.mark.parametrize("joins", [True, False], ids=["joined", "one sequence"])
@pytest.mark.parametrize("share", [0.2, 0.45, 0.5])
def test_a_flood_leaves_others_their_share(flood_per_s: int, joins: bool, share: float) -> None:
    """share: of the device's time, which a tenant with half of it to itself may use; 0.8 of that is promised."""
    flood = Source(
        tenant="flood",
        arrivals=every(1 / flood_per_s, SECONDS),
        patience_s=0.2,
        sequences=64 if joins else 1,
    )
    good = Source(tenant="good", arrivals=every(0.001 / share, SECONDS), patience_s=0.2, sequences=64 if joins else 1)
    tallies = run(flood, good)
    assert tallies["good"].useful >= 0.8 * tallies["good"].offered
    if share < 0.5:
        assert tallies["good"].refused == 0
    assert tallies["flood"].useful >= 0.8 * (1 - share) * 1000 * SECONDS  # and the rest is not wasted


def test_a_flood_of_large_requests_leaves_room_for_a_large_one() -> None:
    flood = Source(tenant="flood", arrivals=every(0.0002, SECONDS), patience_s=5.0, num_bytes=8 << 20)
    good = Source(tenant="good", arrivals=every(0.02, SECONDS), patience_s=0.5, num_bytes=64 << 20)
    tallies = run(flood, good)
    assert tallies["good"].useful == tallies["good"].offered
    assert tallies["flood"].refused > 0


def test_ten_floods_leave_an_eleventh_tenant_its_share() -> None:
    floods = [
        Source(tenant=f"flood{number}", arrivals=every(0.001, SECONDS, number * 1e-5), patience_s=0.5)
        for number in range(10)
    ]
    good = Source(tenant="good", arrivals=every(0.0125, SECONDS), patience_s=0.5)
    tallies = run(*floods, good)
    assert tallies["good"].useful >= 0.8 * tallies["good"].offered


def test_without_turns_the_flood_would_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the tests above can fail: the same load, all in one lane, first come first served."""
    flood = Source(tenant="flood", arrivals=every(1 / 8_000, SECONDS), patience_s=0.2)
    good = Source(tenant="good", arrivals=every(0.0022, SECONDS), patience_s=0.2)
    load = Load((flood, good), Admission(QueueLimits()), cost=ALONE)
    put = Turns.put
    monkeypatch.setattr(load.worker._turns, "put", lambda _, job: put(load.worker._turns, "all", job))
    tallies = load.run()
    assert tallies["good"].useful < 0.5 * tallies["good"].offered


@pytest.mark.parametrize("overload", [1.5, 3.0, 10.0])
def test_what_is_begun_under_overload_is_done_in_time(overload: float) -> None:
    """Goodput stays near what the device can do, since nearly all that it begins is of use."""
    tallies = run(Source(tenant="t", arrivals=every(0.001 / overload, SECONDS), patience_s=0.05))
    tally = tallies["t"]
    assert tally.useful >= 0.95 * 1000 * SECONDS
    assert tally.offered == tally.useful + tally.refused + tally.expired + (len(tally.latencies) - tally.useful)
    assert len(tally.latencies) - tally.useful <= 0.02 * tally.useful
    assert max(tally.latencies) <= 0.06


def test_a_call_that_would_be_late_is_refused_at_once_and_told_when() -> None:
    patient = Source(tenant="t", arrivals=(), patience_s=9.0)
    load = Load([], cost=ALONE)
    for _ in range(50):  # what a request takes is learnt
        load.offer(patient)
        load.worker.serve(waits=False)
    for _ in range(100):
        load.offer(patient)
    begun, calls, tally = load.clock.now, len(load.engine("t").calls), load.tallies["t"]
    load.offer(Source(tenant="t", arrivals=(), patience_s=0.06))
    assert (load.clock.now, len(load.engine("t").calls), tally.refused) == (begun, calls, 1)
    (delay_s,) = tally.delays
    assert delay_s == pytest.approx(1.1 * (0.1 + 0.001) - 0.06, rel=0.05)
    load.offer(Source(tenant="t", arrivals=(), patience_s=0.06 + delay_s + 0.001))  # as if it had waited
    assert tally.refused == 1
    load.run()
    assert tally.useful == 151


def test_a_call_that_can_be_in_time_is_not_refused() -> None:
    for load_ratio in (0.3, 0.6, 0.9):
        arrivals = [at + 0.0002 * Random(7).random() for at in every(0.001 / load_ratio, SECONDS)]
        tally = run(Source(tenant="t", arrivals=arrivals, patience_s=0.02))["t"]
        assert (tally.refused, tally.expired, tally.useful) == (0, 0, tally.offered)


def test_one_slow_request_does_not_get_others_refused_for_long() -> None:
    """After something that took a second, a device that is quick again is used again."""
    load = Load([Source(tenant="t", arrivals=every(0.002, SECONDS, 1.5), patience_s=0.05)], cost=ALONE)
    load.offer(Source(tenant="t", arrivals=(), patience_s=9.0), 0)
    engine = load.engine("t")
    cost, engine._cost = engine._cost, Cost(call_s=1.0, row_s=0.0)
    load.worker.serve(waits=False)
    engine._cost = cost
    tally = load.run()["t"]
    assert tally.refused <= 10
    assert tally.useful >= tally.offered - 12


def test_the_order_of_a_sequence_is_kept_under_a_flood() -> None:
    """Of what is not refused: the engine sees each tenant's steps in the order in which they came."""
    flood = Source(tenant="flood", arrivals=every(0.0003, SECONDS), patience_s=1.0, sequences=3)
    good = Source(tenant="good", arrivals=every(0.003, SECONDS), patience_s=1.0, sequences=2)
    load = Load((flood, good), cost=ALONE)
    tallies = load.run()
    for tenant, tally in tallies.items():
        seen = [batch.parts[0].seq for call in load.engine(tenant).calls for batch in call]
        assert len(seen) == len(tally.latencies)
        for sequence, numbers in tally.order.items():
            of = [
                batch.parts[0].seq
                for call in load.engine(tenant).calls
                for batch in call
                if batch.parts[0].sequence == sequence
            ]
            assert of == sorted(of)
            assert set(of) <= set(numbers)


def test_requests_are_still_joined_under_a_flood() -> None:
    flood = Source(tenant="flood", arrivals=every(0.0001, SECONDS), patience_s=0.2)
    good = Source(tenant="good", arrivals=every(0.002, SECONDS), patience_s=0.2)
    load = Load((flood, good), cost=Cost(call_s=0.0005, row_s=0.0001))
    load.run()
    calls = load.engine("flood").calls
    assert sum(map(len, calls)) / len(calls) > 6
    assert load.longest <= 1024
