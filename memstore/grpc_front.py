"""GrpcFront: the wire contract over gRPC. Deadlines, answers and metrics of every call pass here."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from memstore import status, wire
from memstore.arrival import REQUEST_ID, credentials_of, is_local, metadata_of, request_id_of
from memstore.errors import Expired, InvalidRequest, MemstoreError, NotReady, Overloaded
from memstore.outcomes import abort
from memstore.replies import Reader, ReplyBudget, ReplyPlane
from memstore.service import Caller
from memstore.talk import Flight, Talk
from memstore.v1 import memstore_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from google.protobuf.descriptor import MethodDescriptor

    from memstore.arrival import Context
    from memstore.gate import Gate
    from memstore.lending import Lending
    from memstore.outcomes import Outcomes
    from memstore.seams import Clock
    from memstore.service import Service

SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
M = TypeVar("M", bound=Message)
HEAD_BYTES = 1 << 20
"""Room that a reply has beside its tensors: 4,096 sequences need 0.3 MiB."""


class Arrived(NamedTuple, Generic[M]):
    """A message, and the bytes that it came in."""

    message: M
    num_bytes: int


Steps: TypeAlias = "Arrived[pb.StepStreamRequest]"


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not a message of the kind that the method takes, and what is wrong with them."""

    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontLimits:
    """What callers may make the front hold.

    stream_in_flight: steps of one stream that may be under way before no more are read. reply_bytes: of answers that
    are made and not taken, over all callers. stall_s: how long one message of a stream may wait to be taken.
    """

    stream_in_flight: int = 16
    reply_bytes: int = 256 << 20
    stall_s: float = 30.0


class GrpcFront:
    """The gRPC side of a Service. Lives on one event loop."""

    def __init__(
        self,
        service: Service,
        gate: Gate,
        outcomes: Outcomes,
        clock: Clock,
        limits: FrontLimits,
        *,
        lending: Lending | None = None,
    ) -> None:
        """lending: what lends memories to callers of this host."""
        self.max_reply_bytes = wire.MAX_MESSAGE_BYTES - HEAD_BYTES
        self.replies = ReplyBudget(limits.reply_bytes)
        self._lending = lending
        self._limits = limits
        self._service = service
        self._gate = gate
        self._outcomes = outcomes
        self._clock = clock
        self._readers: set[asyncio.Task[None]] = set()
        self._is_draining = False

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server serves: one handler a method of the contract."""
        handlers = {method.name: self._handler_of(method) for method in SERVICE.methods}
        return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)

    def drain(self) -> None:
        """Streams read no more; they end once what they have read is answered."""
        self._is_draining = True
        for reader in self._readers:
            reader.cancel()

    def _handler_of(self, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        parse = _parser(GetMessageClass(method.input_type))
        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream, request_deserializer=parse)
        return grpc.unary_unary_rpc_method_handler(
            partial(self._unary, method.name), request_deserializer=parse, response_serializer=_serialize
        )

    async def _unary(self, method: str, request: Arrived[Message] | Malformed, context: Context) -> Message:
        began = self._clock.monotonic()
        metadata = metadata_of(context)
        request_id = request_id_of(metadata)
        plane = ReplyPlane(Reader(self.replies), self.max_reply_bytes)
        try:
            path = _path(method)
            credentials = credentials_of(metadata, context, self._gate.authenticator)
            identity = self._gate.enter(path, credentials)
            whole, num_bytes = _whole(request)
            self._gate.admit(path, identity, whole)
            deadline = _deadline(began, context.time_remaining())
            caller = Caller(
                tenant=identity.tenant, plane=plane, deadline=deadline, request_id=request_id, num_bytes=num_bytes
            )
            lending = self._lending if is_local(context.peer()) else None
            if lending is not None and isinstance(whole, pb.OpenPlaneRequest):
                reply: Message = lending.offer(whole, caller.tenant, lambda: self._gate.is_open(path, credentials))
            else:
                reply = await asyncio.wrap_future(self._service.call(method, whole, caller))
            if lending is not None and isinstance(reply, pb.ServerInfoResponse):
                reply.planes.append(lending.plane)
        except asyncio.CancelledError:
            plane.release()
            self._outcomes.count(method, grpc.StatusCode.CANCELLED, began)
            raise
        except Exception as error:  # the root of the servicer: whatever it is, the caller gets a status
            plane.release()
            failure = self._outcomes.failure(method, error, request_id, began)
        else:
            context.add_done_callback(lambda _: plane.release())  # type: ignore[arg-type]  # no function is what its stub says
            self._outcomes.count(method, grpc.StatusCode.OK, began)
            context.set_trailing_metadata(((REQUEST_ID, request_id),))
            return reply
        await abort(context, failure, request_id)
        raise AssertionError("abort raises")

    async def _stream(self, requests: AsyncIterator[Steps | Malformed], context: Context) -> None:
        metadata = metadata_of(context)
        request_id = request_id_of(metadata)
        began = self._clock.monotonic()
        reader = Reader(self.replies)
        try:
            credentials = credentials_of(metadata, context, self._gate.authenticator)
            self._gate.enter(STREAM, credentials)
            talk = Talk(context, credentials, request_id, _deadline(began, context.time_remaining()), reader)
            with self._outcomes.stream():
                await self._converse(requests, talk)
            if not self._is_draining:
                context.set_trailing_metadata(((REQUEST_ID, request_id),))
                return
            failure = status.answer(NotReady("the server is stopping"), request_id)
        except grpc.aio.InternalError:  # what a write says where the other end has gone
            self._outcomes.count("StepStream", grpc.StatusCode.CANCELLED, began)
            return
        except Exception as error:  # the root of the servicer, as in _unary
            failure = self._outcomes.failure("StepStream", error, request_id, began)
        await abort(context, failure, request_id)

    async def _converse(self, requests: AsyncIterator[Steps | Malformed], talk: Talk) -> None:
        """Reads and answers side by side, in order, with a bounded number of steps between."""
        reading = asyncio.create_task(self._read(requests, talk))
        reading.add_done_callback(_heard)
        self._readers.add(reading)
        try:
            while (flight := await talk.next()) is not None:
                for frame in self._settle(flight, talk.request_id):
                    await self._write(frame, talk)
                talk.take(flight)
            if not self._is_draining:
                await reading  # what it failed with
        finally:
            self._readers.discard(reading)
            reading.cancel()
            talk.close()

    async def _write(self, frame: bytes, talk: Talk) -> None:
        """One message, once the caller has room for it. Overloaded where that has taken too long."""
        alarm = asyncio.get_running_loop().call_later(self._limits.stall_s, talk.stall)
        try:
            await talk.context.write(frame)
        finally:
            alarm.cancel()
        if talk.has_stalled:
            raise Overloaded(f"no answer was taken for {self._limits.stall_s:g} s", 0.0)

    async def _read(self, requests: AsyncIterator[Steps | Malformed], talk: Talk) -> None:
        try:
            if self._is_draining:
                return
            async for request in requests:
                if isinstance(request, Malformed):
                    raise InvalidRequest("request", request.problem)
                while talk.reader.is_behind:
                    await talk.taken()
                if talk.has_stalled:
                    return
                flight = self._begin(request, talk)
                talk.put(flight, self._left_s(flight))
                while talk.num_open >= self._limits.stream_in_flight:
                    await talk.taken()
        finally:
            talk.end()

    def _begin(self, arrived: Steps, talk: Talk) -> Flight:
        """Sends a step on its way. NotAuthenticated, which ends the stream, once its credential is good no more."""
        request = arrived.message
        identity = self._gate.enter(STREAM, talk.credentials)
        began = self._clock.monotonic()
        deadline = talk.deadline
        if request.HasField("timeout"):
            own = began + request.timeout.seconds + request.timeout.nanos / 1e9
            deadline = own if deadline is None else min(own, deadline)
        plane = ReplyPlane(talk.reader, self.max_reply_bytes, request.call_id if request.max_piece_bytes else None)
        caller = Caller(
            tenant=identity.tenant,
            plane=plane,
            deadline=deadline,
            request_id=talk.request_id,
            num_bytes=arrived.num_bytes,
        )
        piece_bytes = 0
        try:
            self._gate.admit(STREAM, identity, request.step)
            piece_bytes = wire.piece_bytes(request.max_piece_bytes)
        except MemstoreError as error:
            future: Future[Message] = Future()
            future.set_exception(error)
        else:
            future = self._service.call("Step", request.step, caller)
        return Flight(request.call_id, piece_bytes, future, plane, began, deadline)

    def _settle(self, flight: Flight, request_id: str) -> Iterable[bytes]:
        """The messages of the answer to a step that is over."""
        future = flight.future
        try:
            if not future.done():
                future.cancel()
                raise Expired("the step's timeout is over; what the device had begun is done nevertheless")
            reply = future.result()
        except Exception as error:  # the root of the servicer, as in _unary
            failure = self._outcomes.failure("StepStream", error, request_id, flight.began)
        else:
            self._outcomes.count("StepStream", grpc.StatusCode.OK, flight.began)
            return wire.answer_frames(flight.call_id, reply, flight.plane, flight.piece_bytes)
        return (wire.failure_frame(flight.call_id, status.to_failure(failure)),)

    def _left_s(self, flight: Flight) -> float | None:
        return None if flight.deadline is None else max(0.0, flight.deadline - self._clock.monotonic())


def _heard(reader: asyncio.Task[None]) -> None:
    """Takes note of how a reader ended, whether or not somebody waits for it."""
    if not reader.cancelled():
        reader.exception()


def _parser(kind: type[Message]) -> Callable[[bytes], Arrived[Message] | Malformed]:
    descriptor: Any = kind.DESCRIPTOR
    malformed = Malformed(f"not a {kind.DESCRIPTOR.name}")
    crowd = Malformed(f"{malformed.problem} of {wire.MAX_MESSAGE_PARTS:,} fields at most")

    def parse(content: bytes) -> Arrived[Message] | Malformed:
        if wire.is_crowd(descriptor, content):
            return crowd
        try:
            return Arrived(kind.FromString(content), len(content))
        except DecodeError:
            return malformed

    return parse


def _whole(request: Arrived[Message] | Malformed) -> Arrived[Message]:
    if isinstance(request, Malformed):
        raise InvalidRequest("request", request.problem)
    return request


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _path(method: str) -> str:
    return f"/{SERVICE.full_name}/{method}"


STREAM = _path("StepStream")


def _deadline(began: float, seconds: float | None) -> float | None:
    return None if seconds is None else began + seconds
