"""Catalog: which memories there shall be, by tenant and name. Holds specs as text, never rows or positions."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, cast

from memstore.errors import Corrupt, NotReady

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from memstore.seams import Disk

T = TypeVar("T")
FILE_NAME = "catalog.json"
REDIS_TIMEOUT_S = 2.0


class MemoryId(NamedTuple):
    """Whose memory, and its name there."""

    tenant: str
    name: str


class Catalog(Protocol):
    """Texts by memory. Every call may raise NotReady, and has then changed nothing that is known of."""

    def load(self) -> dict[MemoryId, str]:
        """All that is kept. Untrusted: whoever reads it checks it. Raises Corrupt when the whole fails its check."""

    def put(self, memory: MemoryId, text: str) -> None:
        """Keeps `text`; it is there after a crash."""

    def remove(self, memory: MemoryId) -> None:
        """Forgets a memory; nothing happens when it is not there."""


class NoCatalog:
    """Keeps nothing: memories end with the process."""

    def load(self) -> dict[MemoryId, str]:
        return {}

    def put(self, memory: MemoryId, text: str) -> None:
        """Nothing is kept."""

    def remove(self, memory: MemoryId) -> None:
        """Nothing was kept."""


class FileCatalog:
    """One JSON file in a data folder that one server owns, with a checksum over its entries."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._path = folder / FILE_NAME
        self._disk = disk

    def load(self) -> dict[MemoryId, str]:
        content = self._disk.read(self._path)
        if content is None:
            return {}
        try:
            document = json.loads(content)
            entries = [(MemoryId(tenant, name), text) for tenant, name, text in document["memories"]]
            checksum = document["sha256"]
            if not all(isinstance(word, str) for memory, text in entries for word in (*memory, text)):
                raise ValueError("names and texts are text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Corrupt(f"{self._path}: not a catalogue") from error
        if checksum != _checksum(entries):
            raise Corrupt(f"{self._path}: its checksum does not fit; move it away to begin with an empty catalogue")
        return dict(entries)

    def put(self, memory: MemoryId, text: str) -> None:
        self._store({**self.load(), memory: text})

    def remove(self, memory: MemoryId) -> None:
        self._store({key: text for key, text in self.load().items() if key != memory})

    def _store(self, texts: dict[MemoryId, str]) -> None:
        entries = sorted(texts.items())
        memories = [[memory.tenant, memory.name, text] for memory, text in entries]
        document = {"version": 1, "sha256": _checksum(entries), "memories": memories}
        try:
            self._disk.replace(self._path, json.dumps(document, indent=1).encode())
        except OSError as error:
            raise NotReady(f"the catalogue cannot be written: {error.strerror}") from error


def _checksum(entries: list[tuple[MemoryId, str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


class RedisCatalog:
    """One Redis or Valkey hash, `PREFIX:memories`; field TENANT/NAME. NotReady while the server is out of reach."""

    def __init__(self, url: str, prefix: str) -> None:
        """Connects when first asked. ValueError where `url` is not one of Redis."""
        import redis  # here, as importing it is a good part of a start, and of every process with an engine of its own
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # once more on a new connection, where the old one was closed
            decode_responses=False,
        )
        self._failure = redis.RedisError
        self._key = f"{prefix}:memories"

    def load(self) -> dict[MemoryId, str]:
        """Entries whose names or texts are not even text are passed over."""
        content = cast("dict[bytes, bytes]", self._asked(lambda: self._redis.hgetall(self._key)))
        entries: dict[MemoryId, str] = {}
        for name, text in content.items():
            tenant, slash, memory = name.decode(errors="replace").partition("/")
            if slash:
                entries[MemoryId(tenant, memory)] = text.decode(errors="replace")
        return entries

    def put(self, memory: MemoryId, text: str) -> None:
        self._asked(lambda: self._redis.hset(self._key, "/".join(memory), text))

    def remove(self, memory: MemoryId) -> None:
        self._asked(lambda: self._redis.hdel(self._key, "/".join(memory)))

    def close(self) -> None:
        """Gives the connection back."""
        self._redis.close()

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except self._failure as error:
            raise NotReady("the catalogue (Redis) is out of reach; loaded memories go on") from error
