"""The command line: memstore serve, ls, describe, drop, healthcheck, verify, restore, token, and what others add."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from memstore import config, console, issuing
from memstore.seams import SystemClock

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILURE = 1
USAGE = 2
GROUP = "memstore.commands"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. The exit code: 0, 1 for a failure and 2 for wrong usage, each with a line on stderr."""
    # Before torch is imported: OpenMP threads that spin while they wait starve the other process, and the event loop.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    added = {point.name: point for point in entry_points(group=GROUP)}
    if given and given[0] in added:
        return int(added[given[0]].load()(given[1:]) or 0)
    options = _parser(sorted(added)).parse_args(given)  # of those that are added, none is left
    try:
        if options.command == "serve":
            return _serve(options)
        if options.command in ("verify", "restore"):
            return _offline(options)
        if options.command == "token":
            return issuing.run(options, SystemClock())
        return console.run(options, os.environ)
    except OSError as error:
        return _complain(options.command, f"{error.filename or 'system'}: {error.strerror or error}", FAILURE)
    except config.ConfigError as error:
        return _complain(options.command, str(error), USAGE)
    except UnicodeEncodeError as error:  # bytes that the terminal's encoding does not have, which no message can carry
        return _complain(options.command, f"{error.object!a} is not text", USAGE)
    except console.CommandFailed as error:
        return _complain(options.command, str(error), FAILURE)
    except KeyboardInterrupt:
        return 130


def _parser(added: Sequence[str]) -> argparse.ArgumentParser:
    """added: names of commands that others add; they are listed, and told apart from what is no command."""
    parser = argparse.ArgumentParser(prog="memstore", description="The memory of transformer models as a service.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('memstore')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="run a server", epilog="Each setting is also read from MEMSTORE_ and its name in capitals."
    )
    config.add_flags(serve)
    console.add_commands(commands)
    issuing.add_command(commands)
    verify = commands.add_parser("verify", help="read a data folder, and check every checksum; exit with 1 for damage")
    verify.add_argument("folder", type=Path, help="of a server that is stopped, or a copy of it")
    restore = commands.add_parser("restore", help="verify a backup, and copy it to a new data folder")
    restore.add_argument("backup", type=Path, help="a copy of a data folder")
    restore.add_argument("folder", type=Path, help="the new data folder; it must not exist, or be empty")
    for offline in (verify, restore):
        offline.add_argument("--json", action="store_true", help="print JSON")
    for name in added:
        commands.add_parser(name, help=f"see memstore {name} --help", add_help=False)
    return parser


def _serve(options: argparse.Namespace) -> int:
    if not __debug__:
        raise config.ConfigError(
            "python -O takes away checks that keep FAISS from reading past a row; start without it"
        )
    settings = config.from_sources(vars(options), os.environ)
    from memstore import server
    from memstore.errors import MemstoreError

    try:
        return server.run(settings)
    except MemstoreError as error:
        return _complain("serve", error.message, FAILURE)


def _offline(options: argparse.Namespace) -> int:
    """The commands that look at a data folder without a server. They read the same files, which takes torch."""
    from memstore import backup
    from memstore.errors import MemstoreError
    from memstore.seams import SystemDisk

    try:
        return backup.run(options, SystemDisk())
    except MemstoreError as error:
        return _complain(options.command, error.message, FAILURE)


def _complain(command: str, text: str, code: int) -> int:
    sys.stderr.write(f"memstore {command}: {text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
