"""Logs: fixed messages with fields, as text or as JSON lines. Never a vector, token or credential."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_FIELDS = "memstore_fields"


def event(logger: logging.Logger, level: int, message: str, **fields: object) -> None:
    """One line: a fixed message and what changes from line to line beside it."""
    logger.log(level, message, extra={_FIELDS: fields})


def trouble(logger: logging.Logger, message: str, error: BaseException, **fields: object) -> None:
    """One line at level ERROR with the traceback of `error`."""
    logger.error(message, exc_info=error, extra={_FIELDS: fields})


def configure(log_format: str, level: str) -> None:
    """Sends the package's log to stderr in `log_format`, "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logger = logging.getLogger("memstore")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """time level message key=value ..., then the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        fields = getattr(record, _FIELDS, {})
        line = " ".join([time, record.levelname.lower(), record.getMessage(), *(f"{k}={v}" for k, v in fields.items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
