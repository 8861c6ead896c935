"""A thread that leaves the cores to others rests when they have kept it waiting, and has no low priority."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from memstore.index import courtesy
from memstore.index.courtesy import LONGEST_REST_S, NICENESS, PIECE_S, REST_RATIO, Courtesy, Paced
from tests.fakes import FakeClock

if TYPE_CHECKING:
    from pathlib import Path


class Thread:
    """What one has waited so far, and how long it rested each time."""

    def __init__(self) -> None:
        self.waited_s = 5.0
        self.rests: list[float] = []
        self.courtesy = Courtesy(lambda: self.waited_s, self.rests.append)

    def wait(self, seconds: float) -> None:
        """For a core, and then there is time to rest."""
        self.waited_s += seconds
        self.courtesy.give_way()


def priorities(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Those that are asked for from now on."""
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "setpriority", lambda *arguments: asked.append(arguments))
    return asked


def counted(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str | None) -> None:
    """The system says this of a thread's waiting, or nothing."""
    file = folder / "schedstat"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(courtesy, "_WAITED", str(file))


def test_a_thread_that_nobody_keeps_waiting_does_not_rest() -> None:
    thread = Thread()
    for _ in range(3):
        thread.wait(0.0)
    assert thread.rests == []


def test_it_rests_many_times_as_long_as_it_was_kept_waiting() -> None:
    thread = Thread()
    thread.wait(0.004)
    thread.wait(0.0)
    assert thread.rests == [pytest.approx(0.004 * REST_RATIO)]


def test_it_comes_to_an_end_however_long_it_was_kept_waiting() -> None:
    thread = Thread()
    thread.wait(10.0)
    thread.wait(0.0)
    assert thread.rests == [LONGEST_REST_S]


def test_waiting_that_is_hardly_any_adds_up() -> None:
    thread = Thread()
    for _ in range(4):
        thread.wait(0.00004)
    assert thread.rests == [pytest.approx(3 * 0.00004 * REST_RATIO)]


def test_it_goes_on_where_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = Thread()

    def none_left() -> float:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(thread.courtesy, "_waited_s", none_left)
    thread.wait(1.0)
    assert thread.rests == []


def test_what_the_system_counts_is_in_nanoseconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counted(monkeypatch, tmp_path, "7000000000 1500000000 12\n")
    assert courtesy.waited_for_a_core_s() == 1.5


def test_a_thread_whose_waiting_is_counted_keeps_its_priority(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = priorities(monkeypatch)
    counted(monkeypatch, tmp_path, "7000000000 1500000000 12\n")
    assert courtesy.of_this_thread() is not None
    assert asked == []


@pytest.mark.parametrize("text", [None, "0 0 0\n"], ids=["no file", "counting is off"])
def test_one_whose_waiting_is_not_counted_has_a_low_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    asked = priorities(monkeypatch)
    counted(monkeypatch, tmp_path, text)
    assert courtesy.of_this_thread() is None
    assert asked == [(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)]


def test_small_pieces_are_followed_by_one_check_a_millisecond() -> None:
    """And time that the check itself takes is no piece's."""
    clock, checked = FakeClock(), []

    def check() -> None:
        checked.append(round(clock.now, 4))
        clock.advance(0.05)

    paced = Paced(check, clock.monotonic)
    for _ in range(25):
        paced()
        clock.advance(PIECE_S / 8)
    assert checked == [pytest.approx(1000.0), pytest.approx(1000.051), pytest.approx(1000.102), pytest.approx(1000.153)]


def test_a_piece_that_takes_long_is_followed_by_a_check() -> None:
    clock, checked = FakeClock(), []
    paced = Paced(lambda: checked.append(clock.now), clock.monotonic)
    for _ in range(5):
        paced()
        clock.advance(2 * PIECE_S)
    assert len(checked) == 5
