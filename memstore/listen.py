"""Listen: where the gRPC server is bound, with which credentials and options; one server to an address."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from grpc_reflection.v1alpha import reflection

from memstore.auth import is_loopback
from memstore.config import ConfigError
from memstore.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from memstore.config import Config
    from memstore.seams import Disk

SERVER_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.so_reuseport", 0),  # or a second server would take every other connection, without an error
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # decode clients ping between steps
)


@contextmanager
def address_lock(config: Config, disk: Disk) -> Iterator[None]:
    """Holds the lock file of the Unix socket, if there is one, and takes away a stale socket. Raises NotReady."""
    if config.unix_socket is None:
        yield
        return
    with disk.lock(_lock_path(config.unix_socket)):
        disk.remove(config.unix_socket)
        try:
            yield
        finally:
            disk.remove(config.unix_socket)


def _lock_path(socket: Path) -> Path:
    return socket.with_name(f"{socket.name}.lock")


def bind(server: grpc.aio.Server, config: Config) -> str:
    """Binds, and gives the address that clients use. ConfigError names what is in the way."""
    credentials = _credentials(config)
    if config.unix_socket is not None:
        return _bind_socket(server, config.unix_socket, credentials)
    host = f"[{config.host}]" if ":" in config.host and not config.host.startswith("[") else config.host
    asked = f"{host}:{config.port}"
    try:
        port = server.add_secure_port(asked, credentials) if credentials else server.add_insecure_port(asked)
    except RuntimeError as error:
        raise ConfigError(f"{asked}: cannot be bound; is another server there? Give another --port") from error
    return f"{host}:{port}"


def _bind_socket(server: grpc.aio.Server, path: Path, credentials: grpc.ServerCredentials | None) -> str:
    """Only this user may open the socket, from its first moment."""
    address = f"unix://{path.absolute()}"
    before = os.umask(0o177)
    try:
        _ = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"--unix-socket={path}: cannot be bound") from error
    finally:
        os.umask(before)
    return address


def _credentials(config: Config) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    try:
        pair = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
        roots = None if config.tls_client_ca is None else config.tls_client_ca.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS: {error.filename}: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


def add_reflection(server: grpc.aio.Server, config: Config, services: Sequence[str]) -> None:
    """Lets tools ask for the contract: on loopback and Unix sockets, or where settings say so."""
    is_local = config.unix_socket is not None or is_loopback(config.host)
    if config.reflection == "on" or (config.reflection == "auto" and is_local):
        reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server)
