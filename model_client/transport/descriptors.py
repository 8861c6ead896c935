"""Descriptors: what a server of this host hands over on its Unix socket, in exchange for a token."""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from memstore.v1 import memstore_pb2 as pb
from model_client.errors import Internal, Unavailable
from model_client.transport import status

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PACKET_BYTES = 64 << 10
_PEER = struct.Struct("3i")
"""struct ucred: process, user, group."""
_DESCRIPTOR = struct.Struct("i")


@dataclass(frozen=True, slots=True)
class Claim:
    """What was handed over. The connection, blocking and without a timeout, keeps it alive at the server; connection
    and descriptors are the receiver's to close.
    """

    connection: socket.socket
    response: pb.ClaimResponse
    descriptors: Sequence[int]


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of a server that has gone: a memory, and the descriptors of its slab and control block."""

    mapped: pb.MappedMemory
    descriptors: Sequence[int]


def claim(offer: pb.OpenPlaneResponse, num_descriptors: int, timeout_s: float, remains: Remains | None = None) -> Claim:
    """Presents the token of an offer, and takes `num_descriptors` descriptors. Blocks for `timeout_s` at most.

    remains: handed over, as duplicates, to the server that takes them over.

    Raises what the server answers, Unavailable where nobody of this user listens or answers, Internal where other
    descriptors come than are expected.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptors: list[int] = []
    try:
        connection.settimeout(timeout_s)
        connection.connect(offer.socket_path)
        if _peer_user(connection) != os.geteuid():
            raise Unavailable(f"{offer.socket_path}: another user listens there")
        _present(connection, offer.token, remains)
        packet, descriptors = _receive(connection, num_descriptors + 1)
        response = _response(packet)
        if len(descriptors) != num_descriptors:
            raise Internal(f"{len(descriptors)} descriptors came, {num_descriptors} were expected")
        connection.settimeout(None)
    except OSError as error:
        _close(connection, descriptors)
        raise Unavailable(f"{offer.socket_path}: {error.strerror or error}") from error
    except BaseException:
        _close(connection, descriptors)
        raise
    return Claim(connection, response, tuple(descriptors))


def _present(connection: socket.socket, token: bytes, remains: Remains | None) -> None:
    request = pb.ClaimRequest(token=token, remains=None if remains is None else remains.mapped)
    packet = request.SerializeToString()
    if remains is None:
        connection.send(packet, socket.MSG_NOSIGNAL)
    else:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", remains.descriptors))
        connection.sendmsg([packet], [rights], socket.MSG_NOSIGNAL)


def _receive(connection: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """One packet with its descriptors, at most so many; socket.recv_fds would leave them open to child processes."""
    room = socket.CMSG_SPACE(most * _DESCRIPTOR.size)
    packet, ancillary, _, _ = connection.recvmsg(MAX_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) - len(content) % _DESCRIPTOR.size
            descriptors += [number for (number,) in _DESCRIPTOR.iter_unpack(content[:whole])]
    return packet, descriptors


def _response(packet: bytes) -> pb.ClaimResponse:
    if not packet:
        raise Unavailable("the server closed the connection instead of handing anything over")
    try:
        response = pb.ClaimResponse.FromString(packet)
    except DecodeError as error:
        raise Internal("the server's packet is not a ClaimResponse") from error
    if response.WhichOneof("outcome") == "failure":
        raise status.from_stream(response.failure)
    return response


def _close(connection: socket.socket, descriptors: Sequence[int]) -> None:
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)


def _peer_user(connection: socket.socket) -> int:
    """The user that the listening process ran as."""
    _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(user)
