"""Transports by target: in this process, or over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from model_client.stats import ClientStats
    from model_client.transport.base import Transport
    from model_client.transport.mapped import MappedTransport


class TransportOptions(TypedDict, total=False):
    """What a transport may be given besides its target."""

    token: str | Callable[[], str] | None
    """Bearer token, or what gives the one of now: asked for each call and stream, quick, and raises nothing.

    ValueError where it would travel in the clear, unless `allow_insecure_token`.
    """
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
    plane: Literal["auto", "inline", "shm", "cuda"]
    """How tensors travel to a server: "auto", if not given, maps the memory of a server of this host where that is
    lent, and else sends bytes; "inline" never maps; "shm" and "cuda" fail where the memory is not lent so."""


def open_transport(target: str, options: TransportOptions, stats: ClientStats) -> Transport:
    """The transport for a target: ":memory:", "host:port", "dns:///..." or "unix:///path". Connects lazily."""
    if target == ":memory:":
        from model_client.transport.process import ProcessTransport

        return ProcessTransport(options.get("device") or "cpu")
    from model_client.transport.grpc import GrpcOptions, GrpcTransport

    return GrpcTransport(GrpcOptions.of(target, options), stats)


def may_map(target: str, options: TransportOptions) -> bool:
    """True where a server at `target` may lend its memories to this process. ValueError for a plane that cannot be."""
    plane = options.get("plane", "auto")
    if plane not in ("auto", "inline", "shm", "cuda"):
        raise ValueError(f"plane: {plane!r} is none of auto, inline, shm, cuda")
    if target == ":memory:" or "transport" in options:
        return False
    from model_client.transport.grpc import is_local

    if plane in ("shm", "cuda") and not is_local(target):
        raise ValueError(f"plane: {plane!r} needs a server of this host, which {target} may not be")
    return plane != "inline" and is_local(target)


def mapped_transport(
    inner: Transport, memory: str, sequences: Sequence[str], plane: str, stats: ClientStats
) -> MappedTransport:
    """The transport of one session, which has its sequences in this process where it can. plane: not "inline"."""
    from model_client.transport.mapped import MappedTransport, Wish

    return MappedTransport(inner, Wish(memory=memory, sequences=sequences, plane=plane), stats)
