"""The demo's server process: found when it is ready, never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from integration.demo import server
from memstore import __main__ as command_line

if TYPE_CHECKING:
    from pathlib import Path

STUBBORN = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); sys.stdin.read()"
)


def test_a_server_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        pytest.raises(server.ServerDidNotStart, match=r"did not start in \d+ s: it said nothing"),
        server.running_server(),
    ):
        pass


@pytest.mark.parametrize("seconds", [1.0, 120.0])
def test_a_slow_first_start_is_waited_for_and_told(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It compiles; on a slow or busy machine that takes minutes."""
    ready, now = tmp_path / "ready.json", [0.0]

    def sleep(duration: float) -> None:
        now[0] += duration
        if now[0] >= seconds:
            ready.write_text('{"address": "127.0.0.1:1"}')

    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    process = SimpleNamespace(poll=lambda: None)
    assert server._address(process, ready, tmp_path / "log") == "127.0.0.1:1"  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("compiles") == (seconds > server.LONG_S)


def test_a_server_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STOP_S", 0.1)
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        server._stop(process)
        assert process.returncode == -signal.SIGKILL


def test_sigterm_leaves_by_way_of_the_finally_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopped = []
    with pytest.raises(SystemExit) as left, server._leaving_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            stopped.append(True)
    assert left.value.code == 128 + signal.SIGTERM
    assert stopped == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_threads_wait_without_spinning_before_a_command_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads its policy once, when torch is imported."""
    seen = []

    class Demo(EntryPoint):
        def load(self) -> object:
            seen.append(os.environ["OMP_WAIT_POLICY"])
            return lambda arguments: 0

    points = [Demo("demo", "nowhere:main", command_line.GROUP)]
    monkeypatch.setattr(command_line, "entry_points", lambda group: points)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert command_line.main(["demo"]) == 0
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert command_line.main(["demo"]) == 0
    assert seen == ["ACTIVE", "PASSIVE"]
    loaded = "import memstore.__main__, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "False\n"
