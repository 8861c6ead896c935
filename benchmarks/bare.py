"""gRPC alone: a server that answers with bytes made beforehand, and its callers. No step through gRPC can undercut it.

The server has the event loop and the options of `memstore serve`, the callers are of the client's kinds: a unary call
whose answer a callback takes, and a kept-open stream that a thread reads. Nothing is parsed on either side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import uvloop

from memstore import heap
from memstore.listen import SERVER_OPTIONS
from model_client.transport.grpc import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

REQUEST = bytes(8 * 256 * 2)
REPLY = bytes(128 << 10)
SERVICE = "benchmarks.Bare"
Context = grpc.aio.ServicerContext[bytes, bytes]


class BareUnary:
    """Unary calls."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/Unary")

    def seconds(self) -> float:
        """How long one call takes."""
        begun = time.perf_counter()
        answer: Future[bytes] = Future()
        call = self._call.future(REQUEST, timeout=60.0)
        call.add_done_callback(lambda _: answer.set_result(call.result()))
        answer.result()
        return time.perf_counter() - begun

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


class BareStream:
    """Calls on one stream."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        begin: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{SERVICE}/Stream")
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()
        self._call = begin(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def seconds(self) -> float:
        """How long one call takes."""
        begun = time.perf_counter()
        answer: Future[bytes] = Future()
        self._waiting.put(answer)
        self._requests.put(REQUEST)
        answer.result()
        return time.perf_counter() - begun

    def close(self) -> None:
        """Ends the stream, its thread and the channel."""
        self._requests.put(None)
        self._reader.join()
        self._channel.close()

    def _read(self) -> None:
        for content in self._call:
            self._waiting.get().set_result(content)


async def serve(announce: Callable[[str], object]) -> None:
    """Serves on a loopback port until the process is ended. announce: is told where."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_answer),
        "Stream": grpc.stream_stream_rpc_method_handler(_converse),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def _answer(request: bytes, context: Context) -> bytes:
    del request, context
    return REPLY


async def _converse(requests: AsyncIterator[bytes], context: Context) -> None:
    async for _ in requests:
        await context.write(REPLY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ready-file", type=Path, required=True)
    file: Path = parser.parse_known_args()[0].ready_file
    heap.tune()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(lambda address: file.write_text(json.dumps({"address": address}))))
