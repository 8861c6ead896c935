"""Issuing: memstore token, which makes a token and the line that lets it in."""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from memstore.access import Identity
from memstore.config import ConfigError
from memstore.seams import FILE_MODE
from memstore.tokens import is_tenant, line_of, new_token, parse_scopes, parse_time

if TYPE_CHECKING:
    import argparse

    from memstore.seams import Clock


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to a parser."""
    token = commands.add_parser("token", help="make a token, and the line of a --token-file that lets it in")
    token.add_argument("tenant", help="whose it is: 1 to 64 of [A-Za-z0-9._-]")
    token.add_argument("--scopes", default="read,write,admin", help="some of read,write,admin (default all)")
    token.add_argument("--expires", help="a time such as 2030-01-31T12:00:00Z, or days from now such as 90d")
    token.add_argument("--add", type=Path, metavar="FILE", help="add the line to this file, and print the token alone")
    token.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, clock: Clock) -> int:
    """Makes a token; the exit code. ConfigError for what cannot be, OSError for a file that cannot be written."""
    identity = _identity(options, math.floor(clock.wall()))
    token = new_token()
    try:
        line = line_of(token, identity)
    except (ValueError, OverflowError) as error:  # a time that no calendar has
        raise ConfigError(f"--expires={options.expires}: {error}") from error
    if options.add is not None:
        _add(options.add, line)
    if options.json:
        expires_at = None if identity.expires_at == math.inf else identity.expires_at
        shown = {"token": token, "line": line, "tenant": identity.tenant, "scopes": sorted(identity.scopes)}
        sys.stdout.write(json.dumps({**shown, "expires_at": expires_at}, indent=2) + "\n")
    elif options.add is not None:
        sys.stdout.write(f"{token}\n")
    else:
        sys.stdout.write(f"token: {token}\nline:  {line}\n")
    return 0


def _identity(options: argparse.Namespace, now: float) -> Identity:
    if not is_tenant(options.tenant):
        raise ConfigError(f"tenant {options.tenant!a}: 1 to 64 of [A-Za-z0-9._-], beginning with a letter or digit")
    try:
        expires_at = math.inf if options.expires is None else _moment(options.expires, now)
        identity = Identity(tenant=options.tenant, scopes=parse_scopes(options.scopes), expires_at=expires_at)
    except (ValueError, OverflowError) as error:
        raise ConfigError(str(error)) from error
    if identity.expires_at <= now:
        raise ConfigError(f"--expires={options.expires} is past")
    return identity


def _moment(text: str, now: float) -> float:
    """Unix seconds of a time, or of so many days from now."""
    if text.endswith("d") and text[:-1].isdigit():
        return now + timedelta(days=int(text[:-1])).total_seconds()
    return parse_time(text)


def _add(path: Path, line: str) -> None:
    """One write, so that a server that reads the file meanwhile finds whole lines. A new file is its owner's only."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    with os.fdopen(descriptor, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        begin = b"" if size == 0 or file.read(1) == b"\n" else b"\n"
        file.write(begin + line.encode() + b"\n")
