"""Appends through a bad network: each row once at most, in order, without gaps; what was promised is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memstore.embedded import Embedded
from memstore.errors import NotAllowed
from model_client import errors
from tests.faulty import CAPACITY, EVERYTHING, Bench, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memstore.types import Hits


@pytest.fixture(scope="module")
def server() -> Iterator[Embedded]:
    embedded = Embedded("cpu", capacity_bytes=1 << 24)
    yield embedded
    embedded.close()


@pytest.fixture
def bench(server: Embedded) -> Bench:
    return Bench(server)


@pytest.mark.parametrize("fault", [Fault.REPLY_LOST, Fault.SILENCE])
def test_an_append_that_was_done_but_not_answered_is_not_done_again(bench: Bench, fault: Fault) -> None:
    first = bench.append(2)
    lost = bench.fail(3, fault)
    last = bench.append(1)
    assert bench.content() == first + lost + last
    assert bench.client.stats.dropped_rows == 0


@pytest.mark.parametrize("fault", [Fault.REQUEST_LOST, Fault.FLOATING])
def test_an_append_that_never_arrived_goes_before_the_next_one(bench: Bench, fault: Fault) -> None:
    first = bench.append(2)
    lost = bench.fail(3, fault)
    last = bench.append(1)
    assert bench.content() == first + lost + last
    assert bench.client.stats.resends == 1
    while bench.network.held:
        bench.network.release()
    assert bench.content() == first + lost + last


def test_a_request_that_arrives_twice_is_applied_once(bench: Bench) -> None:
    rows = bench.append(2, Fault.TWICE) + bench.append(1, Fault.TWICE)
    assert bench.content() == rows


def test_within_the_deadline_a_broken_connection_is_tried_again(server: Embedded) -> None:
    bench = Bench(server, timeout_s=5.0)
    rows = bench.append(2, Fault.REPLY_LOST, Fault.REQUEST_LOST, Fault.REPLY_LOST)
    assert bench.content() == rows
    assert bench.client.stats.retries == 3
    assert bench.clock.pauses == [0.05, 0.1, 0.2]
    seqs = {(part.epoch, part.seq) for call in bench.network.calls for part in call.sequences}  # type: ignore[attr-defined]
    assert seqs == {(0, 0)}


def test_a_step_behind_an_unknown_outcome_fails_and_appends_nothing(bench: Bench) -> None:
    first = bench.append(1)
    lost = bench.fail(2, Fault.REQUEST_LOST)
    bench.fail(3, Fault.REQUEST_LOST)  # it is the lost one that is asked for again
    last = bench.append(1)
    assert bench.content() == first + lost + last
    assert bench.client.stats.dropped_rows == 3


def test_a_late_answer_is_taken_note_of_without_asking_again(bench: Bench) -> None:
    first = bench.append(1)
    late = bench.fail(2, Fault.HELD)
    bench.network.release()
    last = bench.append(1)
    assert bench.content() == first + late + last
    assert bench.client.stats.resends == 0
    assert len(bench.network.calls) == 3


def test_two_appends_under_way_that_arrive_in_the_wrong_order(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    first, first_pending = bench.start(2)
    second, second_pending = bench.start(3)
    assert len(bench.network.held) == 2
    bench.network.release(1)  # refused: SequenceGap
    bench.network.release(0)
    second_pending.result()
    first_pending.result()
    assert bench.content() == rows + first + second


def test_the_second_of_two_is_awaited_first_and_both_were_lost(server: Embedded) -> None:
    bench = Bench(server, timeout_s=5.0)
    rows = bench.append(1)
    bench.network.script = [Fault.REQUEST_LOST, Fault.HELD]
    first, first_pending = bench.start(2)
    second, second_pending = bench.start(3)
    bench.network.script = [Fault.REPLY_LOST]
    while bench.network.held:
        bench.network.release()
    second_pending.result()
    first_pending.result()
    assert bench.content() == rows + first + second


def test_a_third_step_waits_and_a_fourth_is_refused(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    pendings = [bench.start(1) for _ in range(4)]
    assert len(bench.network.held) == 2
    with pytest.raises(errors.Busy):
        pendings[3][1].result()
    bench.network.release()
    bench.network.release()
    pendings[2][1].result()
    assert bench.content() == rows + pendings[0][0] + pendings[1][0] + pendings[2][0]
    assert pendings[0][1].done()
    assert bench.client.stats.dropped_rows == 1


def test_a_waiting_step_that_nobody_holds_makes_room(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    kept = [bench.start(1) for _ in range(2)]
    bench.start(1)
    bench.network.release()
    bench.network.release()
    last = bench.append(1)
    assert bench.content() == rows + kept[0][0] + kept[1][0] + last
    assert bench.client.stats.dropped_rows == 1


def test_a_refused_append_leaves_no_hole(bench: Bench) -> None:
    rows = bench.append(1)
    bad = torch.full((1, 1), float("nan"))
    with pytest.raises(errors.InvalidRequest):
        bench.session.append(bad, [1], payloads={"twice": torch.zeros(1, 1, dtype=torch.int32)})
    rows += bench.append(1)
    assert bench.content() == rows
    assert bench.client.stats.resends == 0


def test_a_refused_append_before_one_that_has_left_is_filled(bench: Bench) -> None:
    rows = bench.append(1)
    bench.network.script = [Fault.HELD, Fault.HELD]
    bad = torch.full((1, 1), float("nan"))
    refused = bench.session.start_step(
        bad, [1], retrieve=None, append=True, payloads={"twice": torch.zeros(1, 1, dtype=torch.int32)}
    )
    good, pending = bench.start(2)
    bench.network.release()
    bench.network.release()
    with pytest.raises(errors.InvalidRequest):
        refused.result()
    pending.result()
    assert bench.content() == rows + good
    assert bench.append(1) == bench.content()[-1:]


def test_rows_lost_by_the_server_are_begun_again_at_position_zero(bench: Bench) -> None:
    bench.append(3)
    bench.clean.reset("m", ["a"])
    numbers, pending = bench.start(2)
    result = pending.result()
    assert result.sequences[0].first_position == 0
    assert bench.content() == numbers
    assert bench.client.stats.lost_epochs == 1


def test_two_under_way_when_the_sequence_is_lost_keep_their_order(bench: Bench) -> None:
    bench.append(3)
    bench.network.script = [Fault.HELD, Fault.HELD]
    first, first_pending = bench.start(1)
    second, second_pending = bench.start(2)
    bench.clean.reset("m", ["a"], release=True)
    bench.network.release()
    bench.network.release()
    second_pending.result()
    first_pending.result()
    assert bench.content() == first + second


@pytest.mark.parametrize("fault", [Fault.REPLY_LOST, Fault.REQUEST_LOST, Fault.SILENCE, Fault.FLOATING])
def test_a_start_whose_outcome_is_not_known_happens_once(bench: Bench, fault: Fault) -> None:
    bench.append(2)
    begun = bench.fail(3, fault, is_start=True)
    begun += bench.append(1)
    while bench.network.held:
        bench.network.release()
    assert bench.content() == begun
    begun += bench.append(1)
    assert bench.content() == begun


def test_a_new_start_gives_up_what_it_would_wipe(bench: Bench) -> None:
    bench.append(1)
    bench.fail(2, Fault.REQUEST_LOST)
    begun = bench.append(3, is_start=True)
    assert bench.content() == begun
    assert bench.client.stats.resends == 0


def test_reset_gives_up_what_failed_and_begins_anew(bench: Bench) -> None:
    bench.append(1)
    bench.fail(2, Fault.REQUEST_LOST)
    bench.session.reset()
    assert bench.content() == []
    rows = bench.append(2)
    assert bench.content() == rows


def test_fork_holds_what_was_under_way(bench: Bench) -> None:
    rows = bench.append(1)
    rows += bench.fail(2, Fault.REQUEST_LOST)
    reply = bench.session.fork("a", "b")
    assert reply.next_position == 3
    assert bench.content("b") == rows


def test_a_dropped_memory_forgets_what_was_under_way(server: Embedded) -> None:
    bench = Bench(server)
    bench.append(1)
    bench.fail(2, Fault.REPLY_LOST)
    bench.clean.drop_memory("m")
    with pytest.raises(errors.NotFound):
        bench.append(1)
    Bench(server)
    rows = bench.append(2)
    assert bench.content() == rows


def test_a_writer_that_the_server_forgot_goes_on_behind_its_rows(bench: Bench) -> None:
    rows = [number for _ in range(4) for number in bench.append(1)]
    for other in range(64):
        writer = bench.clean.session("m", ["a"])
        writer.append(
            torch.full((1, 1), -1.0 - other), [1], payloads={"twice": torch.full((1, 1), -2 - 2 * other).int()}
        )
    rows += bench.append(1) + bench.append(1)
    assert bench.content() == [*range(-3, -65, -1), *rows[-2:]]


def test_a_retrieval_after_an_unsettled_start_does_not_read_the_document_before(bench: Bench) -> None:
    bench.append(2)
    begun = bench.fail(3, Fault.REQUEST_LOST, is_start=True)
    hits = bench.session.retrieve(torch.zeros(1, 1), [1], EVERYTHING).hits
    assert hits is not None
    assert hits.rows["key"][:, 0].int().tolist() == begun


def test_the_outcome_of_a_done_append_settled_by_another_is_still_given(bench: Bench) -> None:
    bench.append(1)
    bench.network.script = [Fault.REPLY_LOST]
    _, first = bench.start(2)
    bench.append(1)
    assert first.result().sequences[0].first_position == 1


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def broken(*_: object) -> None:
    raise RuntimeError("a bug of the search")


def make_replies_too_large(bench: Bench, _: pytest.MonkeyPatch) -> None:
    bench.network.server_plane.max_reply_bytes = 3 * CAPACITY * 8  # index and scores of three queries, but no rows


def make_search_fail(failure: Callable[..., None]) -> Callable[[Bench, pytest.MonkeyPatch], None]:
    return lambda _, patch: patch.setattr("memstore.memory.retrieve", _only_for_plans(failure))


def _only_for_plans(failure: Callable[..., None]) -> Callable[..., list[Hits]]:
    def search(slab: object, index: object, plans: list[object]) -> list[Hits]:
        if plans:
            failure()
        return []

    return search


REFUSING = {
    "too large a reply": make_replies_too_large,
    "no scratch for the search": make_search_fail(full),
    "a bug in the search": make_search_fail(broken),
}
refused = pytest.mark.parametrize("refuse", REFUSING.values(), ids=list(REFUSING))


@refused
@pytest.mark.parametrize("fault", [Fault.REQUEST_LOST, Fault.REPLY_LOST])
def test_a_lost_step_whose_resend_is_refused_does_not_hold_up_the_session(
    bench: Bench,
    refuse: Callable[[Bench, pytest.MonkeyPatch], None],
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = bench.append(2)
    rows += bench.fail(3, fault)
    refuse(bench, monkeypatch)
    rows += bench.append(1, retrieve=None)
    rows += bench.append(1, retrieve=None)
    monkeypatch.undo()
    assert bench.content() == rows
    assert bench.client.stats.dropped_rows == 0


@pytest.mark.parametrize("fault", [Fault.REQUEST_LOST, Fault.REPLY_LOST])
@pytest.mark.parametrize("kind", ["too large a reply", "no scratch for the search"])
def test_a_step_that_was_perhaps_done_and_cannot_be_answered_is_done_and_says_so(
    server: Embedded, kind: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(server, timeout_s=5.0)
    rows = bench.append(2)
    plane = bench.network.server_plane

    def meet(seconds: float) -> None:
        REFUSING[kind](bench, monkeypatch)

    bench.clock.pause = meet  # type: ignore[method-assign]  # between the first sending and the second
    bench.network.script = [fault]
    lost, pending = bench.start(3)
    for _ in range(2):
        with pytest.raises(errors.Unavailable, match="appended, but what was retrieved is lost"):
            pending.result()
    plane.max_reply_bytes = 1 << 26
    monkeypatch.undo()
    rows += lost + bench.append(1)
    assert bench.content() == rows
    assert bench.client.stats.dropped_rows == 0


@pytest.mark.parametrize("fault", [Fault.REQUEST_LOST, Fault.FLOATING])
def test_a_lost_step_that_finds_no_place_any_more_is_given_up(bench: Bench, fault: Fault) -> None:
    bench.fail(3, fault)
    for name in "bcde":
        bench.clean.session("m", [name]).append(
            torch.ones(1, 1), [1], payloads={"twice": torch.full((1, 1), 2, dtype=torch.int32)}
        )
    for _ in range(2):
        with pytest.raises(errors.QuotaExceeded):
            bench.append(1)
    assert bench.client.stats.dropped_rows == 5
    bench.clean.reset("m", ["e"], release=True)
    rows = bench.append(2)
    while bench.network.held:
        bench.network.release()
    rows += bench.append(1)
    assert bench.content() == rows


def test_a_credential_that_is_gone_after_an_append_does_not_free_its_seq(
    server: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(server)
    rows = bench.append(1)
    rows += bench.fail(2, Fault.REPLY_LOST)

    def refuse(*_: object) -> None:
        raise NotAllowed("no longer")

    monkeypatch.setattr("memstore.registry.Registry.find", refuse)
    with pytest.raises(errors.NotAllowed):
        bench.append(1)
    monkeypatch.undo()
    rows += bench.append(1)
    assert bench.content() == rows
