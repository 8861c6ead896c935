"""Auth: who may listen where, and the way from a credential to a tenant."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from typing import TYPE_CHECKING, Protocol

from memstore.config import Config, ConfigError
from memstore.errors import NotAuthenticated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_TENANT = "default"
_LINE = re.compile(r"sha256:([0-9a-f]{64})\s+([A-Za-z0-9][A-Za-z0-9._-]{0,63})")


class Authenticator(Protocol):
    """Turns what a call carries into its tenant."""

    def tenant(self, metadata: Mapping[str, str]) -> str:
        """The tenant of a call with this metadata (lower-case keys). Raises NotAuthenticated."""


class Open:
    """Lets everyone in as one tenant: for loopback, Unix sockets and mutual TLS."""

    def tenant(self, metadata: Mapping[str, str]) -> str:
        del metadata
        return DEFAULT_TENANT


class Tokens:
    """Lets in who carries `authorization: Bearer TOKEN` with the hash of a known token.

    A tenant may have several tokens, so that a new one can be handed out before the old one is taken away.
    """

    def __init__(self, entries: Sequence[tuple[bytes, str]]) -> None:
        """entries: SHA-256 of a token, and its tenant."""
        self._entries = tuple(entries)

    def tenant(self, metadata: Mapping[str, str]) -> str:
        """Compares with every entry in constant time, so that the time taken says nothing about any of them."""
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.encode()).digest()
        found = [tenant for known, tenant in self._entries if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            raise NotAuthenticated("a valid token is needed: authorization: Bearer TOKEN")
        return found[0]


def parse_tokens(text: str) -> Tokens:
    """The tokens of a file: lines `sha256:HEX TENANT`; empty lines and those beginning with # are passed over."""
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"--token-file: line {number} is not `sha256:HEX TENANT`")
        entries.append((bytes.fromhex(match[1]), match[2]))
    if not entries:
        raise ConfigError("--token-file: no token in it")
    return Tokens(entries)


def authenticator_of(config: Config) -> Authenticator:
    """The tokens of the configured file, or Open without one."""
    if config.token_file is None:
        return Open()
    try:
        return parse_tokens(config.token_file.read_text())
    except OSError as error:
        raise ConfigError(f"--token-file={config.token_file}: {error.strerror}") from error


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(config: Config) -> None:
    """ConfigError where the server would listen beyond this machine with neither TLS nor tokens, unless told to."""
    is_local = config.unix_socket is not None or is_loopback(config.host)
    is_guarded = config.token_file is not None or config.tls_cert is not None
    if not (is_local or is_guarded or config.insecure_bind):
        raise ConfigError(
            f"--host={config.host} is reachable from other machines: give --token-file or --tls-cert and --tls-key, "
            "or --insecure-bind to let anyone in"
        )
