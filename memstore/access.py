"""Access: who a caller is, what it may do, and the one table that says which scope every method of the server needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from memstore.errors import NotAllowed
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message


class Scope(StrEnum):
    """What a credential lets its holder do with the memories of its tenant.

    read: describe, list and retrieve. write: append, reset, fork, pin. admin: create and drop.
    """

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


ALL = frozenset(Scope)
PUBLIC: frozenset[Scope] = frozenset()
"""Needs no credential: says nothing of any memory."""
READ, WRITE, ADMIN = (frozenset((scope,)) for scope in (Scope.READ, Scope.WRITE, Scope.ADMIN))

SCOPES: Mapping[str, frozenset[Scope]] = {
    "/memstore.v1.MemoryService/CreateMemory": ADMIN,
    "/memstore.v1.MemoryService/DropMemory": ADMIN,
    "/memstore.v1.MemoryService/DescribeMemory": READ,
    "/memstore.v1.MemoryService/ListMemories": READ,
    "/memstore.v1.MemoryService/ServerInfo": READ,
    "/memstore.v1.MemoryService/Retrieve": READ,  # these three: and WRITE where the step changes something
    "/memstore.v1.MemoryService/Step": READ,
    "/memstore.v1.MemoryService/StepStream": READ,
    "/memstore.v1.MemoryService/Append": WRITE,
    "/memstore.v1.MemoryService/Reset": WRITE,
    "/memstore.v1.MemoryService/Fork": READ | WRITE,
    "/memstore.v1.MemoryService/Pin": WRITE,
    "/memstore.v1.MemoryService/OpenPlane": READ | WRITE,  # the whole memory is mapped
    "/grpc.health.v1.Health/Check": PUBLIC,  # health of a memory is shown to its tenant only, by health.py
    "/grpc.health.v1.Health/List": PUBLIC,
    "/grpc.health.v1.Health/Watch": PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": PUBLIC,  # the contract, which is no secret
}
"""Path of every method that is served, and the scopes that its caller must have. What has no row here is refused."""

STREAMS = frozenset({"/memstore.v1.MemoryService/StepStream"})
"""Those of them in which a call brings many requests."""

_MAY_CHANGE = (pb.StepRequest, pb.RetrieveRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose credential it is, how far it reaches, and until when (Unix seconds)."""

    tenant: str
    scopes: frozenset[Scope] = ALL
    expires_at: float = math.inf


def check_row(path: str) -> None:
    """NotAllowed where the method has no row."""
    if path not in SCOPES:
        raise _refusal(path, None)


def check(path: str, identity: Identity) -> None:
    """NotAllowed where the identity lacks a scope that the method needs, or the method has no row."""
    needed = SCOPES.get(path)
    if needed is None or not needed <= identity.scopes:
        raise _refusal(path, needed)


def check_request(path: str, identity: Identity, request: Message) -> None:
    """As `check`, for what only the request says: a step that appends, or begins a sequence, needs to write."""
    if Scope.WRITE in identity.scopes or not isinstance(request, _MAY_CHANGE):
        return
    is_append = isinstance(request, pb.StepRequest) and request.append
    if is_append or any(part.start_of_sequence for part in request.sequences):
        raise _refusal(path, WRITE)


def _refusal(path: str, needed: frozenset[Scope] | None) -> NotAllowed:
    if needed is None:  # its name may be anything, of any length
        return NotAllowed("no credential reaches this method")
    method = path.rpartition("/")[2]
    return NotAllowed(f"{method}: the credential needs the scope {' and '.join(sorted(needed))}")
