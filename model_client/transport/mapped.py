"""MappedTransport: the steps of one session, done in this process on memory that a server of this host has lent.

The session's first append asks for the lease of its sequences. While it has that, its steps run here; before and after,
and where the lease is refused, they travel by the transport below. A switch waits until nothing is under way, and the
state that makes appends exactly-once goes with the lease, both ways. When the server dies, the steps go on here, and
its successor is given what is in the memory.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from memstore.v1 import memstore_pb2 as pb
from model_client.core import expect
from model_client.errors import (
    Late,
    MemstoreClientError,
    NotFound,
    NotReady,
    Overloaded,
    QuotaExceeded,
    Unavailable,
)
from model_client.transport import descriptors
from model_client.transport.process import client_error, hand_on, stood
from model_client.transport.switching import SwitchingPlane

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

    from memstore.mapped import Mapped
    from model_client.stats import ClientStats
    from model_client.transport.base import Standing, Transport

OPEN_S = 5.0
"""How long one attempt to get a lease may take."""
QUIET_S = 2.0
"""How long a switch waits for what is under way."""
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
_FOR_NOW = (Late, NotFound, NotReady, Overloaded, QuotaExceeded, Unavailable)
"""Refusals after which a lease is asked for again."""
_PLANES = {"auto": pb.PLANE_UNSPECIFIED, "shm": pb.PLANE_SHM, "cuda": pb.PLANE_CUDA}
_NAMES = {pb.PLANE_SHM: "shm", pb.PLANE_CUDA: "cuda"}
_STEPS = pb.StepRequest, pb.RetrieveRequest, pb.AppendRequest
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a session wants to have in its own process. plane: "auto", or "shm" or "cuda" and nothing else."""

    memory: str
    sequences: Sequence[str]
    plane: str


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that waits for a switch. until: monotonic seconds."""

    method: str
    request: Message
    until: float
    answer: Future[Message]


class MappedTransport:
    """See Transport. Its thread is there from the first append to `close`, or to a refusal that is for ever."""

    def __init__(self, inner: Transport, wish: Wish, stats: ClientStats) -> None:
        self.plane = SwitchingPlane(inner.plane)
        self._inner = inner
        self._wish = wish
        self._stats = stats
        self._process_id = os.getpid()
        self._changed = threading.Condition()
        self._engine: Mapped | None = None
        self._is_orphaned = False
        self._connection: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._paused: list[_Call] | None = None
        self._num_under_way = 0
        self._writer = ""
        self._is_wanted = False
        self._retry_at = 0.0
        self._taken_at = 0.0
        self._retry_s = FIRST_RETRY_S
        self._refusal: MemstoreClientError | None = None
        self._is_closed = False

    @property
    def name(self) -> str:
        """As the transport below."""
        return self._inner.name

    @property
    def counted(self) -> str:
        """Steps that were done while the server was there, and after it had gone."""
        return "orphaned_steps" if self._is_orphaned else "mapped_steps"

    def call(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        """Begins the call, here or below, or as soon as a switch is done."""
        if self._process_id != os.getpid():  # the lease is the parent's
            self.plane.make_inline(request)
            return self._inner.call(method, request, timeout_s)
        with self._changed:
            self._want_lease(request)
            if self._paused is None:
                return self._begin(method, request, timeout_s)
            waiting = _Call(method, request, time.monotonic() + timeout_s, Future())
            self._paused.append(waiting)
            return waiting.answer

    def stand(self, request: pb.StepRequest, timeout_s: float) -> Standing | None:
        """See StandingTransport: while the lease is here."""
        with self._changed:
            engine = self._engine
            if engine is None or self._paused is not None or self._process_id != os.getpid():
                return None
        return stood(engine.stand(request, timeout_s), timeout_s)

    def close(self) -> None:
        """Gives the lease back and ends the thread; the transport below goes on."""
        if self._process_id != os.getpid():
            return
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RD)  # wakes the thread
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _want_lease(self, request: Message) -> None:
        """Has the thread ask for the lease where an append needs it."""
        if not isinstance(request, pb.StepRequest) or not request.append or self._is_closed:
            return
        self._writer, self._is_wanted = request.writer, True
        if self._engine is not None or self._refusal is not None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="memstore-lease", daemon=True)
            self._thread.start()
            if self._wish.plane != "auto":
                self._paused = []
        self._changed.notify_all()

    def _begin(self, method: str, request: Message, timeout_s: float) -> Future[Message]:
        engine = self._engine
        if self._refusal is not None and self._wish.plane != "auto" and isinstance(request, pb.StepRequest):
            return _failed(self._refusal.with_traceback(None))  # which would keep the frames of every step
        self._num_under_way += 1
        if engine is not None and _is_holders(request):
            self._stats.add(self.counted)
            answer: Future[Message] = Future()
            engine.call(method, request, timeout_s).add_done_callback(partial(self._answer_here, answer))
        else:
            self.plane.make_inline(request)
            answer = self._inner.call(method, request, timeout_s)
            answer.add_done_callback(self._ended)
        return answer

    def _answer_here(self, answer: Future[Message], done: Future[Message]) -> None:
        try:
            hand_on(done, answer)
        finally:  # also where the caller has cancelled it
            self._ended(answer)

    def _ended(self, _: Future[Message]) -> None:
        with self._changed:
            self._num_under_way -= 1
            if self._paused is not None:  # only then is anybody waiting for it
                self._changed.notify_all()

    def _run(self) -> None:
        """The thread: asks for the lease, keeps it, and asks again when it is gone."""
        try:
            while self._await_wish():
                try:
                    engine = self._open(None)
                except MemstoreClientError as error:
                    if not self._may_ask_again(error):
                        return
                else:
                    self._hold(engine)
        finally:
            self._resume()

    def _await_wish(self) -> bool:
        """Waits until a lease is wanted, and may be asked for; False once closed."""
        with self._changed:
            while not self._is_closed:
                left = self._retry_at - time.monotonic()
                if left <= 0 and self._is_wanted:
                    return True
                self._changed.wait(left if self._is_wanted else None)
            return False

    def _may_ask_again(self, error: MemstoreClientError) -> bool:
        if not isinstance(error, _FOR_NOW):
            self._refusal = error
            _log.log(logging.INFO if self._wish.plane == "auto" else logging.WARNING, "not lent: %s", error.message)
            return False
        self._resume()
        self._put_off()
        return True

    def _put_off(self, held_s: float = 0.0) -> None:
        """Lets time pass before the next attempt, the more the less the lease was held."""
        if held_s > LAST_RETRY_S:
            self._retry_s = FIRST_RETRY_S
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)

    def _open(self, old: Mapped | None) -> Mapped:
        """Takes the lease, and gives its server what is in the memory of an old one. Raises MemstoreClientError."""
        from memstore.mapped import Mapped  # the server's half; a client that is lent nothing does not load it

        request = pb.OpenPlaneRequest(
            plane=_PLANES[self._wish.plane],
            memory=self._wish.memory,
            sequences=self._wish.sequences,
            writer=self._writer,
        )
        try:
            offer = expect(self._inner.call("OpenPlane", request, OPEN_S).result(OPEN_S), pb.OpenPlaneResponse)
        except TimeoutError as error:
            raise Late("no answer about a lease") from error
        self._pause()
        remains = None
        if old is None:
            self._await_quiet()
        else:
            old.leave().result()
            remains = descriptors.Remains(old.mapped, old.descriptors)
        claim = descriptors.claim(offer, 2, OPEN_S, remains)
        try:
            engine = Mapped(claim.response.mapped, claim.descriptors, self.plane.engine_plane())
        except Exception as error:
            claim.connection.close()
            raise client_error(error) from error
        finally:
            for descriptor in claim.descriptors:
                os.close(descriptor)
        self._take(engine, claim.connection)
        return engine

    def _take(self, engine: Mapped, connection: socket.socket) -> None:
        """The session goes on with this engine."""
        name = _NAMES[engine.mapped.plane]
        with self._changed:
            self._engine, self._connection, self._is_orphaned = engine, connection, False
            self._taken_at = time.monotonic()
            self.plane.switch(name)
            if self._is_closed:
                connection.shutdown(socket.SHUT_RD)
        self._stats.add("leases")
        _log.info("sequences of memory %s are used in this process, by plane %s", self._wish.memory, name)
        self._resume()

    def _hold(self, engine: Mapped) -> None:
        """Keeps the lease until it is recalled, revoked or not wanted any more."""
        engine.prepare()
        while (connection := self._connection) is not None:
            is_told = bool(_receive(connection))
            if is_told or self._is_closed:
                if self._give_back(engine, connection):
                    return
            elif not engine.is_held:
                return self._drop(engine, connection)
            successor = self._find_successor(engine)
            if successor is None:
                return self._drop(engine, connection)
            connection.close()
            engine.close()
            engine = successor

    def _give_back(self, engine: Mapped, connection: socket.socket) -> bool:
        """Gives the lease back and goes on below; False where the server died over that.

        A server that merely takes its time has the lease back all the same: its memory is not touched any more.
        """
        self._pause()
        engine.leave().result()
        is_late = False
        try:
            connection.send(pb.LeaseReturn(lease=engine.mapped.lease).SerializeToString(), socket.MSG_NOSIGNAL)
            connection.settimeout(OPEN_S)
            while not self._is_closed and connection.recv(descriptors.MAX_PACKET_BYTES):
                pass
        except TimeoutError:
            is_late = True
        except OSError:
            pass  # the connection is gone, and the control block says why
        if engine.is_held and not is_late and not self._is_closed:
            self._resume()
            return False
        self._drop(engine, connection)
        return True

    def _find_successor(self, engine: Mapped) -> Mapped | None:
        """Goes on with the memory of a dead server until another takes it over; None once there is no hope."""
        self._is_orphaned = True
        _log.warning("the server has gone: sequences of memory %s go on in this process", self._wish.memory)
        self._retry_s = FIRST_RETRY_S
        while self._await_wish():
            try:
                return self._open(engine)
            except MemstoreClientError as error:
                self._resume()
                if not isinstance(error, _FOR_NOW):
                    _log.warning("what the dead server held is lost: %s", error.message)
                    return None
                self._put_off()
        return None

    def _drop(self, engine: Mapped, connection: socket.socket) -> None:
        """Goes on without a lease, for a while."""
        self._pause()
        with self._changed:
            self._engine, self._connection, self._is_orphaned = None, None, False
            self._is_wanted = False  # until the next append
            self.plane.switch(None)
        connection.close()
        engine.close()
        self._put_off(time.monotonic() - self._taken_at)
        self._resume()

    def _pause(self) -> None:
        """Holds calls back that begin from now on."""
        with self._changed:
            if self._paused is None:
                self._paused = []

    def _await_quiet(self) -> None:
        """Waits until no call is under way. Raises Late where that takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_under_way == 0, QUIET_S):
                raise Late("calls under way have kept a lease from being taken")

    def _resume(self) -> None:
        """Begins the calls that were held back, in their order."""
        with self._changed:
            waiting, self._paused = self._paused or [], None
            for call in waiting:
                begun = self._begin(call.method, call.request, max(0.0, call.until - time.monotonic()))
                begun.add_done_callback(partial(_answer, call.answer))


def _is_holders(request: Message) -> bool:
    """True for what the holder of a lease does itself; its sequences are all that a session ever names."""
    if isinstance(request, pb.ResetRequest):
        return not request.release
    return isinstance(request, _STEPS)


def _receive(connection: socket.socket) -> bytes:
    """The server's next packet; empty where it is dead or has closed the connection."""
    try:
        return connection.recv(descriptors.MAX_PACKET_BYTES)
    except OSError:
        return b""


def _answer(answer: Future[Message], done: Future[Message]) -> None:
    hand_on(done, answer)


def _failed(error: MemstoreClientError) -> Future[Message]:
    answer: Future[Message] = Future()
    answer.set_exception(error)
    return answer
