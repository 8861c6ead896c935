"""Logs: one line an event, as text and as JSON."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from memstore.logs import JsonFormatter, TextFormatter, configure, event, trouble

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("memstore.test_logs")


@pytest.fixture
def formatted(caplog: pytest.LogCaptureFixture) -> Callable[[logging.Formatter], list[str]]:
    """What was logged, line by line, in a format."""
    caplog.set_level(logging.INFO, logger="memstore.test_logs")
    return lambda formatter: [formatter.format(record) for record in caplog.records]


def test_text_has_the_fields_behind_the_message(formatted: Callable[[logging.Formatter], list[str]]) -> None:
    event(log, logging.INFO, "memory created", memory="notes", reserved_bytes=7)
    (line,) = formatted(TextFormatter())
    assert line.split(" ", 1)[1] == "info memory created memory=notes reserved_bytes=7"


def test_json_has_them_beside_it(formatted: Callable[[logging.Formatter], list[str]]) -> None:
    event(log, logging.WARNING, "memory created", memory="notes\n", reserved_bytes=7)
    (line,) = formatted(JsonFormatter())
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("ts").endswith("+00:00")
    assert entry == {"level": "warning", "event": "memory created", "memory": "notes\n", "reserved_bytes": 7}


def test_trouble_has_its_traceback(formatted: Callable[[logging.Formatter], list[str]]) -> None:
    trouble(log, "request failed", ZeroDivisionError("by zero"), request_id="r1")
    (text,), (line,) = formatted(TextFormatter()), formatted(JsonFormatter())
    assert "request_id=r1\nZeroDivisionError: by zero" in text
    assert json.loads(line)["traceback"] == "ZeroDivisionError: by zero"


@pytest.mark.parametrize(("log_format", "begin"), [("json", "{"), ("text", "")])
def test_only_the_wanted_level_is_written(
    log_format: str, begin: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("memstore")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    configure(log_format, "warning")
    event(log, logging.INFO, "quiet")
    event(log, logging.ERROR, "loud")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(begin)
    assert "loud" in line
