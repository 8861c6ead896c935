"""Lobby: messages that need no credential are read in their turn."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING

import grpc
import pytest

from memstore import door as door_module
from memstore.access import SCOPES
from memstore.lobby import MOST, MOST_OF_A_HOST, MOST_WAITING, MOST_WAITING_OF_A_HOST, Lobby
from tests.serving import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.serving import Serving

PUBLIC = [path for path, scopes in SCOPES.items() if not scopes]
TURNS = 20
"""Of an event loop on which nothing else is done: enough for everybody to get on as far as it goes."""


class Coming:
    """A message that comes when it is sent."""

    def __init__(self) -> None:
        self.is_read = False
        self.sent = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.is_read = True
        await self.sent.wait()
        yield b"x"


async def settle() -> None:
    """Lets everybody get on."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def test_few_messages_are_read_at_once_and_of_a_host_fewer() -> None:
    async def run() -> None:
        lobby = Lobby(3600.0)
        hosts = ["ipv4:10.0.0.1", "ipv4:10.0.0.2", "ipv6:[::1]"]
        coming = {host: [Coming() for _ in range(4)] for host in hosts}
        reads = [
            asyncio.create_task(lobby.read(aiter(each), f"{host}:{port}"))
            for host in hosts
            for port, each in enumerate(coming[host])
        ]

        def are_read() -> list[int]:
            return [sum(each.is_read for each in coming[host]) for host in hosts]

        await settle()
        assert are_read() == [MOST_OF_A_HOST, MOST_OF_A_HOST, MOST - 2 * MOST_OF_A_HOST]
        for each in coming[hosts[1]]:
            each.sent.set()
        await settle()
        assert are_read() == [2, 2, 2], "those of another host had waited for longer"
        for host in hosts:
            for each in coming[host]:
                each.sent.set()
        assert await asyncio.gather(*reads) == [b"x"] * 12
        assert not lobby._hosts

    asyncio.run(run())


def test_those_beyond_the_few_that_wait_are_turned_away_at_once_and_other_hosts_are_not() -> None:
    async def run() -> None:
        lobby, coming = Lobby(3600.0), Coming()
        reads: list[asyncio.Task[bytes | None]] = []
        for host in range(MOST_WAITING // MOST_WAITING_OF_A_HOST):
            peers = [f"ipv4:10.0.0.{host}:{port}" for port in range(MOST_WAITING_OF_A_HOST)]
            reads += [asyncio.create_task(lobby.read(aiter(coming), peer)) for peer in peers]
            await settle()
            with pytest.raises(TimeoutError):
                await lobby.read(aiter(coming), f"ipv4:10.0.0.{host}:65535")
        with pytest.raises(TimeoutError):
            await lobby.read(aiter(coming), "ipv4:10.0.1.0:1")
        coming.sent.set()
        assert await asyncio.gather(*reads) == [b"x"] * MOST_WAITING
        assert await lobby.read(aiter(coming), "ipv4:10.0.1.0:1") == b"x"

    asyncio.run(run())


def test_a_message_that_does_not_come_is_not_waited_for_and_makes_room() -> None:
    async def run() -> None:
        lobby, never, now = Lobby(0.0), Coming(), Coming()
        for _ in range(2 * MOST):
            with pytest.raises(TimeoutError):
                await lobby.read(aiter(never), "ipv4:10.0.0.1:1")
        now.sent.set()
        lobby._read_s = 3600.0
        assert await lobby.read(aiter(now), "ipv4:10.0.0.1:2") == b"x"

    asyncio.run(run())


@pytest.mark.parametrize("path", PUBLIC)
def test_a_call_without_a_message_is_ended(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "Lobby", lambda: Lobby(0.0))
    outgoing: queue.Queue[bytes | None] = queue.Queue()
    with serving() as server:
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = server.channel.stream_stream(path)
        answers = call(iter(outgoing.get, None), timeout=15)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        outgoing.put(None)


@pytest.mark.parametrize("path", PUBLIC)
@pytest.mark.parametrize("content", [b"\x0a", b"", None], ids=["nonsense", "empty", "none"])
def test_what_is_no_message_is_bad_input(shared: Serving, path: str, content: bytes | None) -> None:
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = shared.channel.stream_stream(path)
    answers = call(iter([] if content is None else [content]), timeout=15)
    code = grpc.StatusCode.OK
    try:
        for _ in answers:
            answers.cancel()
    except grpc.RpcError as error:
        code = error.code()
    assert code is not grpc.StatusCode.UNKNOWN
    if content == b"\x0a" or (content is None and "Info" not in path):
        assert code is grpc.StatusCode.INVALID_ARGUMENT
