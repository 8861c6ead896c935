"""Errands: in order of each tenant, beside those of others, whatever any of them waits for."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest

from memstore.errands import Errands, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memstore.errands import Steps


@pytest.fixture
def errands() -> Iterator[Errands]:
    made = Errands("test")
    yield made
    made.close()


def asking(awaited: Future[int], log: list[str], name: str) -> Steps[int]:
    """Waits once, and gives what it was given, doubled."""
    log.append(f"{name} begins")
    try:
        given: int = yield awaited
    except ValueError:
        log.append(f"{name} fails")
        raise
    log.append(f"{name} ends")
    return 2 * given


def at_once(log: list[str], name: str) -> Steps[str]:
    """Waits for nothing."""
    log.append(name)
    return name
    yield


def test_what_one_tenant_waits_for_holds_up_nobody_else(errands: Errands) -> None:
    log: list[str] = []
    first: Future[int] = Future()
    waiting = errands.add("red", asking(first, log, "red 1"))
    behind = errands.add("red", at_once(log, "red 2"))
    assert errands.add("blue", at_once(log, "blue")).result() == "blue"
    assert log == ["red 1 begins", "blue"]
    first.set_result(21)
    assert (waiting.result(), behind.result()) == (42, "red 2")
    assert log[2:] == ["red 1 ends", "red 2"]


def test_tenants_take_turns(errands: Errands) -> None:
    """Whoever comes with one errand does not wait for the many of another."""
    log: list[str] = []
    begun, release = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        release.wait()

    errands.submit(hold)
    begun.wait()
    many = [errands.add("red", at_once(log, f"red {number}")) for number in range(100)]
    one = errands.add("blue", at_once(log, "blue"))
    release.set()
    one.result()
    for each in many:
        each.result()
    assert log.index("blue") <= 1
    assert [name for name in log if name != "blue"] == [f"red {number}" for number in range(100)]


def test_an_error_is_raised_where_it_is_waited_for_and_the_next_goes_on(errands: Errands) -> None:
    log: list[str] = []
    failing: Future[int] = Future()
    failed = errands.add("red", asking(failing, log, "red 1"))
    after = errands.add("red", at_once(log, "red 2"))
    failing.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        failed.result()
    assert after.result() == "red 2"
    assert log == ["red 1 begins", "red 1 fails", "red 2"]


def test_what_has_not_begun_can_be_cancelled(errands: Errands) -> None:
    log: list[str] = []
    first: Future[int] = Future()
    waiting = errands.add("red", asking(first, log, "red 1"))
    cancelled = errands.add("red", at_once(log, "red 2"))
    after = errands.add("red", at_once(log, "red 3"))
    assert cancelled.cancel()
    first.set_result(1)
    assert (waiting.result(), after.result()) == (2, "red 3")
    assert not waiting.cancel()
    assert log == ["red 1 begins", "red 1 ends", "red 3"]


def test_closing_waits_for_what_was_added() -> None:
    made, log = Errands("test"), list[str]()
    awaited: Future[int] = Future()
    waiting = made.add("red", asking(awaited, log, "red"))
    closing = threading.Thread(target=made.close)
    closing.start()
    made.submit(lambda: None).result()
    assert closing.is_alive()
    awaited.set_result(3)
    closing.join()
    assert waiting.result() == 6


def test_one_errand_can_be_done_here() -> None:
    log: list[str] = []
    awaited: Future[int] = Future()
    awaited.set_result(4)
    assert run(asking(awaited, log, "a")) == 8
    failing: Future[int] = Future()
    failing.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        run(asking(failing, log, "b"))
    assert log == ["a begins", "a ends", "b begins", "b fails"]
