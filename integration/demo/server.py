"""A memstore server as a process of its own, for as long as the demo runs."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

START_S = 600.0
"""What a first start may take, which compiles, on a slow or busy machine."""
LONG_S = 5.0
"""After that it is told what the wait is for."""
STOP_S = 15.0
POLL_S = 0.05


class ServerDidNotStart(Exception):
    """The server process ended, or was not ready in time; carries what it said."""


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The address of a fresh server on loopback, its rows in this machine's memory; stopped on exit.

    A server that does not stop by itself within STOP_S is killed. SIGTERM ends this process by way of its `finally`
    blocks, so that the server ends too. Raises ServerDidNotStart.
    """
    with _leaving_on_sigterm(), tempfile.TemporaryDirectory(prefix="memstore-demo-") as folder:
        ready, log = Path(folder, "ready.json"), Path(folder, "server.log")
        command = [sys.executable, "-m", "memstore", "serve", "--port", "0", "--metrics-port", "0"]
        command += ["--data", folder, "--ready-file", str(ready)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            yield _address(process, ready, log)
        finally:
            _stop(process)


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    begun, is_told = time.monotonic(), False
    while not ready.exists():
        waited_s = time.monotonic() - begun
        if waited_s > LONG_S and not is_told:
            is_told = True
            sys.stderr.write("the server is starting; the first start on a machine compiles its search, for a minute\n")
        if process.poll() is not None or waited_s > START_S:
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
            raise ServerDidNotStart(f"the server did not start in {waited_s:.0f} s: {said or 'it said nothing'}")
        time.sleep(POLL_S)
    address = json.loads(ready.read_text(encoding="utf-8"))["address"]
    return str(address)
