"""Heap: what is kept of memory that was given back goes once the process is quiet; what is in use is left alone."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
import textwrap
from unittest.mock import Mock

import pytest

from memstore.heap import BUSY_S, CHECK_S, RISE_BYTES, Trimmer
from tests.fakes import FakeClock

MB = 1 << 20
GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")


class Process:
    """A process that has some memory in use, and keeps some."""

    def __init__(self) -> None:
        self.used, self.kept, self.worked_s, self.num_trims = 100 * MB, 0, 0.0, 0

    def resident_bytes(self) -> int:
        return self.used + self.kept

    def cpu_s(self) -> float:
        return self.worked_s

    def trim(self) -> None:
        self.kept = 0
        self.num_trims += 1


def looked(process: Process, trimmer: Trimmer, clock: FakeClock, cores: float) -> bool:
    """A second in which so many cores worked, and a look after it."""
    clock.advance(CHECK_S)
    process.worked_s += cores * CHECK_S
    return trimmer.look()


def test_what_is_kept_goes_once_it_is_quiet() -> None:
    process, clock = Process(), FakeClock()
    trimmer = Trimmer(process, clock)
    process.kept = RISE_BYTES
    assert not looked(process, trimmer, clock, 0.5)
    assert looked(process, trimmer, clock, 0.01)
    assert not process.kept


def test_a_little_is_kept_for_good() -> None:
    process, clock = Process(), FakeClock()
    trimmer = Trimmer(process, clock)
    process.kept = RISE_BYTES - 1
    assert not any(looked(process, trimmer, clock, 0.0) for _ in range(200))


def test_what_a_busy_process_keeps_goes_once_a_minute() -> None:
    process, clock = Process(), FakeClock()
    trimmer = Trimmer(process, clock)
    for _ in range(3 * round(BUSY_S)):
        process.kept = 200 * MB
        looked(process, trimmer, clock, 1.5)
    assert process.num_trims == 3


def test_what_is_in_use_is_found_out_once() -> None:
    process, clock = Process(), FakeClock()
    trimmer = Trimmer(process, clock)
    process.used += 500 * MB
    assert looked(process, trimmer, clock, 0.0)
    assert not any(looked(process, trimmer, clock, 0.0) for _ in range(200))
    process.used -= 500 * MB
    assert not looked(process, trimmer, clock, 0.0)
    process.kept = RISE_BYTES
    assert looked(process, trimmer, clock, 0.0)


def test_a_look_that_sees_nothing_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    process, clock = Process(), FakeClock()
    trimmer = Trimmer(process, clock)
    process.kept = RISE_BYTES
    with monkeypatch.context() as patched:
        patched.setattr(process, "resident_bytes", Mock(side_effect=OSError(errno.EMFILE, "too many open files")))
        assert not looked(process, trimmer, clock, 0.0)
    assert looked(process, trimmer, clock, 0.0)


PROGRAM = """
    import threading
    import numpy as np
    from memstore import heap

    assert heap.tune()
    usage = heap.OwnUsage()
    first = usage.resident_bytes()
    everybody = threading.Barrier(8)

    def work():
        taken = [np.ones(60_000, np.uint8) for _ in range(300)]
        everybody.wait()
        del taken[::2]
        everybody.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = usage.resident_bytes() - first
    usage.trim()
    print(kept, usage.resident_bytes() - first)
"""


@GLIBC
def test_what_many_threads_gave_back_is_kept_until_it_is_trimmed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, timeout=60, check=True, text=True
    )
    kept, left = map(int, done.stdout.split())
    assert kept > 100 * MB
    assert left < 80 * MB
