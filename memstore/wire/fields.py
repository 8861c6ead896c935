"""Checks of single fields: each gives the value, or raises InvalidRequest with the field and its limit."""

from __future__ import annotations

import re

from memstore.errors import InvalidRequest
from memstore.wire import limits

_MEMORY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PAYLOAD_NAME = re.compile(r"[a-z0-9_]+")


def whole(value: int, field: str, least: int, most: int) -> int:
    """A whole number, least <= value <= most."""
    if not least <= value <= most:
        raise InvalidRequest(field, f"{value} is outside {least} to {most:,}")
    return value


def memory_name(value: str, field: str) -> str:
    """1 to 128 of [A-Za-z0-9._-], beginning with a letter or digit."""
    if len(value) > limits.MAX_MEMORY_NAME or not _MEMORY_NAME.fullmatch(value):
        raise InvalidRequest(
            field,
            f"{clipped(value)} is not a name: 1 to {limits.MAX_MEMORY_NAME} characters of [A-Za-z0-9._-], "
            "beginning with a letter or digit",
        )
    return value


def payload_name(value: str, field: str) -> str:
    """1 to 64 of [a-z0-9_], not "key"."""
    if len(value) > limits.MAX_PAYLOAD_NAME or not _PAYLOAD_NAME.fullmatch(value) or value == "key":
        raise InvalidRequest(
            field, f'{clipped(value)}: 1 to {limits.MAX_PAYLOAD_NAME} characters of [a-z0-9_], and not "key"'
        )
    return value


def printable(value: str, field: str, least: int, most: int) -> str:
    """least to most printable ASCII characters."""
    if not is_printable(value, least, most):
        raise InvalidRequest(field, f"{clipped(value)}: {least} to {most} printable ASCII characters")
    return value


def is_printable(value: str, least: int, most: int) -> bool:
    """True for least to most printable ASCII characters."""
    return least <= len(value) <= most and value.isascii() and value.isprintable()


def clipped(value: str) -> str:
    """A value of the caller's for an error message: quoted, escaped, and short."""
    return ascii(value) if len(value) <= 40 else f"{value[:40]!a}... ({len(value)} characters)"
