"""Arrival: what a call brings beside its message: metadata, credentials, a request id, where it comes from."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

import grpc

from memstore.auth import Credentials

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memstore.auth import Authenticator

REQUEST_ID = "x-request-id"
Context = grpc.aio.ServicerContext[Any, Any]
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def text_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """What of the metadata of a call is text, by lower-case keys."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def metadata_of(context: Context) -> dict[str, str]:
    """As `text_of`, of a call that is served."""
    return text_of(context.invocation_metadata())


def credentials_of(metadata: dict[str, str], context: Context, authenticator: Authenticator) -> Credentials:
    """What a call carries, in its metadata and its certificate."""
    return Credentials.of(metadata, _common_names(context) if authenticator.wants_names else ())


def request_id_of(metadata: dict[str, str]) -> str:
    """The one that the caller gave, where it can be one, or a new one."""
    given = metadata.get(REQUEST_ID, "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def is_local(peer: str) -> bool:
    """True for a peer, as gRPC names it, that connects from this host."""
    return peer.startswith(("unix:", "ipv4:127.", "ipv6:[::1]:", "ipv6:%5B::1%5D:"))


def _common_names(context: Context) -> tuple[str, ...]:
    """Those of the caller's certificate, which TLS has verified; none without one."""
    names = context.auth_context().get("x509_common_name", ())
    return tuple(name.decode(errors="replace") for name in names)
