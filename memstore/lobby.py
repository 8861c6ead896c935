"""Lobby: where messages are read that anybody may send, with a credential or without: short ones, few at a time."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import grpc
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from memstore.arrival import Context

    Handler = grpc.RpcMethodHandler[Any, Any]
    Behavior = Any

MAX_BYTES = 1024
"""Of such a message: far beyond the longest name of a memory."""
MOST = 4
"""Messages that are read at once. gRPC takes all of one, up to its own limit, before anybody sees how long it is."""
MOST_OF_A_HOST = 2
"""Of one host, so that none keeps the others waiting by itself."""
MOST_WAITING = 128
"""Calls whose message is read or is to be: a few megabytes of each may have come nevertheless."""
MOST_WAITING_OF_A_HOST = 32
READ_S = 5.0
"""Seconds that a message may take, with the wait for its turn; they usually come with the headers of their call."""


class _Crowd:
    """Calls whose message is read, or is to be."""

    def __init__(self, most: int, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self.num_waiting = 0
        self.reading = asyncio.Semaphore(most)

    @property
    def is_full(self) -> bool:
        """Whether one more would be too many."""
        return self.num_waiting >= self._most_waiting


class Lobby:
    """Serves methods whose messages are read in their turn. Used by one event loop."""

    def __init__(self, read_s: float = READ_S) -> None:
        self._read_s = read_s
        self._all = _Crowd(MOST, MOST_WAITING)
        self._hosts: WeakValueDictionary[str, _Crowd] = WeakValueDictionary()

    def handler(self, inner: Handler) -> Handler:
        """The same method. A call is ended where its message is late, longer than MAX_BYTES, or not one of its kind."""
        return grpc.stream_stream_rpc_method_handler(
            partial(self._serve, inner), response_serializer=inner.response_serializer
        )

    async def read(self, contents: AsyncIterator[bytes], peer: str) -> bytes | None:
        """The next message of a call of a peer, as gRPC names it; None at the end.

        TimeoutError where it is late, or too many others are waited for.
        """
        async with asyncio.timeout(self._read_s), self._turn(peer):
            return await anext(contents, None)

    @asynccontextmanager
    async def _turn(self, peer: str) -> AsyncIterator[None]:
        """Waits for the turn of a peer, and has it for the length of the block."""
        host = self._host(peer)
        if host.is_full or self._all.is_full:
            raise TimeoutError
        for crowd in (host, self._all):
            crowd.num_waiting += 1
        try:
            async with host.reading, self._all.reading:
                yield
        finally:
            for crowd in (host, self._all):
                crowd.num_waiting -= 1

    def _host(self, peer: str) -> _Crowd:
        """Those of the host of a peer, as long as there are some."""
        name = peer.rpartition(":")[0]
        found = self._hosts.get(name)
        if found is None:
            found = self._hosts[name] = _Crowd(MOST_OF_A_HOST, MOST_WAITING_OF_A_HOST)
        return found

    async def _serve(self, inner: Handler, contents: AsyncIterator[bytes], context: Context) -> None:
        requests = self._requests(inner, contents, context)
        with suppress(grpc.aio.InternalError):  # what a write says where the other end has gone
            async with aclosing(requests):
                await self._answer(inner, requests, context)

    async def _answer(self, inner: Handler, requests: AsyncGenerator[Any, None], context: Context) -> None:
        behavior, is_many = _behavior_of(inner)
        request = requests if is_many else await anext(requests, None)
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no message")
        answering = behavior(request, context)
        if inspect.isasyncgen(answering):
            async with aclosing(answering):
                async for answer in answering:
                    await context.write(answer)
        elif (answer := await answering) is not None:
            await context.write(answer)

    async def _requests(
        self, inner: Handler, contents: AsyncIterator[bytes], context: Context
    ) -> AsyncGenerator[Any, None]:
        parse: Any = inner.request_deserializer
        while True:
            try:
                content = await self.read(contents, context.peer())
            except TimeoutError:
                await context.abort(
                    grpc.StatusCode.UNAVAILABLE, f"no message within {self._read_s:g} s, or too many calls"
                )
            if content is None:
                return
            if len(content) > MAX_BYTES:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a message of more than {MAX_BYTES} bytes")
            try:
                request = parse(content)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a message of this method")
            yield request


def _behavior_of(inner: Handler) -> tuple[Behavior, bool]:
    """What answers a call, and whether it takes many messages."""
    of_many = inner.stream_stream or inner.stream_unary
    return (of_many, True) if of_many is not None else (inner.unary_unary or inner.unary_stream, False)
