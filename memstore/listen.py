"""Listen: where the gRPC server is bound, with which credentials and options."""

from __future__ import annotations

import os
import resource
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from grpc_reflection.v1alpha import reflection

from memstore.auth import is_loopback
from memstore.config import ConfigError
from memstore.followed import Followed
from memstore.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from memstore.config import Config
    from memstore.seams import Clock, Disk

MAX_CONNECTIONS = 4096
"""Connections of one server, where the process may have so many descriptors."""


def max_connections() -> int:
    """Half of the descriptors that this process may have, so that files, leases and metrics always find theirs."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if descriptors == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, descriptors // 2)


SERVER_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_allowed_incoming_connections", max_connections()),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for who connects and then says nothing
    ("grpc.max_connection_idle_ms", 600_000),  # without any call; a client connects again by itself
    ("grpc.max_concurrent_streams", 256),  # calls of one connection; those that are begun and reset at once count too
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


def _unwatched(file: str, is_stale: Callable[[], bool]) -> None:
    """Nobody wants to know."""


def bind(
    server: grpc.aio.Server,
    config: Config,
    clock: Clock,
    follow: Callable[[str, Callable[[], bool]], None] = _unwatched,
) -> str:
    """Binds, and gives the address that clients use. ConfigError names what is in the way.

    follow: is given "certificates", where there are some, and what says whether changed ones are not taken.
    """
    credentials = _credentials(config, clock, follow)
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


def _credentials(
    config: Config, clock: Clock, follow: Callable[[str, Callable[[], bool]], None]
) -> grpc.ServerCredentials | None:
    """TLS with certificates that are read again when they change, at the next connection; None without TLS."""
    cert, key, ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is None or key is None:
        return None
    paths = [path for path in (cert, key, ca) if path is not None]
    try:
        files = Followed(paths, lambda: _certificates(cert, key, ca), clock, 0.0)
    except OSError as error:
        raise ConfigError(f"TLS: {_missing(cert, key, ca) or cert}: {error.strerror}") from error
    follow("certificates", lambda: files.is_stale)
    return grpc.dynamic_ssl_server_credentials(files.now(), files.now, require_client_authentication=ca is not None)


def _certificates(cert: Path, key: Path, ca: Path | None) -> Any:
    """What a handshake needs. ConfigError where key and certificate are no pair, OSError where one cannot be read."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        if ca is not None:
            context.load_verify_locations(ca)
        pair = (key.read_bytes(), cert.read_bytes())
        roots = None if ca is None else ca.read_bytes()
    except ssl.SSLError as error:
        names = ", ".join(str(path) for path in (cert, key, ca) if path is not None)
        raise ConfigError(f"TLS: {names}: {error.reason or error}") from error
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)


def _missing(*paths: Path | None) -> Path | None:
    return next((path for path in paths if path is not None and not path.is_file()), None)


def add_reflection(server: grpc.aio.Server, config: Config, services: Sequence[str]) -> None:
    """Lets tools ask for the contract: on loopback and Unix sockets, or where settings say so."""
    is_local = config.unix_socket is not None or is_loopback(config.host)
    if config.reflection == "on" or (config.reflection == "auto" and is_local):
        reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server)
