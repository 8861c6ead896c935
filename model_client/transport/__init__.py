"""Transports by target: in this process, or over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from model_client.stats import ClientStats
    from model_client.transport.base import Transport


class TransportOptions(TypedDict, total=False):
    """What a transport may be given besides its target."""

    token: str | None
    """Bearer token. ValueError where it would travel in the clear, unless `allow_insecure_token`."""
    allow_insecure_token: bool
    """True: a token may travel over plaintext TCP to another host."""
    tls_root: bytes | str | None
    """PEM of the certificate authority, or the path of such a file; no TLS if not given."""
    tls_cert: bytes | str | None
    """PEM of the client's own certificate chain, or its path, for servers that ask for one."""
    tls_key: bytes | str | None
    """PEM of the key of `tls_cert`, or its path."""
    device: str | None
    """For ":memory:" only: the engine's device, "cpu" if not given."""
    use_stream: bool
    """False: every step is a unary call, instead of riding on one kept-open stream."""


def open_transport(target: str, options: TransportOptions, stats: ClientStats) -> Transport:
    """The transport for a target: ":memory:", "host:port", "dns:///..." or "unix:///path". Connects lazily."""
    if target == ":memory:":
        from model_client.transport.process import ProcessTransport

        return ProcessTransport(options.get("device") or "cpu")
    from model_client.transport.grpc import GrpcOptions, GrpcTransport

    return GrpcTransport(GrpcOptions.of(target, options), stats)
