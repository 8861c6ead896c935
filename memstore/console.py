"""Console: the commands that ask a running server: ls, describe, drop, healthcheck."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from memstore import status
from memstore.v1 import memstore_pb2 as pb
from memstore.v1 import memstore_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from google.protobuf.message import Message

DEFAULT_TARGET = "127.0.0.1:7077"
COLUMNS = ("NAME", "DIM", "CAPACITY", "SEQUENCES", "LAYERS", "ROWS", "RESERVED", "DEVICE")


class CommandFailed(Exception):
    """A command that could not do what it was asked; the text says why."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the four commands to a parser."""
    listing = commands.add_parser("ls", help="list memories")
    listing.add_argument("prefix", nargs="?", default="", help="only names that begin with this")
    describe = commands.add_parser("describe", help="show one memory")
    describe.add_argument("name")
    drop = commands.add_parser("drop", help="drop a memory with all its rows")
    drop.add_argument("name")
    drop.add_argument("--yes", action="store_true", help="really")
    health = commands.add_parser("healthcheck", help="exit with 0 if the server serves, else with 1")
    health.add_argument("--service", default="", help='"" for the process, memstore.v1.MemoryService, or memory/NAME')
    for parser in (listing, describe, drop, health):
        parser.add_argument("--target", help=f"host:port or unix:///path (MEMSTORE_TARGET, else {DEFAULT_TARGET})")
        parser.add_argument("--token-file", type=Path, help="file with the token (MEMSTORE_CLIENT_TOKEN_FILE)")
        parser.add_argument("--tls-root", type=Path, help="PEM certificates to trust; use TLS (MEMSTORE_TLS_ROOT)")
        parser.add_argument("--timeout", type=_seconds, default=10.0, help="seconds (default %(default)s)")
        parser.add_argument("--json", action="store_true", help="print JSON")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("a number of seconds above 0")
    return seconds


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Runs one of the commands; its exit code. Raises CommandFailed."""
    session = Session(options, environ)
    try:
        match options.command:
            case "ls":
                return _list(session, options)
            case "describe":
                return _describe(session, options)
            case "drop":
                return _drop(session, options)
            case _:
                return _healthcheck(session, options)
    except grpc.RpcError as error:
        raise CommandFailed(f"{session.target}: {_reason(error)}") from error


class Session:
    """Where to ask, with which credentials, and for how long."""

    def __init__(self, options: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self.target = str(options.target or environ.get("MEMSTORE_TARGET") or DEFAULT_TARGET)
        self.timeout_s: float = options.timeout
        token_file = _path(options.token_file, environ, "MEMSTORE_CLIENT_TOKEN_FILE")
        root = _path(options.tls_root, environ, "MEMSTORE_TLS_ROOT")
        token = _token(token_file) if token_file else ""
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._credentials = grpc.ssl_channel_credentials(_read(root)) if root else None

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A connection for one call."""
        if self._credentials is None:
            with grpc.insecure_channel(self.target) as channel:
                yield channel
        else:
            with grpc.secure_channel(self.target, self._credentials) as channel:
                yield channel

    def call(self, method: str, request: Message) -> Any:
        """One call of the memory service."""
        with self.channel() as channel:
            stub = memstore_pb2_grpc.MemoryServiceStub(channel)
            return getattr(stub, method)(request, timeout=self.timeout_s, metadata=self.metadata)


def _path(given: Path | None, environ: Mapping[str, str], variable: str) -> Path | None:
    return given or (Path(environ[variable]) if environ.get(variable) else None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandFailed(f"{path}: {error.strerror}") from error


def _token(path: Path) -> str:
    """The token in a file. CommandFailed for what no call can carry."""
    content = _read(path).strip()
    if not re.fullmatch(rb"[!-~]*", content):
        raise CommandFailed(f"{path}: not a token: printable ASCII in one line, without spaces")
    return content.decode()


def _reason(error: grpc.RpcError) -> str:
    """What the server said, or what kept it from saying anything."""
    rich = rpc_status.from_call(error)
    if rich is not None:
        reply = status.from_status(rich)
        return f"{reply.reason or reply.code.name}: {reply.message}"
    said = f"{error.code().name}: {error.details()}"
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return f"{said}. Does `memstore serve` run there? --target or MEMSTORE_TARGET says where to ask"
    return said


def _list(session: Session, options: argparse.Namespace) -> int:
    memories = session.call("ListMemories", pb.ListMemoriesRequest(name_prefix=options.prefix)).memories
    if options.json:
        _print_json([_as_dict(memory) for memory in memories])
    else:
        _print_table([COLUMNS, *(_row(memory) for memory in memories)])
    return 0


def _describe(session: Session, options: argparse.Namespace) -> int:
    memory = session.call("DescribeMemory", pb.DescribeMemoryRequest(name=options.name)).memory
    if options.json:
        _print_json(_as_dict(memory))
    else:
        shown = _as_dict(memory)
        _print_table([row for part in shown.values() for name, value in part.items() for row in _flat(name, value)])
    return 0


def _drop(session: Session, options: argparse.Namespace) -> int:
    if not options.yes:
        raise CommandFailed(f"{options.name}: all its rows will be gone; say --yes to do it")
    session.call("DropMemory", pb.DropMemoryRequest(name=options.name))
    if options.json:
        _print_json({"dropped": options.name})
    else:
        sys.stdout.write(f"dropped {options.name}\n")
    return 0


def _healthcheck(session: Session, options: argparse.Namespace) -> int:
    with session.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(service=options.service), timeout=session.timeout_s)
    word = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if options.json:
        _print_json({"service": options.service, "status": word})
    else:
        sys.stdout.write(f"{word}\n")
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 1


def _row(memory: pb.MemoryDescription) -> tuple[str, ...]:
    spec, held = memory.spec, memory.status
    sequences = f"{held.num_sequences}/{spec.max_sequences + spec.spill.max_sequences}"
    if not memory.HasField("status"):
        return (spec.name, str(spec.dim), str(spec.capacity), sequences, str(spec.num_layers), "-", "-", "not loaded")
    shown = (spec.dim, spec.capacity, sequences, spec.num_layers, held.num_rows, _bytes(held.reserved_bytes))
    return (spec.name, *map(str, shown), held.device)


def _bytes(number: int) -> str:
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}" if unit != "B" else f"{number} B"


def _flat(name: str, value: object) -> list[tuple[str, str]]:
    """One row for a value; for a group one for each of its values, with the group's name before a dot."""
    if isinstance(value, dict) and value:
        return [(f"{name}.{inner}", _plain(each)) for inner, each in value.items()]
    return [(name, _plain(value))]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _as_dict(memory: pb.MemoryDescription) -> dict[str, dict[str, object]]:
    return json_format.MessageToDict(
        memory, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
