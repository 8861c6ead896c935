"""Futures: what is known already, and what comes of one thing after another."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from memstore.errors import MemstoreError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
R = TypeVar("R")


def done(value: T) -> Future[T]:
    """The future of what is known."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def then(first: Future[T], follow: Callable[[T], Future[R]]) -> Future[R]:
    """The outcome of `follow`, which is given the result of `first`; the failure of either. It cannot be cancelled."""
    outcome: Future[R] = Future()
    outcome.set_running_or_notify_cancel()  # what is under way is finished

    def pass_on(second: Future[R]) -> None:
        error = second.exception()
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(second.result())

    def go_on(done: Future[T]) -> None:
        error = done.exception()
        if error is not None:
            outcome.set_exception(error)
            return
        try:
            second = follow(done.result())
        except MemstoreError as refused:
            outcome.set_exception(refused)
        else:
            second.add_done_callback(pass_on)

    first.add_done_callback(go_on)
    return outcome
