"""A memstore server as a process of its own, for as long as the demo runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

START_S = 60.0
POLL_S = 0.05


class ServerDidNotStart(Exception):
    """The server process ended, or was not ready in time; carries what it said."""


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The address of a fresh server on loopback, its rows in this machine's memory; stopped on exit."""
    with tempfile.TemporaryDirectory(prefix="memstore-demo-") as folder:
        ready, log = Path(folder, "ready.json"), Path(folder, "server.log")
        command = [sys.executable, "-m", "memstore", "serve", "--port", "0", "--metrics-port", "0"]
        command += ["--data", folder, "--ready-file", str(ready)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            yield _address(process, ready, log)
        finally:
            process.terminate()
            process.wait(timeout=START_S)


def _address(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    until = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise ServerDidNotStart(log.read_text(encoding="utf-8", errors="replace")[-2000:])
        time.sleep(POLL_S)
    address = json.loads(ready.read_text(encoding="utf-8"))["address"]
    return str(address)
