"""Auth: who may listen where, and the way from what a call carries to who calls."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from memstore.access import Identity
from memstore.config import Config, ConfigError
from memstore.errors import NotAuthenticated
from memstore.followed import Followed
from memstore.tokens import Quota, TokenFile, hash_of, is_tenant, parse_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from memstore.seams import Clock

DEFAULT_TENANT = "default"
FOLLOW_S = 1.0
"""How often a token file is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a call carries. token_hash: of its bearer token. common_names: of its certificate, verified by TLS."""

    token_hash: bytes | None = None
    common_names: Sequence[str] = ()

    @staticmethod
    def of(metadata: Mapping[str, str], common_names: Sequence[str] = ()) -> Credentials:
        """Those of a call with this metadata (lower-case keys)."""
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        token_hash = hash_of(token) if scheme.lower() == "bearer" else None
        return Credentials(token_hash=token_hash, common_names=common_names)


class Authenticator(Protocol):
    """Turns what a call carries into who calls. Any thread may ask; quick, since every step asks."""

    @property
    def has_tenants(self) -> bool:
        """True where not everyone is the same tenant."""

    @property
    def wants_names(self) -> bool:
        """True where the names in certificates matter."""

    @property
    def is_stale(self) -> bool:
        """True while a file of credentials was changed into one that is not taken."""

    def identify(self, credentials: Credentials) -> Identity:
        """Who calls. Raises NotAuthenticated, also once the credential has expired or was taken away."""

    def quota(self, tenant: str) -> Quota | None:
        """What the tenant may take, as far as the credentials' file says it; None where it does not.

        As it was when somebody was identified last: the device's thread asks, and must not wait for the disk.
        """


class Open:
    """Lets everyone in as one tenant: for loopback, Unix sockets and mutual TLS."""

    has_tenants = False
    wants_names = False
    is_stale = False
    _identity = Identity(tenant=DEFAULT_TENANT)

    def identify(self, credentials: Credentials) -> Identity:
        del credentials
        return self._identity

    def quota(self, tenant: str) -> Quota | None:
        del tenant
        return None


class Certificates:
    """Lets in whom mutual TLS has let in; the common name of the certificate is the tenant."""

    has_tenants = True
    wants_names = True
    is_stale = False

    def identify(self, credentials: Credentials) -> Identity:
        if len(credentials.common_names) != 1 or not is_tenant(credentials.common_names[0]):
            raise NotAuthenticated("a certificate is needed whose common name is a tenant")
        return Identity(tenant=credentials.common_names[0])

    def quota(self, tenant: str) -> Quota | None:
        del tenant
        return None


class Tokens:
    """Lets in who carries `authorization: Bearer TOKEN` with the hash of a known token, until that expires.

    A tenant may have several tokens, so that a new one can be handed out before the old one is taken away.
    """

    has_tenants = True
    wants_names = False

    def __init__(self, file: Followed[TokenFile], clock: Clock) -> None:
        """clock: its wall time says what has expired."""
        self._file = file
        self._clock = clock

    @property
    def is_stale(self) -> bool:
        return self._file.is_stale

    def identify(self, credentials: Credentials) -> Identity:
        found = self._file.now().find(credentials.token_hash or b"")
        if found is None:
            raise NotAuthenticated("a valid token is needed: authorization: Bearer TOKEN")
        if self._clock.wall() >= found.expires_at:
            raise NotAuthenticated("the token has expired")
        return found

    def quota(self, tenant: str) -> Quota | None:
        return self._file.known.quotas.get(tenant)


def authenticator_of(config: Config, clock: Clock) -> Authenticator:
    """The tokens of the configured file, the names in certificates, or Open. ConfigError."""
    path = config.token_file
    if path is None:
        return Certificates() if config.tls_tenant == "cn" else Open()
    try:
        return Tokens(Followed([path], lambda: _read(path), clock, FOLLOW_S), clock)
    except OSError as error:
        raise ConfigError(f"--token-file={path}: {error.strerror}") from error


def _read(path: Path) -> TokenFile:
    try:
        return parse_tokens(path.read_text())
    except UnicodeDecodeError as error:
        raise ConfigError(f"--token-file={path}: not text") from error


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
