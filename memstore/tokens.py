"""TokenFile: who is let in, how far and until when, and what each tenant may take; tokens themselves are not in it."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from memstore.access import ALL, Identity, Scope
from memstore.config import ConfigError, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PREFIX = "mst_"
"""Of tokens that are made here, so that scanners for leaked secrets know one."""
TOKEN_BYTES = 32
PREFIX_BYTES = 8
"""Of a token's hash: by them it is looked up, so that hardly ever two are compared."""
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one tenant may take; 0 where nothing bounds it.

    reserved_bytes: of the device, by all its memories. sequences: places of all its memories. calls_per_s: calls, and
    steps of streams; as many as in one second may come at once. leases: of mapped memory, at once. spilled_bytes: of
    files of spilled sequences.
    """

    reserved_bytes: int = 0
    sequences: int = 0
    calls_per_s: float = 0.0
    leases: int = 0
    spilled_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """identities: by the SHA-256 of each token. quotas: by tenant, for those that have one of their own."""

    identities: Mapping[bytes, Identity]
    quotas: Mapping[str, Quota]
    _alike: Mapping[bytes, Sequence[tuple[bytes, Identity]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        alike: dict[bytes, list[tuple[bytes, Identity]]] = {}
        for digest, identity in self.identities.items():
            alike.setdefault(digest[:PREFIX_BYTES], []).append((digest, identity))
        object.__setattr__(self, "_alike", alike)

    def find(self, digest: bytes) -> Identity | None:
        """Whose token has this SHA-256; None where it is of none. Takes as long among many tokens as among few.

        The beginning of the hash leads to those that begin alike, all of which are compared in constant time. What time
        tells of the beginning is of no use: who calls chooses a token and not its hash, so that only trying 2^64 tokens
        finds one that begins alike, which is then no nearer to the rest; and hashes are no secret, as none leads back
        to its token of 256 random bits.
        """
        found = None
        for known, identity in self._alike.get(digest[:PREFIX_BYTES], ()):
            if hmac.compare_digest(known, digest):
                found = identity
        return found


def is_tenant(name: str) -> bool:
    """True for what can be a tenant: 1 to 64 of [A-Za-z0-9._-], beginning with a letter or digit."""
    return _TENANT.fullmatch(name) is not None


def hash_of(token: str) -> bytes:
    """What is kept of a token. Tokens have 256 bits of randomness, so that no salt or slow hash is needed."""
    return hashlib.sha256(token.encode()).digest()


def new_token() -> str:
    """A token that nobody has."""
    return PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def line_of(token: str, identity: Identity) -> str:
    """The line of a token file that lets a token in."""
    words = [f"sha256:{hash_of(token).hex()}", identity.tenant]
    words.append(f"scopes={','.join(sorted(identity.scopes))}")
    if identity.expires_at != math.inf:
        words.append(f"expires={datetime.fromtimestamp(identity.expires_at, UTC).isoformat().replace('+00:00', 'Z')}")
    return " ".join(words)


def parse_tokens(text: str) -> TokenFile:
    """A token file. ConfigError names the line that is wrong.

    Lines `sha256:HEX TENANT [scopes=read,write,admin] [expires=TIME]` and `quota TENANT [bytes=8G] [sequences=N]
    [calls_per_s=N] [leases=N] [spilled_bytes=100G]`; empty lines and those beginning with # are passed over. A last
    line without its end is refused: it may have been cut short, and without `scopes=` or `expires=` a token reaches
    further.
    """
    identities: dict[bytes, Identity] = {}
    quotas: dict[str, Quota] = {}
    if text and not text.endswith("\n"):
        raise ConfigError("--token-file: the last line has no end, and may have been cut short; write a newline there")
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            _take(words, identities, quotas)
        except ValueError as error:
            raise ConfigError(f"--token-file: line {number}: {error}") from error
    if not identities:
        raise ConfigError("--token-file: no token in it")
    return TokenFile(identities=identities, quotas=quotas)


def parse_time(text: str) -> float:
    """Unix seconds of a date or time in ISO 8601, UTC unless it says otherwise. ValueError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text} is not a time such as 2030-01-31T12:00:00Z") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def parse_scopes(text: str) -> frozenset[Scope]:
    """Scopes as `read,write`. ValueError."""
    words = text.split(",")
    unknown = sorted(set(words) - set(Scope))
    if unknown:
        raise ValueError(f"scopes: {unknown[0]!r} is none of {', '.join(sorted(Scope))}")
    return frozenset(map(Scope, words))


def _take(words: list[str], identities: dict[bytes, Identity], quotas: dict[str, Quota]) -> None:
    if len(words) < 2 or not is_tenant(words[1]):
        raise ValueError("not `sha256:HEX TENANT ...` nor `quota TENANT ...`")
    kind, tenant, *fields = words
    if kind == "quota":
        if tenant in quotas:
            raise ValueError(f"tenant {tenant} has a quota already")
        quotas[tenant] = Quota(**_fields(fields, _QUOTA_FIELDS))
        return
    match = _HASH.fullmatch(kind)
    if match is None:
        raise ValueError("not `sha256:HEX TENANT ...` nor `quota TENANT ...`")
    digest = bytes.fromhex(match[1])
    if digest in identities:
        raise ValueError("the same token stands above")
    identities[digest] = replace(Identity(tenant=tenant, scopes=ALL), **_fields(fields, _IDENTITY_FIELDS))


def _fields(words: list[str], known: Mapping[str, tuple[str, Callable[[str], Any]]]) -> dict[str, Any]:
    """The values of `name=value` words, by what they are called here."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"{word}: none of {', '.join(f'{field}=' for field in known)}")
        field, parse = known[name]
        if field in found:
            raise ValueError(f"{name}= stands twice")
        found[field] = parse(value)
    return found


def _rate(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1e9:
        raise ValueError(f"calls_per_s={text} is outside 0 to 1e9")
    return value


def _count(name: str, text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(f"{name}={text} is below 0")
    return value


_IDENTITY_FIELDS = {"scopes": ("scopes", parse_scopes), "expires": ("expires_at", parse_time)}
_QUOTA_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "bytes": ("reserved_bytes", size),
    "sequences": ("sequences", partial(_count, "sequences")),
    "calls_per_s": ("calls_per_s", _rate),
    "leases": ("leases", partial(_count, "leases")),
    "spilled_bytes": ("spilled_bytes", size),
}
